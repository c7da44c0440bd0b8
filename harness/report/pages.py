"""The one maker of HTML: pages that need nothing beside them, readable in dark and in light.

In: what a template of templates/ names. Out: a file, written whole, all text in it escaped and
every picture a data URI.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from harness.report.pictures import Shown, thumbnail
from shards.files import write_whole


def data_uri(data: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def jpeg_uri(image: Image.Image, quality: int) -> str:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=quality)
    return data_uri(encoded.getvalue(), "jpeg")


def embedded(image: bytes | Image.Image | None, side: int, quality: int) -> dict[str, Any]:
    """Returns the thumbnail of an image as a JPEG data URI, with its size; a grey square for one
    that is missing or damaged.
    """
    try:
        small = thumbnail(image, side)
    except OSError:  # damaged: whoever read it for the model has named it
        small = thumbnail(None, side)
    return {"uri": jpeg_uri(small, quality), "width": small.width, "height": small.height}


_TEMPLATES = Environment(
    loader=PackageLoader("harness.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.globals |= {"data_uri": data_uri, "embedded": embedded}


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Writes a template filled with `values`; a value that it lacks is an error."""
    write_whole(path, _TEMPLATES.get_template(template).render(values).encode())
    return path


def predictions_html(
    items: Sequence[Shown], path: Path, *, title: str = "Predictions", side: int = 160
) -> Path:
    """Writes a page with a row for each item: image, prompt, truth, prediction and note."""
    judged = [item.right for item in items if item.right is not None]
    count = f"{sum(judged)} of {len(judged)} right" if judged else f"{len(items)} images"
    if gone := sum(item.image is None for item in items):
        count += f"; {gone} of the pictures are not at hand: they, or the set they lay in, are gone"
    rows = [[item] for item in items]
    return write_page(path, "answers.html", title=title, count=count, rows=rows, side=side)
