"""`harness init`: five questions -> a config of one's own, with the reason for each size.

Options answer them beforehand; the rest is asked on a terminal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import typer

from harness.redact import clean, say

Task = Annotated[
    Literal["captions", "questions"] | None, typer.Option(help="What the pictures have.")
]
Data = Annotated[
    str | None, typer.Option(metavar="DIR", help="What `harness shards build` or `index` made.")
]
Gpu = Annotated[str | None, typer.Option("--device", help="here, cpu, t4, l4, a100-40, h100, ...")]
Models = Annotated[
    str | None,
    typer.Option("--lm", metavar="ID|FOLDER|toy", help="A T5 or any decoder; toy: no download."),
]
Encoder = Annotated[
    str | None,
    typer.Option(
        "--vision",
        metavar="ID|FOLDER|efficientnet_lite2",
        help="A CLIP, SigLIP, DINOv2 or EfficientNet; never asked.",
    ),
]
File = Annotated[Path | None, typer.Option(metavar="FILE.yaml", help="The config to write.")]


def init(
    task: Task = None,
    data: Data = None,
    device: Gpu = None,
    lm: Models = None,
    vision: Encoder = None,
    out: File = None,
) -> None:
    """A config for your own data: five questions, or their options.

    It passes harness doctor; each line says why it is so.
    """
    options = ("--task", "--data", "--device", "--lm", "--out")
    given = (task, data, device, lm, out)
    missing = [name for name, value in zip(options, given, strict=True) if value is None]
    if missing and not sys.stdin.isatty():
        from harness.errors import ConfigError

        raise ConfigError(f"there is no terminal to ask on: give {', '.join(missing)} too")

    from harness.machine.devices import device as known_device
    from harness.own_data.first_config import CLIP, Answers, default_lm, look, task_of
    from harness.own_data.first_config import write_first_config as write

    kind = task or _asked("Have the pictures captions or questions?", "captions", task_of)
    place = data or _asked("Which data? A folder of shards", "data/mine", _checked(look))
    name = device or _asked("Which GPU? here, cpu, t4, ...", "here", _checked(known_device))
    default = default_lm(known_device(name))
    model = lm or _asked("Which language model? An id of the hub, a folder, or toy", default)
    file = out or Path(_asked("Where to? The config's file", "mine.yaml"))
    say("\n".join(write(Answers(task_of(kind), place, name, model, file, vision or CLIP))))


def _asked(question: str, default: str, check: Callable[[str], str] = str) -> str:
    """Asks on the terminal until the answer passes `check`, which raises what a user is told."""
    from harness.errors import explain

    while True:
        say(f"{question} [{default}]", sys.stderr)
        line = sys.stdin.readline()
        if not line:
            raise typer.Exit(1)
        try:
            return check(line.strip() or default)
        except Exception as error:
            sentence = explain(error)
            if sentence is None:
                raise
            say(f"  {clean(sentence)}", sys.stderr)


def _checked(look: Callable[[str], object]) -> Callable[[str], str]:
    """Returns a check that gives the answer back when `look` does not raise."""

    def check(answer: str) -> str:
        look(answer)
        return answer

    return check
