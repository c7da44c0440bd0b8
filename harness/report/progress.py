"""The one maker of progress bars: on a console, if that is a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


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
