"""What the user sees while a run goes on: the table of parts, a progress bar, answers that changed.

Rank-aware: only the main process writes. Where there is no terminal, a line every few seconds takes
the bar's place. Of the figures as many are shown as fit, the most important first.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column, Table
from rich.text import Text
from torch import nn

from harness.model.language.quantise import quantised_layers
from harness.redact import clean, printable
from harness.report.pictures import Shown
from harness.report.progress import LINE_SECONDS, Pace, clocked, duration

LOG_WIDTH = 100  # columns of such a line
BAR = 12  # columns


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
            BarColumn(bar_width=BAR),
            TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
            refresh_per_second=4,  # a notebook gets each as a message
            console=self.console,
            disable=not (enabled and self.console.is_terminal),
        )
        self._said = -LINE_SECONDS
        self._answers: list[tuple[str, str]] = []  # prompts and answers, the last time
        self._evaluation_seconds = 0.0  # that the last one took

    @contextmanager
    def progress(self, total: int, done: int) -> Iterator[None]:
        """Shows a bar for as long as the block lasts."""
        self._task = self._bar.add_task("training", total=total, completed=done, numbers="")
        self._total = total
        self._pace = Pace(done)
        with self._bar:
            yield

    def advance(self, step: int, numbers: Mapping[str, float]) -> None:
        """Shows a step: in a log every `LINE_SECONDS`, at the first and at the last one."""
        total = self._total
        figures = (
            f"loss {numbers['loss']:.3f}",
            f"{numbers['images_per_second']:.0f} images/s",
            f"waiting {numbers['data_wait']:.0%}",
            *((f"MFU {numbers['mfu']:.0%}",) if "mfu" in numbers else ()),
            f"{numbers['targets_per_second']:.0f} targets/s",
            f"{numbers['memory_mb']:.0f} MB",
        )
        where = f"{step}/{total}  {self._pace.left(step, total)}"
        self._show(self._task, "step", where, figures, step, at_once=step == total)

    @contextmanager
    def evaluation(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Announces an evaluation of `what`, and shows how far it is when told (images done, of how
        many); the answers to exchanged images come after the last.
        """
        began = time.monotonic()
        last = self._evaluation_seconds
        takes = f"the last one took {duration(last)}" if last else "this takes a while"
        self.say(f"evaluating on {what}; {takes}")
        task = self._bar.add_task("evaluating", total=None, numbers="")
        pace = Pace(0)
        self._said = began

        def advance(done: int, total: int) -> None:
            left = pace.left(done, total) if done < total else "now with other images"
            where = f"{done}/{total} images  {left}"
            self._bar.update(task, total=total)
            self._show(task, "evaluating", where, (), done, at_once=False)

        try:
            yield advance
        finally:
            self._bar.remove_task(task)
            self._evaluation_seconds = time.monotonic() - began

    def _show(
        self, task: TaskID, title: str, where: str, figures: Sequence[str], done: int, at_once: bool
    ) -> None:
        """Moves a bar, or writes a line of a log with the time of day; `figures`: the first so many
        that fit.
        """
        width = self.console.width - max(len(t.description) for t in self._bar.tasks) - BAR - 2
        self._bar.update(task, completed=done, numbers=fitting(where, figures, width))
        now = time.monotonic()
        if self._bar.disable and (at_once or now - self._said >= LINE_SECONDS):
            self._said = now
            self.say(fitting(clocked(f"{title} {where}"), figures, LOG_WIDTH))

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
        """Shows answers to the same images as always: all at first, then those that changed."""
        before = self._answers if len(self._answers) == len(items) else []
        now = [(item.prompt, item.said) for item in items]
        rows: list[tuple[str, ...]] = []
        for place, item in enumerate(items):
            if not before:
                rows.append((item.prompt, item.expected, item.said))
            elif now[place] != before[place]:
                rows.append((item.prompt, item.expected, before[place][1], item.said))
        changed = f": {len(rows) or 'none'} changed" if before else ""
        self.say(f"answers to {'the same ' if before else ''}{len(items)} images{changed}")
        self._answers = now
        if rows:
            table = Table("prompt", "truth", *(("before", "now") if before else ("answer",)))
            for row in rows:
                table.add_row(*(Text(printable(text)) for text in row))
            self.console.print(table)


def fitting(start: str, figures: Sequence[str], width: int) -> str:
    """Returns `start` and the first so many figures that fit into `width` columns."""
    line = start
    for figure in figures:
        if len(line) + 2 + len(figure) > width:
            break
        line = f"{line}  {figure}"
    return line
