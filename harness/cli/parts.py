"""Options that tell where the frozen parts of a saved model are, if they are not found."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Base = Annotated[
    Path | None,
    typer.Option("--lm", metavar="PATH", help="Where the base language model is, if it was moved."),
]
Encoder = Annotated[
    Path | None, typer.Option("--vision", metavar="PATH", help="The same of the image encoder.")
]
