"""The report of a run as one HTML page that needs nothing beside it: verdict and floors, curves,
scores, pictures, where the model looked, and what it ran on.

What an evaluation left (scores.json, predictions.jsonl), the run's journal and its model -> a file.
Every score on it stands in scores.json.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from harness.config.load import dump
from harness.config.schema import Config
from harness.errors import ConfigError
from harness.evaluate.image_use.evidence import IMAGE_USED
from harness.evaluate.measures import RIGHT, TASKS
from harness.evaluate.report import FLOORS, fact_rows, floors
from harness.evaluate.told import FLOOR_LABELS, TERMS, term_line, with_bounds
from harness.look.chart import line_chart
from harness.look.choice import Chooser, Chosen, Row
from harness.look.history import History
from harness.look.maps import SECONDS, Mapped, Mapper, Maps
from harness.look.occlusion import DELETED, RANDOM_ORDERS, area
from harness.look.overlay import FAINTEST, overlay
from harness.model.vlm import VisionLanguageModel
from harness.redact import say
from harness.report.pages import jpeg_uri, write_page
from shards.cache import Cache
from shards.files import ShardError
from shards.manifest import Manifest

CONFUSED = 12  # truths and answers of the confusion table
MAP_SIDE = 192  # pixels
QUALITY = 78


@dataclass(frozen=True)
class Evaluated:
    """An evaluation of a run: what it left, and what it was made of."""

    report: Mapping[str, Any]  # what scores.json holds
    rows: Sequence[Row]  # of predictions.jsonl
    home: Path  # of the run
    config: Config
    manifests: Sequence[Manifest]
    model: VisionLanguageModel
    cache: Cache | None = None


def write_report_page(
    path: Path,
    evaluated: Evaluated,
    *,
    maps: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the page and returns its path; leaves the model in eval mode.

    `maps`: so many pictures of each task with where the model looked, however long that takes;
    None: `evaluation.look_images`, as far as a minute suffices. Raises ConfigError, ShardError.
    """
    began = time.monotonic()
    evaluated.model.eval()
    history = History(evaluated.home)
    tasks = [
        _task(name, figures, evaluated, maps, progress)
        for name, figures in evaluated.report["tasks"].items()
    ]
    report = evaluated.report
    values = {
        "title": evaluated.home.name or evaluated.config.name,
        "about": _about(report),
        "tasks": tasks,
        "charts": history.charts(),
        "facts": [*history.facts(), *fact_rows(report)] if "model" in report else [],
        "environment": history.environment(),
        "config": dump(evaluated.config),
        "data": ", ".join(report["data"]),
        "random_orders": RANDOM_ORDERS,
        "map_side": MAP_SIDE,
        "faintest": FAINTEST,
    }
    seconds = f"{time.monotonic() - began:.0f} s, {sum(t['maps'].seconds for t in tasks):.0f} s"
    return write_page(path, "report.html", seconds=seconds, **values)


def try_report_page(path: Path, evaluated: Evaluated, **asked: Any) -> Path | None:
    """Writes the page as `write_report_page` does; where that fails says why and returns None: an
    evaluation that is done is not to be lost by its page.
    """
    try:
        return write_report_page(path, evaluated, **asked)
    except (ConfigError, ShardError, OSError, RuntimeError) as error:  # one of torch: no memory
        say(f"no {path.name}: {error}; harness report {evaluated.home} tries again", sys.stderr)
        return None


def _about(report: Mapping[str, Any]) -> str:
    step = "" if report["step"] is None else f"step {report['step']:,}, "
    unread = report["unreadable"]
    texts = sum(figures["texts"] for figures in report["tasks"].values())
    told = f"{step}{report['images']:,} images with {texts:,} texts"
    if alone := report.get("without_picture"):
        told = f"{step}{report['images']:,} images and {alone:,} records without, {texts:,} texts"
    return f"{told}, {unread} could not be read" if unread else told


