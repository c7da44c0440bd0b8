"""The one maker of pictures and Markdown tables: what a run shows of itself to people.

In: rows, curves, or `Shown` (an image with what was asked, expected and said). Out: text, or a
PNG file, written whole.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from shards.files import write_whole
from shards.images import on_white, upright

# colours
RIGHT = "#1a7f37"
WRONG = "#c62828"
INK = "#1f2328"
FAINT = "#6e7781"
# pixels of a card: round its frame, and from one line of text to the next
PAD = 14
LINE = 21


@dataclass(frozen=True)
class Shown:
    """One prediction to be looked at; `right` is None where none is right or wrong (captions)."""

    image: bytes | Image.Image | None  # encoded file, or decoded; None: nothing to show
    prompt: str
    references: tuple[str, ...]
    prediction: str
    right: bool | None = None
    note: str = ""  # e.g. what the model says without the image

    @property
    def truths(self) -> list[str]:
        """The distinct references, the most frequent first."""
        return [text for text, _ in Counter(self.references).most_common()]

    @property
    def expected(self) -> str:
        return " / ".join(self.truths)

    @property
    def mark(self) -> str:
        return {True: "✓ ", False: "✗ ", None: ""}[self.right]

    @property
    def said(self) -> str:
        return self.prediction.strip() or "(empty)"


def thumbnail(image: bytes | Image.Image | None, side: int) -> Image.Image:
    """Returns the whole image, in RGB, its longer edge `side` pixels; a grey square for None."""
    if image is None:
        return Image.new("RGB", (side, side), "#d0d7de")
    picture = on_white(upright(image)[0] if isinstance(image, bytes) else image)
    scale = side / max(picture.size)
    return picture.resize(
        [max(1, round(edge * scale)) for edge in picture.size], Image.Resampling.LANCZOS
    )


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def markdown_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """Returns a GitHub table; columns in which every value is a number are right-aligned."""
    columns = []
    for header, *values in zip(headers, *rows, strict=True):
        numeric = bool(values) and all(isinstance(value, int | float) for value in values)
        cells = [_cell(value) for value in (header, *values)]
        width = max(3, *map(len, cells))
        padded = [f" {cell:{'>' if numeric else '<'}{width}} " for cell in cells]
        rule = "-" * (width + 1) + (":" if numeric else "-")
        columns.append([padded[0], rule, *padded[1:]])
    return "".join(f"|{'|'.join(line)}|\n" for line in zip(*columns, strict=True))


def font_of(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns DejaVu Sans, which ships with matplotlib: the same picture on every machine, accents
    included.
    """
    from matplotlib import get_data_path

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(Path(get_data_path(), "fonts/ttf", name), size)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """Breaks a text at words (or inside a word too long for a line) to `width` pixels and at most
    `most` lines.
    """
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(joined) <= width:
            lines[-1] = joined
            continue
        while font.getlength(word) > width:
            cut = next(
                n
                for n in range(len(word) - 1, 0, -1)
                if n == 1 or font.getlength(word[:n]) <= width
            )
            lines.append(word[:cut])
            word = word[cut:]
        lines.append(word)
    if len(lines) > most:
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], last.rstrip() + "…"]
    return lines


def _card(item: Shown, side: int) -> Image.Image:
    """Draws one prediction: the image in a square, and under it the lines of text."""
    plain = font_of(15)
    bold = font_of(15, bold=True)
    colour = {True: RIGHT, False: WRONG, None: INK}[item.right]
    truth = f"truth: {item.expected}" if item.expected else ""
    texts = (
        (item.prompt, plain, INK, 3),
        (truth, plain, FAINT, 3),
        (item.mark + item.said, bold, colour, 4),
        (item.note, plain, FAINT, 2),
    )
    rows = [
        (line, font, ink)
        for text, font, ink, most in texts
        for line in wrapped(text, font, side, most)
    ]
    card = Image.new("RGB", (side, side + PAD + LINE * len(rows)), "white")
    picture = thumbnail(item.image, side)
    card.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    draw = ImageDraw.Draw(card)
    for number, (line, font, ink) in enumerate(rows):
        draw.text((0, side + PAD + number * LINE), line, font=font, fill=ink)
    return card


def predictions_picture(
    items: Sequence[Shown], path: Path, *, columns: int = 4, side: int = 240
) -> Path:
    """Draws a PNG grid, one card per item: image, prompt, what was expected and what was said
    (green right, red wrong).

    All items are drawn; a dozen is what fits a page. `side` is the edge of an image in pixels.
    """
    cards = [_card(item, side) for item in items]
    columns = max(1, min(columns, len(cards)))
    lots = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    heights = [max(card.height for card in lot) + 2 * PAD for lot in lots]
    width = side + 2 * PAD
    size = (PAD + columns * (width + PAD), PAD + sum(height + PAD for height in heights))
    sheet = Image.new("RGB", size, "#f6f8fa")
    draw = ImageDraw.Draw(sheet)
    top = PAD
    for lot, height in zip(lots, heights, strict=True):
        for column, card in enumerate(lot):
            left = PAD + column * (width + PAD)
            frame = (left, top, left + width, top + height)
            draw.rounded_rectangle(frame, 8, fill="white", outline="#d0d7de")
            sheet.paste(card, (left + PAD, top + PAD))
        top += height + PAD
    return write_png(sheet, path)


def write_png(picture: Image.Image, path: Path) -> Path:
    encoded = io.BytesIO()
    picture.save(encoded, "PNG", optimize=True)
    write_whole(path, encoded.getvalue())
    return path


def loss_curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    x: str = "step",
    y: str = "loss (nats per token)",
) -> Path:
    """Draws a PNG of named curves of (x, y) points; points that are not finite are gaps."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, points in series.items():
        xs = [point[0] for point in points]
        ys = [point[1] for point in points]
        marker = "o" if len(points) < 20 else None
        axes.plot(xs, ys, label=name, marker=marker, markersize=4, linewidth=1.6)
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if series:
        axes.legend(frameon=False)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=130)
    write_whole(path, encoded.getvalue())
    return path
