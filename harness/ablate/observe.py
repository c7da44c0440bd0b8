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
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from harness.ablate.experiment import SCORES, Child, Variant
from harness.config.schema import EvaluationConfig
from harness.evaluate.bootstrap import Interval, ratio
from harness.evaluate.compare import said
from harness.evaluate.measures import SCORES as MEASURES
from harness.tracking.journal import METRICS
from shards.cache import Cache
from shards.read import records
from shards.record import Text

SCORE_OF = {"vqa": "accuracy %", "caption": "CIDEr"}
DIGITS = {"vqa": 2, "caption": 3}
POINT = {"vqa": 1.0, "caption": 0.01}  # how much of that score a point is, the gate's unit
CURVE_POINTS = 60
# dataset, split, and the id of a text (vqa) or of an image (captions), or the key of a record
Id = tuple[str, str, str]


@dataclass(frozen=True)
class TestSet:
    """What data.test holds, by task: who is asked what, about which image, and the truth."""

    paths: tuple[str, ...]
    texts: dict[str, dict[Id, tuple[str, Text]]]  # task -> id -> (key of the image's record, text)

    @classmethod
    def read(cls, paths: Sequence[str], cache: Cache | None) -> TestSet:
        texts: dict[str, dict[Id, tuple[str, Text]]] = defaultdict(dict)
        for record in records(paths, cache):
            for text in record.texts:
                name = text.id if text.task == "vqa" else record.image_id
                texts[text.task][record.dataset, record.split, name] = (record.key, text)
        return cls(tuple(paths), dict(texts))


@dataclass(frozen=True)
class Observed:
    """One task of one variant. Scores are sums over the texts of an image."""

    variant: str
    task: str
    test: TestSet
    seeds: tuple[int, ...]
    scores_SI: np.ndarray
    texts_I: np.ndarray
    loss_nats: float  # per target token, mean over seeds
    lost: float | None  # of the score, where the gate exchanges the images; mean over seeds
    verdicts: Counter[str]
    said: dict[Id, str]  # by the first seed
    left_out: int  # texts that not all children answered: their image could not be read

    @property
    def means(self) -> np.ndarray:
        """The mean score of each seed over all texts."""
        return self.scores_SI.sum(axis=1) / self.texts_I.sum()


def observe(finished: Sequence[Child], cache: Cache | None = None) -> list[Observed]:
    """Returns the tasks of each variant, in the order in which the children come; predictions are
    read from the children's result files and scored again, by image.

    `cache`: for remote test sets. Raises ShardError for a test set that is gone.
    """
    by_test: dict[tuple[str, ...], dict[Child, Any]] = defaultdict(dict)
    for child in finished:
        evaluation = json.loads((child.out / SCORES).read_text())
        by_test[tuple(evaluation["data"])][child] = evaluation["tasks"]
    found = []
    for paths, evaluations in by_test.items():
        test = TestSet.read(paths, cache)
        for task in test.texts:
            found += observe_task(task, test, evaluations)
    variants = list(dict.fromkeys(child.variant for child in finished))
    return sorted(found, key=lambda one: (variants.index(one.variant), one.task))


def observe_task(
    task: str, test: TestSet, evaluations: Mapping[Child, Mapping[str, Any]]
) -> list[Observed]:
    """Returns what each variant scored on the texts that all children on this test set answered."""
    asked = test.texts[task]
    answers = {child: predictions(child, task, asked) for child in evaluations}
    texts = {i: text for i, text in asked.items() if all(i in each for each in answers.values())}
    images = [f"{i[0]}/{i[1]}/{key}" for i, (key, _) in texts.items()]
    image_of_text = np.unique(images, return_inverse=True)[1]
    gap = f"{MEASURES[task][0]}_gap"
    found = []
    for variant in dict.fromkeys(child.variant for child in evaluations):
        children = [child for child in evaluations if child.variant == variant]
        known = [evaluations[child][task] for child in children]
        gaps = [one[gap] * POINT[task] for one in known if one.get(gap) is not None]
        points_S = [points(task, texts, answers[child]) for child in children]
        found.append(
            Observed(
                variant=variant,
                task=task,
                test=test,
                seeds=tuple(child.seed for child in children),
                scores_SI=np.array([np.bincount(image_of_text, points) for points in points_S]),
                texts_I=np.bincount(image_of_text).astype(float),
                loss_nats=float(np.mean([one["loss_nats"] for one in known])),
                lost=float(np.mean(gaps)) if gaps else None,
                verdicts=Counter(one.get("verdict") or "no verdict" for one in known),
                said=answers[children[0]],
                left_out=len(asked) - len(texts),
            )
        )
    return found


def predictions(child: Child, task: str, texts: Mapping[Id, Any]) -> dict[Id, str]:
    """Returns what the child's result files hold of those texts."""
    found = said((child.out / SCORES).parent, task)
    return {i: found[name] for i in texts if (name := f"{i[0]}_{i[1]}/{i[2]}") in found}


def points(
    task: str, texts: Mapping[Id, tuple[str, Text]], answers: Mapping[Id, str]
) -> list[float]:
    """Returns the score of each text: VQA accuracy in percent, or CIDEr-D with the document
    frequencies of this test set.
    """
    score = MEASURES[task][1]
    each = score([answers[i] for i in texts], [text.targets for _, text in texts.values()])
    return [100 * POINT[task] * one for one in each]


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
    claim, difference = held(one, variant, observed, settings)
    return {
        "variant": one.variant,
        "task": one.task,
        "measure": SCORE_OF[one.task],
        "expected": variant.expected,
        **interval(one.scores_SI, one.texts_I, settings).flat("score"),
        "per_seed": {str(seed): float(m) for seed, m in zip(one.seeds, one.means, strict=True)},
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
    """Says whether what was expected came true, with the paired difference to the variant it was
    compared with.
    """
    other = variant.below or variant.above or variant.like
    if other is None:
        return "nothing to compare with", None
    wanted = (other, one.task, one.test.paths)
    seeds: list[int] = []
    for against in observed:
        if (against.variant, against.task, against.test.paths) == wanted:
            seeds = [seed for seed in one.seeds if seed in against.seeds]
            break
    if not seeds:
        return f"{other} has no seed in common with it on these images", None
    own_SI = one.scores_SI[[one.seeds.index(seed) for seed in seeds]]
    other_SI = against.scores_SI[[against.seeds.index(seed) for seed in seeds]]
    found = interval(own_SI - other_SI, one.texts_I, settings)
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
    """Returns each variant's loss on the training images by step, the mean over the seeds that got
    there; at most CURVE_POINTS points.
    """
    logged: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for child in children:
        file = child.out / METRICS
        for line in file.read_text().splitlines() if file.exists() else ():
            row = json.loads(line)
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
