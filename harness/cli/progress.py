"""Progress of a long command in a terminal or in a log."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


PLAIN = {
    "no_args_is_help": True,
    "rich_markup_mode": None,
    "pretty_exceptions_enable": False,
    "add_completion": False,
}


@contextmanager
def bar() -> Iterator[Progress]:
    """Progress bars on stderr, if that is a terminal."""
    from rich import progress as rich
    from rich.console import Console

    console = Console(stderr=True)
    columns = rich.TextColumn("{task.description}"), rich.BarColumn(), rich.MofNCompleteColumn()
    times = rich.TimeElapsedColumn(), rich.TimeRemainingColumn()
    with rich.Progress(
        *columns, *times, console=console, disable=not console.is_terminal
    ) as progress:
        yield progress


@contextmanager
def told(title: str) -> Iterator[Callable[[int, int], None]]:
    """A bar that is told (done, of how many)."""
    with bar() as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total, *_: progress.update(task, completed=done, total=total)


@contextmanager
def _counted(title: str) -> Iterator[Callable[[int], None]]:
    """A bar without an end that is known, advanced by the number of samples done since the last
    call.
    """
    with bar() as progress:
        task = progress.add_task(title, total=None)
        yield lambda samples: progress.advance(task, samples)
