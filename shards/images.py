"""One decoder of images for building, checking, asking and training: encoded bytes -> the picture
people see.

Raises what Pillow raises for damage (nearly anything, mostly OSError): each caller says it in its
own words.
"""

from __future__ import annotations

import io
from collections.abc import Callable

from PIL import Image, ImageOps

# Pillow's plugins for these are its own code; others start programs (EPS: ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ORIENTATION = 0x0112


def upright(
    data: bytes, check_size: Callable[[int, int], None] = lambda width, height: None
) -> tuple[Image.Image, str, list[str]]:
    """Returns the first frame as a viewer turns it, its format, and what that took.

    `check_size(width, height)` is called before any pixel is decoded, and may raise.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
        check_size(opened.width, opened.height)
        form = opened.format or ""
        # The further pictures of an MPO file (phones) are no animation.
        animated = form != "MPO" and getattr(opened, "is_animated", False)
        opened.load()  # the whole file: a truncated one is found here
        image: Image.Image = opened
    changed = ["animated"] if animated else []
    if _orientation(image) > 1:
        image = ImageOps.exif_transpose(image)
        changed.append("EXIF rotation")
    return image, form, changed


def on_white(image: Image.Image) -> Image.Image:
    """Returns it as RGB; what is transparent becomes white."""
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, TypeError, KeyError):
        return 1  # broken EXIF in a good picture: every viewer shows it unrotated
    return value if value in range(1, 9) else 1
