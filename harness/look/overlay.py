"""A heat map over its picture, and a whole PNG of it with legend, question and answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from harness.look.occlusion import Look
from harness.report.pictures import (
    FAINT,
    INK,
    LINE,
    PAD,
    Shown,
    font_of,
    thumbnail,
    wrapped,
    write_png,
)

COSTS = (230, 80, 0)  # colour of what the answer loses by
HELPS = (30, 100, 230)  # of what it gains by
FAINTEST = 0.25  # nats a token for a patch: e^-0.25 is a likelihood that falls by a fifth
DEEPEST = 0.85  # opacity of the hottest cell
SIDE = 448  # pixels


def overlay(pixels_HW3: np.ndarray | None, look: Look, side: int) -> Image.Image:
    """Returns the picture, pale and grey, under its heat; the hottest cell is `DEEPEST` opaque.
    None: a picture that is gone is white.
    """
    base = Image.new("RGB", (side, side), "white")
    if pixels_HW3 is not None:
        picture = Image.fromarray(pixels_HW3).resize((side, side), Image.Resampling.LANCZOS)
        pale = Image.blend(picture.convert("L").convert("RGB"), picture, 0.35)
        base = Image.blend(pale, base, 0.25)
    heat = look.heat_GG / scale(look)
    smooth = Image.fromarray(heat.astype(np.float32)).resize(
        (side, side), Image.Resampling.BILINEAR
    )
    return _coloured(base, np.clip(np.asarray(smooth), -1, 1))


def _coloured(base: Image.Image, heat_HW: np.ndarray) -> Image.Image:
    """Returns the picture under heat in [-1, 1]."""
    heat_HW1 = heat_HW[:, :, None]
    colour_HW3 = np.where(heat_HW1 > 0, np.array(COSTS), np.array(HELPS))
    opacity_HW1 = DEEPEST * np.abs(heat_HW1) ** 0.7
    mixed = np.asarray(base) * (1 - opacity_HW1) + colour_HW3 * opacity_HW1
    return Image.fromarray(mixed.round().astype(np.uint8))


def scale(look: Look) -> float:
    """Returns the heat of the strongest colour, in nats a token: the largest of the map, or what a
    cell of a patch of `FAINTEST` has, so that a map of next to nothing is pale.
    """
    cells = (len(look.heat_GG) // len(look.patch_NN)) ** 2
    return max(float(np.abs(look.heat_GG).max()), FAINTEST / cells)


def legend(look: Look, width: int) -> Image.Image:
    """Returns the bar of colours with what its ends stand for."""
    most = scale(look)
    plain = font_of(13)
    bar = Image.new("RGB", (width, 40), "white")
    heat_HW = np.tile(np.linspace(-1, 1, width), (14, 1))
    bar.paste(_coloured(Image.new("RGB", (width, 14), "white"), heat_HW))
    draw = ImageDraw.Draw(bar)
    draw.text((0, 18), f"-{most:.2g}", font=plain, fill=FAINT)
    middle = "nats a token that the answer loses without it"
    draw.text((width // 2, 18), middle, font=plain, fill=FAINT, anchor="ma")
    draw.text((width, 18), f"+{most:.2g}", font=plain, fill=FAINT, anchor="ra")
    return bar


def write_overlay(
    path: Path, shown: Shown, pixels_HW3: np.ndarray | None, look: Look, note: str
) -> Path:
    """Writes a PNG: the picture, the same under its heat, the legend, question, answer and note."""
    width = 2 * SIDE + PAD
    texts = (
        (shown.prompt or "(a caption)", font_of(17), INK),
        (shown.said, font_of(19, bold=True), INK),
        (note, font_of(14), FAINT),
    )
    rows = [
        (line, font, ink) for text, font, ink in texts for line in wrapped(text, font, width, 4)
    ]
    sheet = Image.new(
        "RGB", (width + 2 * PAD, SIDE + 56 + 3 * PAD + (LINE + 4) * len(rows)), "white"
    )
    gone = None if pixels_HW3 is None else Image.fromarray(pixels_HW3)
    sheet.paste(thumbnail(gone, SIDE), (PAD, PAD))
    sheet.paste(overlay(pixels_HW3, look, SIDE), (SIDE + 2 * PAD, PAD))
    sheet.paste(legend(look, SIDE), (SIDE + 2 * PAD, SIDE + 2 * PAD))
    draw = ImageDraw.Draw(sheet)
    for number, (line, font, ink) in enumerate(rows):
        top = SIDE + 56 + 2 * PAD + (LINE + 4) * number
        draw.text((PAD, top), line, font=font, fill=ink)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_png(sheet, path)
