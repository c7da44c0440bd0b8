"""`harness export`: a trained model as a folder for transformers, peft and the hub."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.parts import Run, Which
from harness.redact import say


def export(
    run: Run,
    out: Annotated[Path, typer.Argument(help="A new folder, or an earlier export.")],
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold LoRA into the base, in full precision.")
    ] = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Write it to the hub too, private.")
    ] = None,
    public: Annotated[bool, typer.Option("--public", help="The repository, for all.")] = False,
    with_pictures: Annotated[
        bool, typer.Option("--with-pictures", help="Show pictures of the dev set in the card.")
    ] = False,
    checkpoint: Which = None,
) -> None:
    """A trained model for transformers, peft and the hub.

    A fresh process loads what was written and compares it with the run.
    Exit code 1 where it is not the same: then nothing is published.
    """
    from harness.checks import check_run
    from harness.errors import ConfigError

    check_run(run)
    if public and not push_to_hub:
        raise ConfigError("--public says nothing without --push-to-hub OWNER/NAME")
    from harness.export import export as room
    from harness.export.proof import UnprovenError

    wanted = room.Wanted(merge, push_to_hub, public, with_pictures)
    try:
        done = room.export(run, out, wanted, which=checkpoint)
    except UnprovenError as error:
        say(f"harness: {error}", sys.stderr)
        raise typer.Exit(1) from error
    say(done.url or f"{done.out}: pipeline('image-text-to-text', model='{done.out}')")
