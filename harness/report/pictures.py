"""The one maker of HTML, Markdown tables and pictures: what a run shows of itself to people.

In: rows, curves, or `Shown` (an image with what was asked, expected and said). Out: text, or a
file, written whole.
"""

from __future__ import annotations

import base64
import html
import io
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from shards.files import write_whole

RIGHT, WRONG, INK, FAINT = "#1a7f37", "#c62828", "#1f2328", "#6e7781"


@dataclass(frozen=True)
class Shown:
    """One prediction to be looked at. `right` is None where there is no right or wrong (captions)."""

    image: bytes | Image.Image | None  # encoded file, or decoded; None: nothing to show
    prompt: str
    references: tuple[str, ...]
    prediction: str
    right: bool | None = None
    note: str = ""  # e.g. what the model says without the image

    @property
    def expected(self) -> str:
        """The distinct references, the most frequent first."""
        return " / ".join(text for text, _ in Counter(self.references).most_common())

    @property
    def said(self) -> str:
        return self.prediction.strip() or "(empty)"


def thumbnail(image: bytes | Image.Image | None, side: int) -> Image.Image:
    """The whole image, in RGB, its longer edge `side` pixels; a grey square where it is missing."""
    if image is None:
        return Image.new("RGB", (side, side), "#d0d7de")
    picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    picture = picture.convert("RGB")
    scale = side / max(picture.size)
    return picture.resize(
        [max(1, round(edge * scale)) for edge in picture.size], Image.Resampling.LANCZOS
    )


def _cell(value: Any) -> str:
    if isinstance(value, float):
        value = f"{value:.4g}"
    return " ".join(str(value).split())


def markdown_table(rows: Sequence[Sequence[Any]], headers: Sequence[str]) -> str:
    """A GitHub table; columns in which every value is a number are right-aligned."""
    numeric = [
        bool(rows) and all(isinstance(row[column], int | float) for row in rows)
        for column in range(len(headers))
    ]
    cells = [[_cell(value).replace("|", "\\|") for value in row] for row in [headers, *rows]]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(headers))]
    lines = [
        "| "
        + " | ".join(
            c.rjust(w) if n else c.ljust(w) for c, w, n in zip(row, widths, numeric, strict=True)
        )
        + " |"
        for row in cells
    ]
    rule = (
        "|"
        + "|".join(
            "-" * (w + 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)
        )
        + "|"
    )
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"


def _font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which ships with matplotlib: the same picture on every machine, accents
    included.
    """
    from matplotlib import get_data_path

    return ImageFont.truetype(
        Path(get_data_path(), "fonts/ttf", f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size
    )


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int, most: int) -> list[str]:
    """`text` broken at words (or inside a word too long for a line) to `width` pixels, at most
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


