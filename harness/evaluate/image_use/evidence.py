"""What the gate knows of one set and task: the terms of its verdict, each with an interval and a
margin, and the figures beside them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from harness.evaluate.bootstrap import Interval

# nats per target token: the lower bound of a gap that counts as use of the image
LOSS_MARGIN = 0.01
# nats per target token: a gap whose upper bound is below this is as good as none
LOSS_NEGLIGIBLE = 0.02
# points: a percent of VQA accuracy, or a hundredth of CIDEr-D, which papers call a point
SCORE_MARGIN = 1.0
# share of outputs that are empty or never end, or mean probability of ending at once
COLLAPSE = 0.5
FEWEST_IMAGES = 30  # a bootstrap over fewer is too narrow to be believed

IMAGE_USED = "image used"
# The best that can be said without floors and recall, as during training: it is never use.
EXCHANGE_NOTICED = "exchange noticed"
IMAGE_IGNORED = "image ignored"
NOT_ENOUGH = "not enough evidence"
NOT_JUDGED = "not judged: no picture"  # in place of a verdict
NO_CONTENT = f"{NOT_ENOUGH}: this set can be answered without looking at content"
# The names of verdicts, worst first: the worst of several sets decides.
WORST_FIRST = (
    "EOS collapse",
    "endless captions",
    "set only",
    IMAGE_IGNORED,
    "global statistics only",
    "not above global statistics",
    "retrieval is as good",
    NOT_ENOUGH,
    EXCHANGE_NOTICED,
    IMAGE_USED,
)

EXCHANGE = "exchange"
MATCHED = "matched exchange"
TEXT_ONLY = "text only"
SHALLOW = "shallow floor"
RECALL = "recall"
NEIGHBOUR = "neighbour floor"
FLOORS = (TEXT_ONLY, SHALLOW, NEIGHBOUR)
# What a verdict of use rests on beside the exchanges.
BEYOND_EXCHANGES = (SHALLOW, RECALL, NEIGHBOUR)


@dataclass(frozen=True)
class Term:
    """One condition of `image used`: how far the model is above it, in points, with the interval
    over images. It is passed where the lower bound is above the margin.

    `advantage` is None where it was not measured, and `missing` says why. `nats` is the same for
    the loss, where it has one. `score` is what the floor or counterfactual itself reaches.
    """

    name: str
    advantage: Interval | None
    nats: Interval | None = None
    score: float | None = None
    margin: float = SCORE_MARGIN
    images: int = 0
    missing: str = ""
    about: str = ""  # how it was measured, where that differs from its definition
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every lower bound is above its margin; never where it was not measured."""
        if self.advantage is None or not self.advantage.low > self.margin:
            return False
        return self.nats is None or self.nats.low > LOSS_MARGIN

    @property
    def lacking(self) -> float:
        """Points that the lower bound lacks to its margin; 0 where it has them."""
        if self.advantage is None or not math.isfinite(self.advantage.low):
            return math.inf
        return max(0.0, self.margin - self.advantage.low)

    def flat(self) -> dict[str, Any]:
        """Returns it JSON-ready, with keys that begin with its name."""
        name = self.name.replace(" ", "_")
        if self.advantage is None:
            return {f"{name}_missing": self.missing}
        found: dict[str, Any] = {f"{name}_score": self.score, f"{name}_images": self.images}
        found |= self.advantage.flat(f"{name}_advantage")
        if self.nats is not None:
            found |= self.nats.flat(f"{name}_nats")
        if self.about:
            found[f"{name}_about"] = self.about
        if self.seconds:
            found[f"{name}_seconds"] = round(self.seconds, 2)
        return found


@dataclass(frozen=True)
class ImageUse:
    """The evidence and the verdict for one set and task. Scores and their gap in points (VQA
    accuracy in percent, CIDEr-D times 100), losses in nats per target token, all on the subset;
    None where it was not measured.
    """

    verdict: str
    reason: str
    set: str  # DATASET_SPLIT
    causes: tuple[str, ...]  # of a collapse, found in the batches that the model was trained with
    images: int
    trained_on: int  # of these images: what was learnt by heart looks like use
    contexts: int
    left_out: int  # contexts that were not judged: answers made elsewhere may have gaps
    loss_nats: dict[str, float]  # under true, shuffled, matched, no_image, blank, noise
    loss_gap: Interval | None  # shuffled - true; None for a model that gives no loss
    loss_moved: float  # mean of |shuffled - true| over the contexts
    measure: str  # what the scores are: accuracy or CIDEr
    scores: dict[str, float]  # the same conditions
    score_gap: Interval  # true - shuffled
    answers_changed_where_truth_differs: float | None  # percent of `pairs_where_truth_differs`
    pairs_where_truth_differs: int
    distinct_outputs: int
    empty_rate: float
    p_eos_first: float
    terms: tuple[Term, ...] = ()
    advice: str = ""  # what would change the verdict
    # of the image tokens' mean square, that differs from picture to picture; None: not known
    image_share: float | None = None
    gap_by_type: Mapping[str, Interval] = field(default_factory=dict)  # of questions, in points

    @property
    def used(self) -> bool:
        return self.verdict.startswith(IMAGE_USED)

    @property
    def is_whole(self) -> bool:
        """Whether it was judged by floors and recall too, and not by exchanges alone."""
        return any(term.name in BEYOND_EXCHANGES for term in self.terms)

    @property
    def name(self) -> str:
        """The verdict without what stands behind it."""
        return next((n for n in WORST_FIRST if self.verdict.startswith(n)), self.verdict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, flat: `shuffled_accuracy` or `shuffled_CIDEr`, `loss_gap_nats`,
        `loss_gap_nats_low`, `shallow_floor_advantage` ...; None for what is unknown.
        """
        apart = ("loss_gap", "score_gap", "terms", "loss_nats", "scores", "gap_by_type")
        flat = {name: value for name, value in vars(self).items() if name not in apart}
        flat["loss_moved_nats"] = flat.pop("loss_moved")
        measure = flat.pop("measure")
        flat |= {f"{name}_loss_nats": value for name, value in self.loss_nats.items()}
        conditions = dict.fromkeys(("true", "shuffled", "no_image", "blank", "noise"))
        flat |= {f"{name}_{measure}": value for name, value in (conditions | self.scores).items()}
        unknown = Interval(math.nan, math.nan, math.nan)
        flat |= (self.loss_gap or unknown).flat("loss_gap_nats")
        flat |= self.score_gap.flat(f"{measure}_gap")
        for term in self.terms:
            flat |= term.flat()
        if self.gap_by_type:
            flat["gap_by_type"] = {k: i.to_dict(3) for k, i in self.gap_by_type.items()}
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in flat.items()
        }
