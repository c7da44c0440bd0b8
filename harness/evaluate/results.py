"""What an evaluation gives: scores, floors and answers of each task, and the figures of them that
are logged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.evaluate.bootstrap import Interval
from harness.evaluate.image_use.changes import complementary_pairs
from harness.evaluate.image_use.evidence import EXCHANGE_NOTICED, NOT_JUDGED, ImageUse
from harness.evaluate.image_use.verdict import worst
from harness.evaluate.predict import Prediction
from harness.report.pictures import Shown

_IN_METRICS = (
    *("accuracy", "CIDEr", "Bleu_4", "empty_rate", "loss_gap_nats", "loss_gap_nats_low"),
    *("exchange_advantage", "matched_exchange_advantage", "shallow_floor_advantage"),
    *("recall_advantage", "neighbour_floor_advantage"),
    *(
        "shuffled_accuracy",
        "no_image_accuracy",
        "blank_accuracy",
        "shuffled_CIDEr",
        "complementary_pairs_right",
    ),
)


_GROUPS = ("per_answer_type", "per_question_type")


@dataclass
class TaskResult:
    """All that is known of one task. Accuracy in percent, captions' measures as pycocoevalcap has
    them, nats per target token.
    """

    task: str
    predictions: list[Prediction] = field(default_factory=list)
    nats: float = 0.0
    weight: float = 0.0
    intervals: dict[str, Interval] = field(
        default_factory=dict
    )  # of accuracy, or of Bleu_1 ... CIDEr
    groups: dict[str, dict[str, Interval]] = field(
        default_factory=dict
    )  # accuracy per_answer_type, per_question_type
    uses: dict[str, ImageUse] = field(default_factory=dict)  # by set
    stripped: dict[str, float] = field(default_factory=dict)  # captions, see scores.py
    # By set: figures that decide nothing, and how long each took (beside.py).
    beside: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    beside_seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    pooled: Interval | None = None  # cost of the exchange in points over several sets together
    majority_accuracy: float | None = None
    text_only_accuracy: float | None = None

    @property
    def image_use(self) -> ImageUse | None:
        """The worst of all sets, which decides; a set of too few images does so only alone."""
        return worst(self.uses.values())

    @property
    def loss(self) -> float:
        return self.nats / self.weight if self.weight else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; figures of the whole set go before those of the gate's subset where both are
        there.
        """
        gate = self.image_use.to_dict() if self.image_use else self._not_judged()
        right = complementary_pairs(self.predictions)
        subset = {"gate_images": gate.pop("images", 0), "gate_texts": gate.pop("contexts", 0)}
        p_eos_first = float(np.mean([p.p_eos_first for p in self.predictions]))
        own = {
            "texts": len(self.predictions),
            **({"without_picture": self.without_picture} if self.without_picture else {}),
            "loss_nats": None if math.isnan(self.loss) else self.loss,
            "accuracy": None,
            **{
                key: value
                for name, known in self.intervals.items()
                for key, value in known.flat(name).items()
            },
            **({"stripped": self.stripped} if self.stripped else {}),
            **{
                kind: {name: i.value for name, i in self.groups.get(kind, {}).items()}
                for kind in _GROUPS
            },
            **{
                f"{kind}_intervals": {name: i.to_dict() for name, i in known.items()}
                for kind, known in self.groups.items()
            },
            "complementary_pairs_right": right.percent,
            "complementary_pairs": right.pairs or None,
            "majority_accuracy": self.majority_accuracy,
            "text_only_accuracy": self.text_only_accuracy,
            "empty_rate": float(np.mean([not p.answer.strip() for p in self.predictions])),
            "p_eos_first": None if math.isnan(p_eos_first) else p_eos_first,
        }
        beside = {"beside": self.beside, "beside_seconds": self.beside_seconds}
        return {**gate, **subset, **self._by_set(), **own, **(beside if self.beside else {})}

    @property
    def without_picture(self) -> int:
        """How many texts have no picture: scored with the others, and left out of the verdict."""
        return sum(not prediction.has_picture for prediction in self.predictions)

    def _not_judged(self) -> dict[str, Any]:
        """Returns what stands in place of a verdict where no text has a picture."""
        if not self.predictions or self.without_picture < len(self.predictions):
            return {}
        why = f"none of its {len(self.predictions):,} texts has a picture"
        return {"verdict": NOT_JUDGED, "reason": why}

    def _by_set(self) -> dict[str, Any]:
        """Returns the verdict of each set, and the pooled exchange named as such; nothing for a
        single set.
        """
        if len(self.uses) < 2:
            return {}
        sets = {name: use.to_dict() for name, use in self.uses.items()}
        pooled = self.pooled.flat("pooled_exchange_points") if self.pooled else {}
        return {"sets": sets, **pooled}


@dataclass
class Evaluation:
    """What one pass over the sets gave, by task."""

    tasks: dict[str, TaskResult] = field(default_factory=dict)
    images: int = 0
    without_picture: int = 0  # records of texts alone
    unreadable: int = 0
    pixels: str | None = None  # how they were made; None: of no picture
    shown: list[Prediction] = field(
        default_factory=list
    )  # the same images every time, one text each
    shown_images: list[Shown] = field(default_factory=list)

    def by_task(self) -> dict[str, dict[str, Any]]:
        """Returns all that is known of each task, JSON-ready."""
        return {task: result.to_dict() for task, result in self.tasks.items()}

    def metrics(self) -> dict[str, float]:
        """Returns the few figures to watch in training; of several tasks each name starts with its
        task.
        """
        values: dict[str, float] = {}
        for task, result in self.tasks.items():
            known = result.to_dict()
            named = {"loss": known["loss_nats"], **{k: known.get(k) for k in _IN_METRICS}}
            if result.image_use:
                use = result.image_use
                name = "image_used" if use.is_whole else "exchange_noticed"
                named[name] = float(use.used or use.verdict == EXCHANGE_NOTICED)
            prefix = f"{task}/" if len(self.tasks) > 1 else ""
            values |= {prefix + name: value for name, value in named.items() if value is not None}
        return values
