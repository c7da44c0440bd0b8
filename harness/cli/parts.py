"""A trained model, and options that tell where its frozen parts are, if they are not found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Trained = Annotated[
    str,
    typer.Argument(metavar="RUN|MODEL", help="A run, a checkpoint, a saved model, OWNER/NAME."),
]
Base = Annotated[
    Path | None,
    typer.Option("--lm", metavar="PATH", help="Where the base language model is, if it was moved."),
]
Encoder = Annotated[
    Path | None, typer.Option("--vision", metavar="PATH", help="The same of the image encoder.")
]
