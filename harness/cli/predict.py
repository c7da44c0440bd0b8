"""`harness predict`: a trained model's answers to pictures that nobody labelled.

Arguments -> a file of answers, and a line on stdout that says what is in it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from harness.cli.parts import Base, Encoder, Trained, Which
from harness.cli.progress import told
from harness.redact import say

if TYPE_CHECKING:
    from harness.predict.predict import Predicted


def predict(
    model: Trained,
    images: Annotated[
        str, typer.Option(metavar="DIR", help="A folder of pictures, or a set of shards.")
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help="FILE.jsonl, or FILE.json as EvalAI takes it."),
    ],
    prompt: Annotated[
        str | None,
        typer.Option(help="A question for all. Without: a set's own, or a description."),
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Pictures at a time.")] = None,
    checkpoint: Which = None,
    override: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="For instance generate.vqa.beams=5."),
    ] = None,
    lm: Base = None,
    vision: Encoder = None,
) -> None:
    """Answers for pictures that nobody labelled, in a file.

    Run again it goes on where FILE stopped. A picture that cannot be read is named in it.
    """
    from harness.checks import check_model
    from harness.predict.pictures import check_place

    check_model(model)
    check_place(images)
    from harness.predict.predict import predict

    with told("answering") as progress:
        done = predict(
            model,
            images,
            out,
            prompt=prompt,
            batch_images=batch_size,
            overrides=override or (),
            checkpoint=checkpoint,
            lm=lm,
            vision=vision,
            progress=progress,
        )
    _tell(done, out)


def _tell(done: Predicted, out: Path) -> None:
    from harness.evaluate.official import named

    if done.passed_over:
        others = named(list(done.passed_over))
        told = f"{len(done.passed_over):,} left alone, no pictures by their names: {others}"
        say(f"harness: {told}", sys.stderr)
    if done.damaged:
        why = f"named with the reason in {done.lines.path} and tried again by the next run"
        say(f"harness: {done.damaged:,} cannot be read, {why}", sys.stderr)
    before = f", {done.lines.before:,} were there" if done.lines.before else ""
    say(f"{done.lines.path}: {done.lines.written['answer']:,} answers{before}")
    if done.results is not None:
        say(f"{out}: {done.results:,} entries, as EvalAI takes them")