def predictions_picture(
    items: Sequence[Shown], path: Path, *, columns: int = 4, side: int = 240
) -> Path:
    """A PNG grid, one card per item: image, prompt, what was expected and what was said (green
    right, red wrong).

    All items are drawn; a dozen is what fits a page. `side` is the edge of an image in pixels.
    """
    plain, bold, pad, line = _font(15), _font(15, bold=True), 14, 21
    cards = []
    for item in items:
        colour = {True: RIGHT, False: WRONG, None: INK}[item.right]
        mark = {True: "✓ ", False: "✗ ", None: ""}[item.right]
        rows = [(text, plain, INK) for text in _lines(item.prompt, plain, side, 3)]
        if item.expected:
            rows += [
                (text, plain, FAINT) for text in _lines(f"truth: {item.expected}", plain, side, 3)
            ]
        rows += [(text, bold, colour) for text in _lines(f"{mark}{item.said}", bold, side, 4)]
        rows += [(text, plain, FAINT) for text in _lines(item.note, plain, side, 2)]
        cards.append((thumbnail(item.image, side), rows))
    columns = max(1, min(columns, len(cards)))
    lots = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    heights = [max(3 * pad + side + line * len(rows) for _, rows in lot) for lot in lots]
    wide = side + 2 * pad
    sheet = Image.new(
        "RGB", (pad + columns * (wide + pad), pad + sum(h + pad for h in heights)), "#f6f8fa"
    )
    draw = ImageDraw.Draw(sheet)
    top = pad
    for lot, height in zip(lots, heights, strict=True):
        for column, (picture, rows) in enumerate(lot):
            left = pad + column * (wide + pad)
            draw.rounded_rectangle(
                (left, top, left + wide, top + height), 8, fill="white", outline="#d0d7de"
            )
            sheet.paste(
                picture,
                (left + (wide - picture.width) // 2, top + pad + (side - picture.height) // 2),
            )
            for row, (text, font, colour) in enumerate(rows):
                draw.text(
                    (left + pad, top + 2 * pad + side + row * line), text, font=font, fill=colour
                )
        top += height + pad
    encoded = io.BytesIO()
    sheet.save(encoded, "PNG", optimize=True)
    write_whole(path, encoded.getvalue())
    return path


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2328; margin: 24px; }
table { border-collapse: collapse; } th, td { padding: 8px 14px; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #d0d7de; } td { border-bottom: 1px solid #d0d7de; max-width: 28em; }
img { display: block; border-radius: 4px; } .right { color: #1a7f37; font-weight: 600; }
.wrong { color: #c62828; font-weight: 600; } .open { font-weight: 600; } .faint { color: #6e7781; }
"""


def predictions_html(
    items: Sequence[Shown], path: Path, *, title: str = "Predictions", side: int = 160
) -> Path:
    """A page that needs nothing beside it: one row per item, thumbnails as data URIs, everything
    escaped.
    """
    rows = []
    for item in items:
        encoded = io.BytesIO()
        picture = thumbnail(item.image, side)
        picture.save(encoded, "JPEG", quality=85)
        data = base64.b64encode(encoded.getvalue()).decode()
        kind, mark = {True: ("right", "✓ "), False: ("wrong", "✗ "), None: ("open", "")}[item.right]
        references = "<br>".join(html.escape(text) for text in item.expected.split(" / "))
        rows.append(
            f'<tr><td><img width="{picture.width}" height="{picture.height}" alt="" '
            f'src="data:image/jpeg;base64,{data}"></td>'
            f'<td>{html.escape(item.prompt)}</td><td class="faint">{references}</td>'
            f'<td class="{kind}">{mark}{html.escape(item.said)}</td>'
            f'<td class="faint">{html.escape(item.note)}</td></tr>'
        )
    judged = [item.right for item in items if item.right is not None]
    count = f"{sum(judged)} of {len(judged)} right" if judged else f"{len(items)} images"
    page = textwrap.dedent("""\
        <!doctype html>
        <html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{style}</style></head><body>
        <h1>{title}</h1><p>{count}</p>
        <table><thead><tr><th>image</th><th>prompt</th><th>truth</th><th>prediction</th><th>note</th></tr></thead><tbody>
        {rows}
        </tbody></table></body></html>
        """).format(title=html.escape(title), style=_STYLE, count=count, rows="\n".join(rows))
    write_whole(path, page.encode())
    return path


def loss_curves(
    series: Mapping[str, Sequence[tuple[float, float]]],
    path: Path,
    *,
    x: str = "step",
    y: str = "loss (nats per token)",
) -> Path:
    """A PNG of named curves of (x, y) points; points that are not finite are gaps."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no window system

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for name, points in series.items():
        marker = "o" if len(points) < 20 else None
        axes.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            label=name,
            marker=marker,
            markersize=4,
            linewidth=1.6,
        )
    axes.set(xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if series:
        axes.legend(frameon=False)
    encoded = io.BytesIO()
    figure.savefig(encoded, format="png", dpi=130)
    write_whole(path, encoded.getvalue())
    return path