def _task(
    name: str,
    figures: Mapping[str, Any],
    evaluated: Evaluated,
    maps: int | None,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Any]:
    """Returns all that the page shows of one task."""
    rows = [row for row in evaluated.rows if row["task"] == name]
    has_right = TASKS[name].has_right
    shown = [row for row in rows if row.get("has_picture", True)]
    choose = Chooser(evaluated.model, evaluated.config, evaluated.manifests, shown, evaluated.cache)
    kinds = {
        "Most confident wrong answers": choose.confident_and_wrong() if has_right else [],
        "Best": choose.best(),
        "Worst": choose.worst(),
        "Random": choose.random(),
    }
    count = evaluated.config.evaluation.look_images if maps is None else maps
    mapper = Mapper(evaluated.model, evaluated.config, progress)
    seconds = SECONDS if maps is None else float("inf")
    made = mapper.maps(to_look_at(kinds, count), seconds) if count else Maps()
    return {
        "name": name,
        "verdicts": _verdicts(name, figures),
        "bars": floor_bars(figures),
        "floors": [row for row in floors(figures) if row[0] != "verdict"],
        "scores": score_rows(figures),
        "kinds": {
            kind: [one.shown() for one in chosen] for kind, chosen in kinds.items() if chosen
        },
        "wrong": sum(row["score"] < RIGHT for row in rows) if has_right else 0,
        "confusion": confusion(rows) if has_right else None,
        "maps": made,
        "looks": [_look(mapped) for mapped in made.mapped],
        "deletion": deletion(made.mapped),
    }


def to_look_at(kinds: Mapping[str, Sequence[Chosen]], count: int) -> list[Chosen]:
    """Returns `count` of the chosen, each picture once: of every kind in turn."""
    turns = [
        one
        for place in range(count)
        for chosen in kinds.values()
        for one in chosen[place : place + 1]
    ]
    return list({one.name: one for one in reversed(turns)}.values())[::-1][:count]


# ---- verdict and scores --------------------------------------------------------------------------


