"""What the finished children of an ablation have shown: scores with intervals, and whether the
expectation held.

scores.json and the predictions of each child -> one Observed for each variant and task -> rows of
the report. Legend: S seeds, I test images that were scored.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from harness.ablate.experiment import SCORES, Child, Variant
from harness.config.schema import EvaluationConfig
from harness.evaluate.bootstrap import Interval, ratio
from harness.evaluate.compare import said
from harness.evaluate.measures import TASKS
from harness.redact import revealed
from harness.tracking.journal import every_row
from shards.cache import Cache
from shards.read import records
from shards.record import Text

SCORE_OF = {"vqa": "accuracy %", "caption": "CIDEr"}
DIGITS = {"vqa": 2, "caption": 3}
SCALE = {"vqa": 100.0, "caption": 1.0}  # from the measure to that score
CURVE_POINTS = 60
# DATASET_SPLIT/ID, as result files name a text -> DATASET_SPLIT/KEY of its image, and the text
Texts = dict[str, tuple[str, Text]]


@dataclass(frozen=True)
class Observed:
    """One task of one variant, scored on the texts that all children on these images answered."""

    variant: str
    task: str
    paths: tuple[str, ...]  # of the test sets
    asked: Texts
    texts_I: np.ndarray  # how many of an image are scored
    scores_I: dict[int, np.ndarray]  # by seed; the sum over the texts of an image
    evaluations: list[Mapping[str, Any]]  # by seed; what scores.json holds of the task
    said: Mapping[str, str]  # by the first seed


def observe(finished: Sequence[Child], cache: Cache | None = None) -> list[Observed]:
    """Returns the tasks of each variant, in the order in which the children come; predictions are
    read from the children's result files and scored again, by image.

    `cache`: for remote test sets. Raises ShardError for a test set that is gone.
    """
    by_test: dict[tuple[str, ...], dict[Child, Any]] = defaultdict(dict)
    for child in finished:
        evaluation = json.loads((child.out / SCORES).read_text())
        by_test[tuple(revealed(evaluation["data"]))][child] = evaluation["tasks"]
    found = []
    for paths, evaluations in by_test.items():
        for task, asked in read_texts(paths, cache).items():
            found += observe_task(task, paths, asked, evaluations)
    variants = list(dict.fromkeys(child.variant for child in finished))
    return sorted(found, key=lambda one: (variants.index(one.variant), one.task))


def read_texts(paths: Sequence[str], cache: Cache | None) -> dict[str, Texts]:
    """Returns by task what the test sets ask about which image, with the truth."""
    found: dict[str, Texts] = defaultdict(dict)
    for record in records(paths, cache):
        place = f"{record.dataset}_{record.split}"
        for text in record.texts:
            name = text.id if text.task == "vqa" else record.image_id
            found[text.task][f"{place}/{name}"] = (f"{place}/{record.key}", text)
    return found


def observe_task(
    task: str,
    paths: tuple[str, ...],
    asked: Texts,
    evaluations: Mapping[Child, Mapping[str, Any]],
) -> list[Observed]:
    """Returns what each variant scored: VQA accuracy in percent, or CIDEr-D with the document
    frequencies of these texts.
    """
    answers = {child: said((child.out / SCORES).parent, task) for child in evaluations}
    texts = {i: text for i, text in asked.items() if all(i in each for each in answers.values())}
    truths = [text.targets for _, text in texts.values()]
    image_of_text = np.unique([image for image, _ in texts.values()], return_inverse=True)[1]
    texts_I = np.bincount(image_of_text).astype(float)
    score = TASKS[task].scores
    found: dict[str, Observed] = {}
    for child, given in answers.items():
        new = Observed(child.variant, task, paths, asked, texts_I, {}, [], given)
        one = found.setdefault(child.variant, new)
        points = SCALE[task] * np.array(score([given[i] for i in texts], truths))
        one.scores_I[child.seed] = np.bincount(image_of_text, points)
        one.evaluations.append(evaluations[child][task])
    return list(found.values())


def interval(scores_SI: np.ndarray, texts_I: np.ndarray, settings: EvaluationConfig) -> Interval:
    """Returns the mean score over seeds and texts, and how far it would move with other seeds and
    with other images.

    Images by the bootstrap of the seeds' mean. Seeds by Student's t: there are three or so, and
    resamples of three never leave them (a percentile interval of 95% would hold the truth in 75% of
    cases). Half-widths are squared and added (MOVER: Zou & Donner 2008, Statistics in Medicine 27).
    One seed says nothing of others: then only images vary. The resamples are the same for all
    variants: differences are paired.
    """
    seeds = len(scores_SI)
    images = ratio(scores_SI.mean(axis=0), texts_I, settings.bootstrap, settings.confidence)
    seeds_half = 0.0
    if seeds > 1:
        means_S = scores_SI.sum(axis=1) / texts_I.sum()
        quantile = student_t.ppf((1 + settings.confidence) / 2, seeds - 1)
        seeds_half = quantile * means_S.std(ddof=1) / seeds**0.5
    below = float(np.hypot(seeds_half, images.low - images.value))
    above = float(np.hypot(seeds_half, images.high - images.value))
    return Interval(images.value, images.value - below, images.value + above)


def row_of(
    one: Observed, variant: Variant, observed: Sequence[Observed], settings: EvaluationConfig
) -> dict[str, Any]:
    """Returns what report.json and the tables say of one variant and task."""
    scores_SI = np.array(list(one.scores_I.values()))
    claim, difference = held(one, variant, observed, settings)
    gap = f"{TASKS[one.task].measure}_gap"  # in points, hundredths of the measure
    gaps = [known[gap] for known in one.evaluations if known.get(gap) is not None]
    verdicts = Counter(known.get("verdict") or "no verdict" for known in one.evaluations)
    texts = one.texts_I.sum()
    return {
        "variant": one.variant,
        "task": one.task,
        "measure": SCORE_OF[one.task],
        "expected": variant.expected,
        **interval(scores_SI, one.texts_I, settings).flat("score"),
        "per_seed": {str(seed): sums_I.sum() / texts for seed, sums_I in one.scores_I.items()},
        "difference": difference and difference.to_dict(),
        "observed": claim,
        "loss_nats": float(np.mean([known["loss_nats"] for known in one.evaluations])),
        "lost": SCALE[one.task] * float(np.mean(gaps)) / 100 if gaps else None,
        "verdicts": dict(verdicts),
        "images": len(one.texts_I),
        "left_out": len(one.asked) - int(texts),
    }


def held(
    one: Observed, variant: Variant, observed: Sequence[Observed], settings: EvaluationConfig
) -> tuple[str, Interval | None]:
    """Says whether what was expected came true, with the paired difference to the variant it was
    compared with.
    """
    other = variant.below or variant.above or variant.like
    if other is None:
        return "nothing to compare with", None
    differences = [
        one.scores_I[seed] - against.scores_I[seed]
        for against in observed
        if (against.variant, against.task, against.paths) == (other, one.task, one.paths)
        for seed in one.scores_I
        if seed in against.scores_I
    ]
    if not differences:
        return f"{other} has no seed in common with it on these images", None
    found = interval(np.array(differences), one.texts_I, settings)
    if not (found.high < 0 or found.low > 0):
        verdict = "as expected, no difference seen" if variant.like else "cannot be told"
    elif variant.like:
        verdict = "AGAINST EXPECTATION, they differ"
    elif (found.high < 0) == bool(variant.below):
        verdict = "as expected"
    else:
        verdict = "THE OTHER WAY ROUND"
    digits = DIGITS[one.task]
    bounds = f"[{found.low:+.{digits}f}, {found.high:+.{digits}f}]"
    return f"{verdict}: {found.value:+.{digits}f} {bounds} against {other}", found


def mean_curves(children: Sequence[Child]) -> dict[str, list[tuple[float, float]]]:
    """Returns for each variant the loss on the training images by step, the mean over the seeds
    that got there; at most CURVE_POINTS points.
    """
    logged: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for child in children:
        for row in every_row(child.out):
            if (loss := row["values"].get("train/loss")) is not None:
                logged[child.variant][row["step"]].append(float(loss))
    curves = {}
    for name, by_step in logged.items():
        steps = sorted(by_step)
        windows = np.array_split(steps, min(CURVE_POINTS, len(steps)))
        curves[name] = [
            (float(w[-1]), float(np.mean([np.mean(by_step[s]) for s in w]))) for w in windows
        ]
    return curves
