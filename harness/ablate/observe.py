"""What the finished children of an ablation have shown: scores with intervals, and whether the
expectation held.

scores.json and the predictions of each child -> one Observed for each variant and task -> rows of
the report. Legend: S seeds, I test images.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from harness.config.schema import EvaluationConfig
from harness.evaluate.bootstrap import Interval, ratio
from harness.evaluate.compare import said
from harness.evaluate.measures import TASKS
from harness.tracking.journal import METRICS
from shards.cache import Cache
from shards.read import records
from shards.record import Text

if TYPE_CHECKING:
    from harness.ablate.experiment import Child, Variant

SCORE_OF = {"vqa": "accuracy %", "caption": "CIDEr"}
DIGITS = {"vqa": 2, "caption": 3}
POINT = {"vqa": 1.0, "caption": 0.01}  # how much of that score a point is, the gate's unit
CURVE_POINTS = 60
Id = tuple[str, str, str]  # dataset, split, id of the text (vqa) or of the image (captions)


@dataclass(frozen=True)
class TestSet:
    """What data.test holds, by task: who is asked what, about which image, and the truth."""

    paths: tuple[str, ...]
    texts: dict[str, dict[Id, tuple[str, Text]]]  # task -> id -> (key of the image's record, text)

    @classmethod
    def of(cls, paths: Sequence[str], cache: Cache | None) -> TestSet:
        texts: dict[str, dict[Id, tuple[str, Text]]] = defaultdict(dict)
        for record in records(paths, cache):
            for text in record.texts:
                name = text.id if text.task == "vqa" else record.image_id
                texts[text.task][record.dataset, record.split, name] = (record.key, text)
        return cls(tuple(paths), dict(texts))


@dataclass(frozen=True)
class Observed:
    """One task of one variant. Scores are sums over the texts of an image: a mean is sum / texts."""

    variant: str
    task: str
    test: TestSet
    seeds: tuple[int, ...]
    scores_SI: np.ndarray
    texts_I: np.ndarray
    loss_nats: float  # per target token, mean over seeds
    lost: float | None  # of the score, where the gate exchanges the images; mean over seeds
    verdicts: Counter[str]
    said: dict[Id, str]  # of the first seed
    left_out: (
        int  # texts that not all children on these images answered: their image could not be read
    )


def observe(finished: Sequence[Child], cache: Cache | None = None) -> list[Observed]:
    """In the order of the variants; each child's predictions are read from its result files and
    scored again, by image.

    Only texts count that all children on the same test set answered. `cache`: for remote test sets.
    Raises ShardError for a test set that is gone.
    """
    tests: dict[tuple[str, ...], TestSet] = {}
    answers: dict[tuple[tuple[str, ...], str], dict[Child, dict[Id, str]]] = defaultdict(dict)
    by_variant: dict[str, list[Child]] = defaultdict(list)
    scores = {
        child: json.loads((child.out / "evaluation" / "scores.json").read_text())
        for child in finished
    }
    for child in finished:
        by_variant[child.variant].append(child)
        paths = tuple(scores[child]["data"])
        test = tests.get(paths) or tests.setdefault(paths, TestSet.of(paths, cache))
        for task, texts in test.texts.items():
            answers[paths, task][child] = predictions(child.out / "evaluation", task, texts)
    made = []
    for variant, children in by_variant.items():
        paths = tuple(scores[children[0]]["data"])
        for task, asked in sorted(tests[paths].texts.items()):
            answered = answers[paths, task]
            texts = {
                i: text for i, text in asked.items() if all(i in each for each in answered.values())
            }
            images, image_of_text = np.unique(
                [f"{i[0]}/{i[1]}/{key}" for i, (key, _) in texts.items()], return_inverse=True
            )
            points_S = [points(task, texts, answered[child]) for child in children]
            sums = [np.bincount(image_of_text, points, len(images)) for points in points_S]
            known = [scores[child]["tasks"][task] for child in children]
            gap = f"{TASKS[task].measure}_gap"
            gaps = [one[gap] * POINT[task] for one in known if one.get(gap) is not None]
            made.append(
                Observed(
                    variant=variant,
                    task=task,
                    test=tests[paths],
                    seeds=tuple(child.seed for child in children),
                    scores_SI=np.array(sums),
                    texts_I=np.bincount(image_of_text, minlength=len(images)).astype(float),
                    loss_nats=float(np.mean([one["loss_nats"] for one in known])),
                    lost=float(np.mean(gaps)) if gaps else None,
                    verdicts=Counter(one.get("verdict") or "no verdict" for one in known),
                    said=answered[children[0]],
                    left_out=len(asked) - len(texts),
                )
            )
    return made


def predictions(folder: Path, task: str, texts: Mapping[Id, Any]) -> dict[Id, str]:
    """Of those texts, what the result files in `folder` hold."""
    found = said(folder, task)
    return {i: found[name] for i in texts if (name := f"{i[0]}_{i[1]}/{i[2]}") in found}


def points(
    task: str, texts: Mapping[Id, tuple[str, Text]], answers: Mapping[Id, str]
) -> list[float]:
    """The score of each text: VQA accuracy in percent, or CIDEr-D with the document frequencies of
    this test set.
    """
    each = TASKS[task].scores(
        [answers[i] for i in texts], [text.targets for _, text in texts.values()]
    )
    unit = 100 * POINT[task]
    return [unit * one for one in each]


def interval(scores_SI: np.ndarray, texts_I: np.ndarray, settings: EvaluationConfig) -> Interval:
    """Of the mean score over seeds and texts: how far it would move with other seeds and with other
    images.

    Images by the bootstrap of the seeds' mean. Seeds by Student's t: there are three or so, and
    resamples of three never leave them (a percentile interval of 95% would hold the truth in 75% of
    cases). Half-widths are squared and added (MOVER: Zou & Donner 2008, Statistics in Medicine 27).
    One seed says nothing of others: then only images vary. The resamples are the same for all
    variants: differences are paired.
    """
    seeds = len(scores_SI)
    images = ratio(scores_SI.mean(axis=0), texts_I, settings.bootstrap, settings.confidence)
    of_seeds = 0.0
    if seeds > 1:
        deviation = (scores_SI.sum(axis=1) / texts_I.sum()).std(ddof=1)
        of_seeds = student_t(seeds - 1, settings.confidence) * deviation / seeds**0.5
    low, high = (
        float(np.hypot(of_seeds, bound - images.value)) for bound in (images.low, images.high)
    )
    return Interval(images.value, images.value - low, images.value + high)


@cache
def student_t(degrees: int, confidence: float) -> float:
    """The two-sided quantile of Student's t: 4.30 for 2 degrees of freedom and 95%. From draws, to
    half a percent.
    """
    draws = np.random.default_rng(0).standard_t(degrees, size=1_000_000)
    return float(np.quantile(np.abs(draws), confidence))


def row_of(
    one: Observed, variant: Variant, observed: Sequence[Observed], settings: EvaluationConfig
) -> dict[str, Any]:
    """What report.json and the tables say of one variant and task."""
    score = interval(one.scores_SI, one.texts_I, settings)
    claim, difference = held(one, variant, observed, settings)
    return {
        "variant": one.variant,
        "task": one.task,
        "measure": SCORE_OF[one.task],
        "expected": variant.expected,
        **score.flat("score"),
        "per_seed": dict(
            zip(
                map(str, one.seeds),
                (one.scores_SI.sum(1) / one.texts_I.sum()).tolist(),
                strict=True,
            )
        ),
        "difference": difference and difference.to_dict(),
        "observed": claim,
        "loss_nats": one.loss_nats,
        "lost": one.lost,
        "verdicts": dict(one.verdicts),
        "images": len(one.texts_I),
        "left_out": one.left_out,
    }


def held(
    one: Observed, variant: Variant, observed: Sequence[Observed], settings: EvaluationConfig
) -> tuple[str, Interval | None]:
    """Did what was expected come true? In words, with the paired difference to the variant it was
    compared with.
    """
    other = variant.below or variant.above or variant.like
    if other is None:
        return "nothing to compare with", None
    same = (
        o
        for o in observed
        if (o.variant, o.task, o.test.paths) == (other, one.task, one.test.paths)
    )
    against = next(same, None)
    seeds = [seed for seed in one.seeds if against and seed in against.seeds]
    if not seeds:
        return f"{other} has no seed in common with it on these images", None
    rows, others = ([o.seeds.index(seed) for seed in seeds] for o in (one, against))
    found = interval(one.scores_SI[rows] - against.scores_SI[others], one.texts_I, settings)
    lower, higher = found.high < 0, found.low > 0
    if not (lower or higher):
        verdict = "as expected, no difference seen" if variant.like else "cannot be told"
    elif variant.like:
        verdict = "AGAINST EXPECTATION, they differ"
    else:
        verdict = "as expected" if lower == bool(variant.below) else "THE OTHER WAY ROUND"
    digits = DIGITS[one.task]
    bounds = f"[{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{verdict}: {found.value:+.{digits}f} {bounds} against {other}", found


def mean_curves(children: Sequence[Child]) -> dict[str, list[tuple[float, float]]]:
    """Loss on the training images by step, the mean over the seeds that got there; at most
    CURVE_POINTS points.
    """
    logged: dict[str, dict[int, list[float]]] = {}
    for child in children:
        file = child.out / METRICS
        for line in file.read_text().splitlines() if file.exists() else ():
            row = json.loads(line)
            if "train/loss" in row["values"]:
                logged.setdefault(child.variant, {}).setdefault(row["step"], []).append(
                    float(row["values"]["train/loss"])
                )
    curves = {}
    for name, by_step in logged.items():
        steps = sorted(by_step)
        windows = np.array_split(steps, min(CURVE_POINTS, len(steps)))
        curves[name] = [
            (float(w[-1]), float(np.mean([np.mean(by_step[s]) for s in w]))) for w in windows
        ]
    return curves
