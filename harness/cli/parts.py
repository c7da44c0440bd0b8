"""What several verbs take: a trained model, where its frozen parts are if they are not found, and
what it is asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Trained = Annotated[
    str,
    typer.Argument(metavar="RUN|MODEL", help="A run, a checkpoint, a saved model, OWNER/NAME."),
]
Run = Annotated[Path, typer.Argument(help="The folder of a run, or one checkpoint.")]
Which = Annotated[str | None, typer.Option(metavar="newest|best|STEP", help="Of the run's.")]
Image = Annotated[Path, typer.Option(help="The picture.")]
Prompt = Annotated[
    str | None, typer.Option(help="A question; without it the picture is described.")
]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Base = Annotated[
    Path | None,
    typer.Option("--lm", metavar="PATH", help="Where the base language model is, if it was moved."),
]
Encoder = Annotated[
    Path | None, typer.Option("--vision", metavar="PATH", help="The same of the image encoder.")
]
