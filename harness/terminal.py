"""What the user sees while a run goes on: the table of parts, a progress bar, answers to the same images.

Rank-aware: only the main process writes. Where there is no terminal, a line per epoch takes the bar's place.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import nn

from harness.model.language.quantise import quantised_layers


def part_rows(parts: Mapping[str, nn.Module]) -> list[dict[str, object]]:
    """Per part: parameters, trained ones, bits of the frozen weights, bytes."""
    rows = []
    for name, part in parts.items():
        packed = {id(layer.weight) for layer in quantised_layers(part)}
        parameters = trained = size = 0
        for parameter in part.parameters():
            # Two 4-bit weights share a byte, and the quantised tensor counts bytes.
            count = parameter.numel() * 2 if id(parameter) in packed else parameter.numel()
            parameters += count
            trained += count if parameter.requires_grad else 0
            size += parameter.numel() * parameter.element_size()
        rows.append(
            {"part": name, "parameters": parameters, "trained": trained, "4-bit layers": len(packed), "bytes": size}
        )
    return rows


def memory_mb(device: torch.device) -> float:
    """Peak memory of the device, or what this process holds in main memory now; MB of 2**20 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


class Terminal:
    """All output of one run; a context manager, since the bar has to be put away."""

    def __init__(self, enabled: bool, total_steps: int = 0, done: int = 0):
        self.enabled = enabled
        self.console = Console(stderr=True, quiet=not enabled)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=self.console,
            disable=not (enabled and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task("training", total=total_steps, completed=done, numbers="")

    def __enter__(self) -> Terminal:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def say(self, message: str) -> None:
        self.console.print(message, markup=False, highlight=False)

    def parts(self, rows: Sequence[Mapping[str, object]]) -> None:
        table = Table("part", "parameters", "trained", "4-bit layers", "MB", title="parts", title_justify="left")
        for row in rows:
            table.add_row(
                str(row["part"]), f"{row['parameters']:,}", f"{row['trained']:,}" if row["trained"] else "frozen",
                str(row["4-bit layers"] or "-"), f"{row['bytes'] / 2**20:.1f}",
            )  # fmt: skip
        self.console.print(table)

    def advance(self, step: int, numbers: Mapping[str, float]) -> None:
        shown = (
            f"loss {numbers['loss']:.3f}  {numbers['images_per_second']:.0f} images/s  "
            f"{numbers['targets_per_second']:.0f} targets/s  waiting {numbers['data_wait']:.0%}  "
            f"{numbers['memory_mb']:.0f} MB"
        )
        self._bar.update(self._task, completed=step, numbers=shown)
        self.last = shown

    def answers(self, rows: Sequence[tuple[str, str, str]]) -> None:
        table = Table("prompt", "truth", "answer", title="the same images after every epoch", title_justify="left")
        for row in rows:
            table.add_row(*row)
        self.console.print(table, markup=False)
