"""The one maker of progress bars, on a terminal, and of the lines that stand for them in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LINE_SECONDS = 10.0  # between two lines of a log


def bars(
    console: Console, *, indent: str = "", shows: bool = True, transient: bool = False
) -> Progress:
    """Returns bars to be used as a context; nothing is drawn where `shows` is False."""
    return Progress(
        TextColumn(indent + "{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not (shows and console.is_terminal),
        transient=transient,
    )


class Lines:
    """What takes a bar's place in a log: a line every `LINE_SECONDS` of how much is done."""

    def __init__(self, title: str, say: Callable[[str], None]) -> None:
        self._title = title
        self._say = say
        self._said = time.monotonic()
        self._pace: Pace | None = None
        self._done = 0

    def update(self, done: int, total: int | None, about: str = "") -> None:
        """`total`: None where it is not known; `about`: which of several this is."""
        if self._pace is None or done < self._done:  # the next of several begins
            self._pace = Pace(done)
        self._done = done
        now = time.monotonic()
        if now - self._said < LINE_SECONDS:
            return
        self._said = now
        where = f"{done}/{total}" if total else str(done)
        left = f"  {self._pace.left(done, total)}" if total and done < total else ""
        self._say(clocked(f"{self._title}{about and ', '}{about} {where}{left}"))


class Pace:
    """How long the rest takes, at the pace since the start, evaluations included."""

    def __init__(self, done: int) -> None:
        self._first = done
        self._began = time.monotonic()

    def left(self, done: int, total: int) -> str:
        """Says it: "0:12:30 left"; while nothing is done it is unknown."""
        if done <= self._first:
            return "-:--:-- left"
        seconds = (time.monotonic() - self._began) / (done - self._first) * (total - done)
        return f"{duration(seconds)} left"


def duration(seconds: float) -> str:
    """Returns hours, minutes and seconds: "0:12:30"."""
    return str(timedelta(seconds=round(seconds)))


def clocked(line: str) -> str:
    """Returns a line of a log, after the time of day."""
    return f"{time.strftime('%H:%M:%S')}  {line}"
