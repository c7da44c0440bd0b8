"""The verdict in a run's last lines: was the image used, how sure is that, what would change it.

Figures of a set and task, as `ImageUse.to_dict` gives them -> lines of at most 80 columns.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from harness.evaluate.image_use.evidence import (
    EXCHANGE,
    MATCHED,
    NEIGHBOUR,
    NOT_JUDGED,
    RECALL,
    SHALLOW,
    TEXT_ONLY,
)
from harness.evaluate.measures import TASKS
from harness.report.pictures import markdown_table

# Terms in the order in which they are told.
TERMS = (EXCHANGE, MATCHED, TEXT_ONLY, SHALLOW, RECALL, NEIGHBOUR)
# What a term means beside its figure.
LABELS = {
    EXCHANGE: "points lost with another image",
    MATCHED: "points lost with the most alike other image",
    TEXT_ONLY: "points above the model without images",
    SHALLOW: "points above words, colours and sizes",
    RECALL: "points above chance in recall of captions",
    NEIGHBOUR: "points above its neighbours' captions",
}
FLOOR_LABELS = {
    SHALLOW: "words, colours and sizes alone (floor)",
    NEIGHBOUR: "captions of training pictures, CIDEr x 100 (floor)",
}
# The figures of terms that are told.
TERM_FIGURES = tuple(
    f"{name.replace(' ', '_')}_{figure}"
    for name in TERMS
    for figure in ("score", "advantage", "advantage_low", "advantage_high", "missing")
)
_WIDTH = 80


def verdict_lines(where: str, figures: Mapping[str, Any]) -> list[str]:
    """Returns the verdict, a line for each term with its interval, and what would change it."""
    sets = figures.get("sets")
    if sets:
        lines = [f"{where}: {figures['verdict']} (the worst of {len(sets)} sets decides)"]
        for name, own in sets.items():
            lines += verdict_lines(f"{where}, {name}", own)
        return lines + _wrapped(left_out(figures))
    lines = [f"{where}: {figures['verdict']}"]
    lines += [f"  {told}" for name in TERMS if (told := term_line(name, figures))]
    lines += _wrapped(left_out(figures))
    if figures.get("advice"):
        lines += _wrapped(f"what would change it: {figures['advice']}")
    elif figures.get("verdict") and figures["verdict"] != NOT_JUDGED and not recall_rows(figures):
        lines += _wrapped("what would change it: a lower bound that falls to its margin")
    return lines


def left_out(figures: Mapping[str, Any]) -> str:
    """Returns how many texts a verdict leaves out since they have no picture; "" for none."""
    count = figures.get("without_picture")
    return f"{count:,} texts without a picture are scored and not judged" if count else ""


def described(when: str, tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the verdicts on all tasks with their reasons and terms, as Markdown: what stands at
    the top of a run's page. `when`: "dev, step 100".
    """
    parts = []
    for task, figures in tasks.items():
        sets = figures.get("sets") or {"": figures}
        for name, own in sets.items():
            where = f"{task}, {name}" if name else task
            terms = "".join(f"- {told}\n" for term in TERMS if (told := term_line(term, own)))
            reason = own.get("reason") or ""
            parts.append(f"**{own.get('verdict')}** ({where}; {when}): {reason}\n\n{terms}")
        if told := left_out(figures):
            parts.append(f"{task}: {told}.\n")
    return "\n".join(parts)


def recall_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Returns the recalls of a retrieval as rows of a table: each with its interval and chance."""
    return [
        [
            key.removesuffix("_chance").replace("_", " ").replace(" R", ", R@"),
            f"{points(figures, key.removesuffix('_chance'))}% (chance {chance:.1f}%)",
        ]
        for key, chance in figures.items()
        if key.endswith("_chance")
    ]


def score_line(task: str, figures: Mapping[str, Any]) -> str:
    """Returns the score beside what it falls to with other images and with none, and the loss; of
    a retrieval its recalls beside chance.
    """
    if recalls := recall_rows(figures):
        return f"{task}: " + "; ".join(" ".join(row) for row in recalls if "R@5" not in row[0])
    measure = TASKS[task].measure
    points = 1 if measure == "accuracy" else 100  # a hundredth of CIDEr is a point
    words = [f"{task}: {measure} {_figure(figures.get(measure), measure)}"]
    for condition, told in (("shuffled", "with other images"), ("no_image", "with none")):
        value = figures.get(f"{condition}_{measure}")
        if value is not None:
            words.append(f"{told} {_figure(value / points, measure)}")
    return f"{', '.join(words)}; loss {_figure(figures.get('loss_nats'))}"


def _figure(value: float | None, measure: str = "") -> str:
    if value is None:
        return "unknown"
    return f"{value:.1f}%" if measure == "accuracy" else f"{value:.3f}"


def term_line(name: str, figures: Mapping[str, Any]) -> str:
    """Returns what a term showed; "" for one that the task does not have."""
    key = name.replace(" ", "_")
    if missing := figures.get(f"{key}_missing"):
        return textwrap.shorten(f"{name}: not measured: {missing}", _WIDTH - 2, placeholder="...")
    value = figures.get(f"{key}_advantage")
    if value is None:
        return ""
    return f"{points(figures, f'{key}_advantage')} {LABELS[name]}"


def points(figures: Mapping[str, Any], key: str) -> str:
    """Returns a figure of points with its bounds: "41.2 [38.0, 44.1]"."""
    return with_bounds(figures[key], figures.get(f"{key}_low"), figures.get(f"{key}_high"))


def with_bounds(value: Any, low: float | None, high: float | None, digits: int = 1) -> str:
    """Returns "41.2 [38.0, 44.1]"; a bound that is None is unknown."""
    words = ("unknown" if bound is None else f"{bound:.{digits}f}" for bound in (low, high))
    return f"{value:.{digits}f} [{', '.join(words)}]"


def term_rows(figures: Mapping[str, Any]) -> list[list[str]]:
    """Returns rows of a table: of each floor its score, of each term the points and interval."""
    rows = []
    for name in TERMS:
        key = name.replace(" ", "_")
        if figures.get(f"{key}_advantage") is None:
            if figures.get(f"{key}_missing"):
                rows.append([f"{name} (not measured)", figures[f"{key}_missing"]])
            continue
        if name in FLOOR_LABELS:
            percent = "%" if name == SHALLOW else ""
            rows.append([FLOOR_LABELS[name], f"{figures[f'{key}_score']:.2f}{percent}"])
        rows.append([LABELS[name], points(figures, f"{key}_advantage")])
    return rows


def further_tables(task: str, figures: Mapping[str, Any]) -> list[str]:
    """Returns the verdicts of several sets, and what the exchange costs by type of question, as
    tables; both decide nothing further.
    """
    sets = figures.get("sets", {})
    tables = []
    if sets:
        rows = [[name, str(own["images"]), own["verdict"]] for name, own in sets.items()]
        if figures.get("pooled_exchange_points") is not None:
            pooled = f"{points(figures, 'pooled_exchange_points')} points lost with another image"
            rows.append(["all sets pooled (decides nothing)", "", pooled])
        tables.append(markdown_table(rows, [f"{task}: sets", "images", "the worst decides"]))
    for name, own in (sets or {"": figures}).items():
        if own.get("gap_by_type"):
            rows = [[kind, with_bounds(**gap)] for kind, gap in own["gap_by_type"].items()]
            heading = f"{task}{', ' if name else ''}{name}: type of question"
            tables.append(markdown_table(rows, [heading, "points lost with another image"]))
    return tables


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
