"""Charts as SVG inside a page: their colours are the page's, in dark and in light.

Series of points -> an SVG whose text stays readable on a telephone (it is drawn 360 wide).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from markupsafe import Markup

Points = Sequence[tuple[float, float]]
WIDTH = 360
HEIGHT = 200
LEFT = 46  # margins
RIGHT = 22
TOP = 30
BOTTOM = 34
ROW = 16  # of a legend
MOST_POINTS = 300  # of a line; more of them are means of neighbours
FEW = 20  # points that are also drawn as dots
_SERIES = 4  # colours of the page


def line_chart(title: str, series: Mapping[str, Points], *, x: str = "step") -> Markup:
    """Returns an SVG of named lines under a title; what is not finite is left out."""
    lines = {name: thinned(_finite(points)) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    everything = [point for points in lines.values() for point in points]
    if not everything:
        return Markup("")
    xs = _ticks([point[0] for point in everything])
    ys = _ticks([point[1] for point in everything])
    names = _names(list(lines)) if len(lines) > 1 else []
    top = TOP + ROW * len(names)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - xs[0]) / ((xs[-1] - xs[0]) or 1)
        up = (point[1] - ys[0]) / ((ys[-1] - ys[0]) or 1)
        return (
            LEFT + across * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - up * (HEIGHT - top - BOTTOM),
        )

    parts = [_text(LEFT, 16, title, "title")]
    for tick in ys:
        level = place((xs[0], tick))[1]
        parts.append(_line("grid", LEFT, level, WIDTH - RIGHT, level))
        parts.append(_text(LEFT - 6, level + 4, number(tick), "tick end"))
    for tick in xs:
        parts.append(
            _text(place((tick, ys[0]))[0], HEIGHT - BOTTOM + 16, number(tick), "tick middle")
        )
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 4, x, "tick end"))
    for index, points in enumerate(lines.values()):
        parts.append(_curve([place(point) for point in points], index % _SERIES))
    parts += [text for row in names for text in row]
    told = "; ".join(_told(name, points, x) for name, points in lines.items())
    label = Markup.escape(f"{title}: {told}")
    body = Markup("").join(parts)
    return Markup(
        f'<svg class="chart" role="img" aria-label="{label}" viewBox="0 0 {WIDTH} {HEIGHT}">'
        f"{body}</svg>"
    )


def thinned(points: Points) -> list[tuple[float, float]]:
    """Returns at most `MOST_POINTS` points, each the mean of as many neighbours."""
    size = math.ceil(len(points) / MOST_POINTS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [
        (sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)) for part in parts
    ]


def number(value: float) -> str:
    """Returns a figure as people write it at an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _finite(points: Points) -> list[tuple[float, float]]:
    return [point for point in points if all(map(math.isfinite, point))]


def _ticks(values: Sequence[float]) -> list[float]:
    """Returns round numbers around the values, from 0 on where none is below."""
    low = min(0.0, *values)
    high = max(values)
    if high == low:
        high = low + (abs(low) or 1.0)
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step *= next(times for times in (1, 2, 5, 10) if (high - low) / (step * times) <= 5)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def _names(names: Sequence[str]) -> list[list[Markup]]:
    """Returns the rows of the legend under the title, from left to right."""
    rows: list[list[Markup]] = [[]]
    left = float(LEFT)
    for index, name in enumerate(names):
        width = 6.4 * len(name) + 14
        if rows[-1] and left + width > WIDTH:
            rows.append([])
            left = LEFT
        rows[-1].append(_text(left, 16 + ROW * len(rows), name, f"tick ink{index % _SERIES}"))
        left += width
    return rows


def _curve(points: Points, colour: int) -> Markup:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dots = "".join(
        f'<circle class="dot{colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in points
    )
    return Markup(
        f'<polyline class="line{colour}" points="{path}"/>{dots if len(points) < FEW else ""}'
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup(f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>')


def _text(x: float, y: float, text: str, kind: str) -> Markup:
    return Markup(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{Markup.escape(text)}</text>')


def _told(name: str, points: Points, x: str) -> str:
    first = points[0]
    last = points[-1]
    return (
        f"{name} from {number(first[1])} at {x} {number(first[0])} "
        f"to {number(last[1])} at {number(last[0])}"
    )