def _verdicts(task: str, figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the verdict of the task, then those of its sets where it has several."""
    named = {task: figures, **figures.get("sets", {})}
    return [
        {
            "name": name,
            "verdict": own.get("verdict") or "no verdict",
            "is_used": str(own.get("verdict")).startswith(IMAGE_USED),
            "terms": list(filter(None, (term_line(term, own) for term in TERMS))),
            "reason": own.get("reason") or "",
            "advice": own.get("advice") or "",
        }
        for name, own in named.items()
    ]


def floor_bars(figures: Mapping[str, Any]) -> list[tuple[str, float, float, bool]]:
    """Returns (label, score, share of the widest bar, is it the model's own) of score and floors,
    all in percent or in CIDEr x 100.
    """
    found = []
    for key, label in FLOORS.items():
        if figures.get(key) is not None:
            is_own = key in ("accuracy", "CIDEr")
            label = label.replace("CIDEr,", "CIDEr x 100,")
            value = 100 * figures[key] if key == "CIDEr" else figures[key]
            found.append((label, value, is_own))
    for term, label in FLOOR_LABELS.items():
        value = figures.get(f"{term.replace(' ', '_')}_score")
        if value is not None:
            found.append((label, value, False))
    widest = max([100.0, *(value for _, value, _ in found)])
    return [(label, value, value / widest, is_own) for label, value, is_own in found]


def score_rows(figures: Mapping[str, Any]) -> list[tuple[str, str, tuple[float, float, float]]]:
    """Returns (label, "97.8 [96.9, 98.5]", value and bounds as shares) of the task's score, and of
    each type of answer and question.
    """
    rows = []
    for name in ("accuracy", "Bleu_1", "Bleu_4", "ROUGE_L", "CIDEr"):
        if figures.get(name) is not None:
            known = (figures[name], figures.get(f"{name}_low"), figures.get(f"{name}_high"))
            rows.append((name, known, 100.0 if name == "accuracy" else 1.0))
    for kind in ("answer", "question"):
        for name, known in figures.get(f"per_{kind}_type_intervals", {}).items():
            rows.append((f"{kind} type: {name}", tuple(known.values()), 100.0))
    return [
        (label, with_bounds(*known, digits=1 if full == 100 else 3), _shares(known, full))
        for label, known, full in rows
    ]


def _shares(known: tuple[Any, ...], full: float) -> tuple[float, float, float]:
    value = min(1.0, known[0] / full)
    low = value if known[1] is None else min(1.0, known[1] / full)
    high = value if known[2] is None else min(1.0, known[2] / full)
    return value, low, high


def confusion(rows: Sequence[Row]) -> dict[str, Any]:
    """Returns the most common truths as rows, what was said as columns, and how often; further
    answers are counted together.
    """
    truths = [name for name, _ in Counter(row["truth"] for row in rows).most_common(CONFUSED)]
    kept = [row for row in rows if row["truth"] in truths]
    others = [
        said
        for said, _ in Counter(row["answer"] for row in kept).most_common(CONFUSED + len(truths))
        if said not in truths
    ]
    answers = [*truths, *others[: CONFUSED // 3]]
    counts = Counter(
        (row["truth"], row["answer"] if row["answer"] in answers else None) for row in kept
    )
    columns = [*answers, *([None] if any(said is None for _, said in counts) else [])]
    table = []
    for truth in truths:
        total = sum(counts[truth, said] for said in columns)
        cells = [
            (counts[truth, said], counts[truth, said] / total, said == truth) for said in columns
        ]
        table.append((truth, cells))
    left = len(rows) - len(kept)
    return {
        "columns": ["(other)" if said is None else said or "(empty)" for said in columns],
        "rows": table,
        "left": left,
    }


# ---- where it looked -----------------------------------------------------------------------------


def _look(mapped: Mapped) -> dict[str, Any]:
    """Returns one picture, its map and that of random weights, as the template shows them."""
    shown = mapped.chosen.shown()
    return {
        "shown": shown,
        "picture": None if mapped.pixels_HW3 is None else _plain(mapped.pixels_HW3),
        "map": jpeg_uri(overlay(mapped.pixels_HW3, mapped.look, MAP_SIDE), QUALITY),
        "most": f"{mapped.look.patch_NN.max():.2f}",
        "random": jpeg_uri(overlay(mapped.pixels_HW3, mapped.random, MAP_SIDE), QUALITY),
        "random_most": f"{mapped.random.patch_NN.max():.2f}",
        "agreement": None if mapped.agreement is None else f"{mapped.agreement:+.2f}",
        "where": _where(mapped),
    }


def _where(mapped: Mapped) -> str:
    """Says in words where the hottest cell lies."""
    heat_GG = mapped.look.heat_GG
    side = len(heat_GG)
    hottest = int(heat_GG.argmax())
    up = ("upper", "middle", "lower")[hottest // side * 3 // side]
    across = ("left", "centre", "right")[hottest % side * 3 // side]
    return f"{up} {across}"


def _plain(pixels_HW3: np.ndarray) -> str:
    return jpeg_uri(Image.fromarray(pixels_HW3).resize((MAP_SIDE, MAP_SIDE)), QUALITY)


def deletion(mapped: Sequence[Mapped]) -> dict[str, Any] | None:
    """Returns the mean deletion curves of all pictures as a chart, and the areas under them."""
    if not mapped:
        return None
    own_D = np.mean([one.look.deleted for one in mapped], axis=0)
    random_D = np.mean([one.look.deleted_at_random for one in mapped], axis=0)
    shares_D = 100 * np.array(DELETED)
    lines = {
        "its own order": list(zip(shares_D.tolist(), own_D.tolist(), strict=True)),
        "random": list(zip(shares_D.tolist(), random_D.tolist(), strict=True)),
    }
    agreements = [one.agreement for one in mapped if one.agreement is not None]
    return {
        "chart": line_chart(
            "likelihood of its answer, a token", lines, x="% of the picture hidden"
        ),
        "own": f"{area(own_D):.2f}",
        "random": f"{area(random_D):.2f}",
        "agreement": f"{np.mean(agreements):+.2f}" if agreements else None,
        "pictures": len(mapped),
    }
