"""One decoder of images for building, indexing, checking, asking, training and published models:
encoded bytes -> the picture people see.

Raises what Pillow raises for damage (nearly anything, mostly OSError): each caller says it in its
own words.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from importlib.util import find_spec

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError, features

# Pillow's plugins for these are its own code; others start programs (EPS: ghostscript). AVIF came
# with Pillow 11.3, and Pillow fails at the name of a format that it does not know.
FORMATS = (
    *("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"),
    *(["AVIF"] if find_spec("PIL.AvifImagePlugin") else []),
)
# How files of one container begin, from their fifth byte on, that this Pillow may not read.
_CONTAINERS = {
    b"ftypavi": "AVIF, which this Pillow does not read: install pillow 11.3 or later",
    b"ftyphe": "HEIC, which is not read here: save it as JPEG",
    b"ftypmif1": "HEIC or AVIF, which this Pillow does not read: save it as JPEG",
}
# The ends of their files' names.
EXTENSIONS = (
    *("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "jfif", "jpe"),
    *("avif", "jp2", "j2k", "ppm", "pgm", "pbm", "pnm"),
)
SUFFIXES = tuple(f".{extension}" for extension in EXTENSIONS)
_ORIENTATION = 0x0112
_PHOTOMETRIC = 262  # of TIFF; 0: the least value is white
# simplejpeg brings libjpeg-turbo, as Pillow's own wheels do: the same code gives the same pixels. A
# Pillow that was built over another library gives others.
_LIKE_PILLOW = bool(features.check_feature("libjpeg_turbo"))
# Where a grey of more than 8 bits may end: white is the first that no pixel is above.
_ENDS = {"I": (255.0, 65535.0, 2.0**32 - 1), "F": (1.0, 255.0, 65535.0)}


def upright(
    data: bytes, check_size: Callable[[int, int], None] = lambda width, height: None
) -> tuple[Image.Image, str, list[str]]:
    """Returns the first frame as a viewer turns it, with 8 bits a colour, its format, and what that
    took.

    `check_size(width, height)` is called before any pixel is decoded, and may raise.
    """
    with _opened(data) as opened:
        check_size(opened.width, opened.height)
        form = opened.format or ""
        # The further pictures of an MPO file (phones) are no animation.
        animated = form != "MPO" and getattr(opened, "is_animated", False)
        pixels = jpeg_pixels(data, opened)
        image: Image.Image = opened
        if pixels is not None:
            image = Image.fromarray(pixels)
            image.info = opened.info
        else:
            opened.load()  # the whole file: a truncated one is found here
    changed = ["animated"] if animated else []
    if _orientation(image) > 1:
        image = ImageOps.exif_transpose(image)
        changed.append("EXIF rotation")
    if image.mode.startswith(("I", "F")):
        changed.append({"I": "32-bit", "F": "float"}.get(image.mode, "16-bit"))
        is_inverted = getattr(opened, "tag_v2", {}).get(_PHOTOMETRIC) == 0
        # Pillow brings a PGM of more than 8 bits to 16, and calls that I.
        ends = _ENDS.get("I;16" if form == "PPM" and image.mode == "I" else image.mode, (65535.0,))
        image = _eight_bits(image, ends, is_inverted)
    return image, form, changed


def rgb_pixels(
    data: bytes,
    check_size: Callable[[int, int], None] = lambda width, height: None,
    least_side: int | None = None,
) -> np.ndarray:
    """Returns uint8 pixels_HW3 of `on_white(upright(...))`: those of a JPEG by a shorter way.

    `least_side`: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, as far as its short side
    keeps so many pixels: these are other pixels than those of a picture made smaller.
    """
    with _opened(data) as opened:
        check_size(opened.width, opened.height)
        pixels = jpeg_pixels(data, opened, least_side) if opened.mode == "RGB" else None
    return np.array(on_white(upright(data)[0])) if pixels is None else pixels


def jpeg_pixels(
    data: bytes, opened: Image.Image, least_side: int | None = None
) -> np.ndarray | None:
    """Returns Pillow's own pixels of a JPEG, uint8 (H, W, 3) or (H, W), in less time than Pillow.

    `opened`: what Pillow reads in its header. None: Pillow is to decode it, or to say why it cannot
    be: it is no JPEG, is CMYK or lies on its side, or one byte in it is not as it should be.
    """
    if not _LIKE_PILLOW or opened.format not in ("JPEG", "MPO") or _orientation(opened) > 1:
        return None
    if opened.mode not in ("RGB", "L"):
        return None
    try:
        size = simplejpeg.decode_jpeg_header(data)[1::-1]
        if size != opened.size:  # which was checked
            return None
        scale = _scale(min(size), least_side)
        least = {"min_width": -(-size[0] // scale), "min_height": -(-size[1] // scale)}
        colours = "RGB" if opened.mode == "RGB" else "GRAY"
        pixels = simplejpeg.decode_jpeg(data, colours, **least if scale > 1 else {})
    except ValueError:
        return None
    return pixels if opened.mode == "RGB" else pixels[..., 0]


def _scale(side: int, least_side: int | None) -> int:
    return next((by for by in (8, 4, 2) if least_side and side >= by * least_side), 1)


def is_image_name(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _opened(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        for beginning, name in _CONTAINERS.items():
            if data[4:12].startswith(beginning):
                raise UnidentifiedImageError(f"it is an image of the form {name}") from None
        raise


def _eight_bits(
    image: Image.Image, possible_ends: tuple[float, ...], is_inverted: bool
) -> Image.Image:
    """Returns a grey of 16 or 32 bits or of floats in 8 bits, which Pillow would cut off at 255.

    16 bits: 65535 is white, as PNG and TIFF define it and every viewer shows it, so that pictures
    of one camera keep their brightness to each other. Of 32 bits and floats no format says what is
    white, and viewers go by custom: floats end at 1, else values end where 8, 16 or 32 bits do.
    Where a value is below 0 or above all of these, the picture is a measurement, which viewers
    show from its least to its greatest value. A float that is no number is black. Raises
    ValueError where none is one.
    """
    grey = np.asarray(image).astype(np.float64)
    known = np.isfinite(grey)
    if not known.any():
        raise ValueError("no pixel is a number")
    least = grey[known].min()
    most = grey[known].max()
    ends = [end for end in possible_ends if most <= end]
    black, white = (0.0, ends[0]) if least >= 0 and ends else (least, most)
    transparent = grey == image.info.get("transparency", np.nan)
    share = np.where(known, (grey - black) / max(white - black, np.finfo(float).tiny), 0.0)
    eight = np.clip(256 * (1.0 - share if is_inverted else share), 0, 255)
    return Image.fromarray(np.where(transparent, 255, eight).astype(np.uint8))


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
