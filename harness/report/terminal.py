"""What the user sees while a run goes on: the table of parts, a progress bar, answers to the same
images.

Rank-aware: only the main process writes. Where there is no terminal, a line every few seconds takes
the bar's place.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import nn

from harness.model.language.quantise import quantised_layers
from harness.redact import clean, printable
from harness.report.pictures import Shown

LINE_SECONDS = 10.0  # between two lines of a log


def part_rows(parts: Mapping[str, nn.Module]) -> list[dict[str, Any]]:
    """Returns for each part its parameters, trained ones, bits of weights, 4-bit layers, bytes."""
    rows = []
    for name, part in parts.items():
        packed = {id(layer.weight) for layer in quantised_layers(part)}
        parameters = trained = size = 0
        bits = set()
        for parameter in part.parameters():
            # Two 4-bit weights share a byte, and the quantised tensor counts bytes.
            count = parameter.numel() * 2 if id(parameter) in packed else parameter.numel()
            bits.add(4 if id(parameter) in packed else parameter.element_size() * 8)
            parameters += count
            trained += count if parameter.requires_grad else 0
            size += parameter.numel() * parameter.element_size()
        rows.append(
            {
                "part": name,
                "parameters": parameters,
                "trained": trained,
                "bytes": size,
                "bits": " + ".join(map(str, sorted(bits))),
                "4-bit layers": len(packed),
            }
        )
    return rows


class Terminal:
    """All output of one run."""

    def __init__(self, enabled: bool) -> None:
        self.console = Console(stderr=True, quiet=not enabled, emoji=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            refresh_per_second=4,  # a notebook gets each as a message
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self._said = 0.0

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        """Shows a bar for as long as the block lasts."""
        self._task = self._bar.add_task("training", total=total, completed=done, numbers="")
        with self._bar:
            yield

    def advance(self, step: int, numbers: Mapping[str, float]) -> None:
        shown = (
            f"loss {numbers['loss']:.3f}  {numbers['images_per_second']:.0f} images/s  "
            f"{numbers['targets_per_second']:.0f} targets/s  waiting {numbers['data_wait']:.0%}  "
            f"{numbers['memory_mb']:.0f} MB"
        )
        self._bar.update(self._task, completed=step, numbers=shown)
        total = self._bar.tasks[self._task].total
        now = time.monotonic()
        if self._bar.disable and (now - self._said >= LINE_SECONDS or step == total):
            self._said = now
            self.say(f"step {step}/{total}  {shown}")

    def say(self, message: str) -> None:
        message = clean(message)
        if self.console.is_terminal:
            # A notebook erases nothing: a short line would end in the bar it is written over.
            message = message.ljust(self.console.width)
        self.console.print(message, markup=False, highlight=False, soft_wrap=True)

    def parts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        table = Table(
            "part", "parameters", "trained", "bits", "MB", title="parts", title_justify="left"
        )
        for row in rows:
            trained = f"{row['trained']:,}" if row["trained"] else "frozen"
            mb = f"{row['bytes'] / 2**20:.1f}"
            table.add_row(str(row["part"]), f"{row['parameters']:,}", trained, str(row["bits"]), mb)
        self.console.print(table)

    def answers(self, items: Sequence[Shown]) -> None:
        self.say("answers to the same images")
        table = Table("prompt", "truth", "answer")
        for item in items:
            texts = (item.prompt, item.expected, item.said)
            table.add_row(*(Text(printable(text)) for text in texts))
        self.console.print(table)
