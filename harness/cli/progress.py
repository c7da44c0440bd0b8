"""What all verbs share: how typer shows them, and the progress of a long one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from harness.redact import clean, say

if TYPE_CHECKING:
    from rich.progress import Progress


class Help(TypedDict):
    """What every group of verbs is made with."""

    no_args_is_help: bool
    rich_markup_mode: Literal["rich"]
    pretty_exceptions_enable: bool
    context_settings: dict[str, Any]


HELP = Help(
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@contextmanager
def bar() -> Iterator[Progress]:
    """Shows progress bars on stderr, if that is a terminal."""
    from rich.console import Console

    from harness.report.progress import bars

    with bars(Console(stderr=True)) as progress:
        yield progress


@contextmanager
def told(title: str) -> Iterator[Callable[..., None]]:
    """Shows a bar that is told (done, of how many) and, where several follow each other, `about`
    what; without a terminal, a line now and then.
    """
    from harness.report.progress import Lines

    with bar() as progress:
        if progress.disable:
            lines = Lines(title, partial(say, file=sys.stderr))
            yield lambda done, total, *_, about="": lines.update(done, total, about)
            return
        task = progress.add_task(clean(title), total=None)

        def update(done: int, total: int, *_: Any, about: str = "") -> None:
            said = clean(f"{title}{about and ', '}{about}")
            progress.update(task, completed=done, total=total, description=said)

        yield update


@contextmanager
def counted(title: str) -> Iterator[Callable[[int], None]]:
    """Shows a bar without a known end, told the samples done since the last call."""
    with bar() as progress:
        task = progress.add_task(clean(title), total=None)
        yield lambda samples: progress.advance(task, samples)
