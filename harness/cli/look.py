"""`harness report` and `harness look`: a run's page, and where a model looked in one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from harness.cli.parts import Base, Encoder, Image, Prompt, Run, Trained, Which
from harness.cli.progress import told
from harness.redact import say, show


def report(
    run: Run,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Without: report.html in the run.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="The sets of another evaluation of the run.")
    ] = None,
    checkpoint: Which = None,
    maps: Annotated[
        int | None,
        typer.Option(min=0, help="Pictures with where it looked. Without: what a minute gives."),
    ] = None,
    lm: Base = None,
    vision: Encoder = None,
) -> None:
    """One page on an evaluated run: verdict, curves, scores, pictures, where it looked.

    Every evaluation makes it; this makes it anew.
    """
    from harness.checks import check_run

    check_run(run)
    from harness.evaluate.run_on_disk import report_run

    with told("looking") as progress:
        made = report_run(
            run, data, out, which=checkpoint, maps=maps, lm=lm, vision=vision, progress=progress
        )
    say(made)


def look(
    model: Trained,
    image: Image,
    prompt: Prompt = None,
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Without: IMAGE-look.png here.")
    ] = None,
    lm: Base = None,
    vision: Encoder = None,
) -> None:
    """Asks a model about one picture, and draws where it looked.

    By painting parts of the picture over: what the answer loses by that.
    """
    from harness.checks import check_model
    from harness.errors import ConfigError

    check_model(model)
    if not image.is_file():
        raise ConfigError(f"--image {image}: there is no such file")
    if out and out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: a PNG is written, give a name that ends in .png")
    from harness.look.picture import look_at

    looked = look_at(model, image, prompt, out, lm=lm, vision=vision)
    show(looked.answer)
    say(looked.overlay)
