"""Does the answer come from the image? Counterfactuals on a fixed subset, and a verdict in words.

Batches with their image tokens and losses -> the same under images shuffled among contexts, left
out, blank or noise
-> ImageUse. The evidence is paired: every context is its own control, so only the image differs.
Legend: I images, C contexts, T targets, N bridge rows, Q queries, D width.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from harness.config.schema import DecodingConfig, EvaluationConfig
from harness.evaluate import vqa
from harness.evaluate.bootstrap import Interval, image_rows, ratio
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import ImageTokens, Prediction, select
from harness.model.batch import Batch

Verdict = Literal["image used", "image ignored", "EOS collapse", "not enough evidence"]

LOSS_MARGIN = (
    0.01  # nats per target token: the lower bound of a gap that counts as use of the image
)
LOSS_NEGLIGIBLE = (
    0.02  # nats per target token: a gap whose upper bound is below this is as good as none
)
# nats per target token: a mean change in either direction that shows that images are told apart
LOSS_MOVED = 0.2
SCORE_MARGIN = (
    1.0  # points: a percent of VQA accuracy, or a hundredth of CIDEr-D, which papers call a point
)
COLLAPSE = 0.5  # share of outputs that are empty, or mean probability of ending at once
FEWEST_IMAGES = 30  # a bootstrap over fewer is too narrow to be believed
_SEED = 0  # of donors and partners: the same for every run, so that runs compare


@dataclass(frozen=True)
class ImageUse:
    """The evidence and the verdict for one task. Scores and their gap in points (VQA accuracy in
    percent, CIDEr-D times 100), losses in nats per target token, all on the subset; None where it
    was not measured.
    """

    verdict: Verdict
    reason: str
    causes: tuple[
        str, ...
    ]  # of an EOS collapse, found in the batches that the model was trained with
    images: int
    trained_on: int  # of these images: what was learnt by heart looks like use
    contexts: int
    left_out: int  # contexts of a batch with a single image, where nothing could be exchanged
    loss_nats: dict[str, float]  # under true, shuffled, no_image, blank, noise
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

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, flat: `shuffled_accuracy` or `shuffled_CIDEr`, `loss_gap_nats`,
        `loss_gap_nats_low` ...; None for what is unknown.
        """
        flat = asdict(self)
        flat["loss_moved_nats"] = flat.pop("loss_moved")
        losses = flat.pop("loss_nats")
        scores = flat.pop("scores")
        measure = flat.pop("measure")
        flat |= {f"{name}_loss_nats": value for name, value in losses.items()}
        flat |= {
            f"{name}_{measure}": scores.get(name)
            for name in ("true", "shuffled", "no_image", "blank", "noise")
        }
        del flat["loss_gap"], flat["score_gap"]
        unknown = Interval(math.nan, math.nan, math.nan)
        flat |= (self.loss_gap or unknown).flat("loss_gap_nats") | self.score_gap.flat(
            f"{measure}_gap"
        )
        return {
            k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in flat.items()
        }


# ---- the counterfactuals -------------------------------------------------------------------------


def donors(images: int, roll: int) -> torch.Tensor:
    """donor_I: for every image another one. A roll, not a random permutation: none may keep its
    own.
    """
    if images < 2:
        raise ValueError(f"images can be exchanged among at least 2, this batch has {images}")
    return (torch.arange(images) + 1 + roll % (images - 1)) % images


def exchanged(
    model: Any, batch: Batch, tokens: ImageTokens, image_of_C: torch.Tensor
) -> ImageTokens:
    """Returns the image tokens of other images of the batch. A bridge that reads the question makes
    them anew, with each context's own words; all others have made them already.
    """
    if getattr(model, "question_aware", False):
        return model.bridge_tokens(replace(batch, image_of_C=image_of_C))
    return tokens.with_rows(image_of_C)


class ContextSums(NamedTuple):
    """Sums over the targets of each context."""

    nats_C: np.ndarray
    weight_C: np.ndarray


class Counted(NamedTuple):
    """How many of some pairs have a property."""

    having: int
    pairs: int

    @property
    def percent(self) -> float | None:
        """None where there are no pairs."""
        return 100 * self.having / self.pairs if self.pairs else None


def sums_per_context(loss: Any, batch: Batch) -> ContextSums:
    """Sums a LossOutput over the targets of each context."""

    def summed(values_T: torch.Tensor) -> np.ndarray:
        zeros_C = torch.zeros(len(batch.image_of_C), dtype=torch.float64, device=values_T.device)
        return zeros_C.index_add_(0, batch.context_of_T, values_T.double()).cpu().numpy()

    return ContextSums(summed(loss.sum_T), summed(loss.weight_T))


@dataclass
class _Row:
    """One context under every condition."""

    prediction: Prediction
    image: tuple[str, str, str]
    weight: float
    nats: dict[str, float]
    said: dict[str, str]


@dataclass
class Gate:
    """Collects the evidence of one task batch by batch; `result` judges it.

    `controls` are the image tokens (N, Q, D) of the blank and the noise images, by condition.
    `trained_on` holds the (dataset, split, key) of images that the model was trained on, `epochs`
    says how often it saw its training set (none: unknown), `training_batch` makes a batch as in
    training, asked only for the causes of an EOS collapse.
    """

    model: Any
    task: str
    decoding: DecodingConfig
    config: EvaluationConfig
    controls: Mapping[str, torch.Tensor] = field(default_factory=dict)
    no_image: bool = True  # measure it too, where the model can do without an image
    trained_on: Container[tuple[str, str, str]] = ()
    epochs: float | None = None
    training_batch: Callable[[], Batch | None] | None = None
    left_out: int = 0
    _rows: list[_Row] = field(default_factory=list)
    _said: dict[tuple[str, str, int], str] = field(
        default_factory=dict
    )  # (condition, prompt, control image) -> answer
    _batches: int = 0

    @torch.no_grad()
    def add(
        self,
        batch: Batch,
        tokens: ImageTokens,
        nats_C: np.ndarray,
        weight_C: np.ndarray,
        said: Sequence[Prediction],
    ) -> None:
        """Takes a batch of this task, its image tokens, its losses per context and its predictions
        under the true images.
        """
        if batch.images < 2:
            self.left_out += len(batch.contexts)
            return
        rng = np.random.default_rng((_SEED, self._batches))
        self._batches += 1
        donor_I = donors(batch.images, int(rng.integers(1 << 30))).to(batch.image_of_C.device)
        others = {"shuffled": exchanged(self.model, batch, tokens, donor_I[batch.image_of_C])}
        if self.no_image and (without := tokens.without_tokens()) is not None:
            others["no_image"] = without
        for name, tokens_NQD in self.controls.items():
            row_of_C = (batch.image_of_C + self._batches) % len(tokens_NQD)
            made: Any = type(tokens)
            others[name] = made(tokens_NQD, row_of_C)
        rows = [
            _Row(p, (p.dataset, p.split, p.key), float(w), {"true": float(n)}, {"true": p.answer})
            for p, w, n in zip(said, weight_C, nats_C, strict=True)
        ]
        for name, other in others.items():
            for row, nats in zip(
                rows, sums_per_context(self.model.loss(batch, other), batch)[0], strict=True
            ):
                row.nats[name] = float(nats)
            for row, answer in zip(rows, self._answers(name, batch, other), strict=True):
                row.said[name] = answer
        self._rows += rows

    def _answers(self, condition: str, batch: Batch, tokens: ImageTokens) -> list[str]:
        """Without the true image many contexts are the same (image, prompt): each is asked once in
        the whole gate.
        """
        if condition == "shuffled":
            return self.model.generate(batch, self.decoding, tokens).texts
        shown = (
            [0] * len(batch.contexts) if condition == "no_image" else tokens.token_row_of_C.tolist()
        )
        keys = [
            (condition, context.prompt, row)
            for context, row in zip(batch.contexts, shown, strict=True)
        ]
        new = {
            key: index for index, key in reversed(list(enumerate(keys))) if key not in self._said
        }
        if new:
            rows = list(new.values())
            part = tokens.with_rows(tokens.token_row_of_C[rows])
            self._said |= zip(
                new,
                self.model.generate(select(batch, rows), self.decoding, part).texts,
                strict=True,
            )
        return [self._said[key] for key in keys]

    @property
    def texts(self) -> int:
        return len(self._rows) + self.left_out

    def result(self) -> ImageUse | None:
        """Returns the verdict on what was collected; None if that is nothing."""
        if not self._rows:
            return None
        rows = self._rows
        images = {row.image for row in rows}
        weight_C = np.array([row.weight for row in rows])
        change_C = np.array([row.nats["shuffled"] - row.nats["true"] for row in rows])
        loss_gap = None if np.isnan(change_C).any() else self._gap(change_C, weight_C)
        loss_moved = float(np.abs(change_C).sum() / weight_C.sum())
        measure = TASKS[self.task].measure
        score_C = self._scores()
        score_gap = self._gap(100 * (score_C["true"] - score_C["shuffled"]), np.ones(len(rows)))
        predictions = [row.prediction for row in rows]
        changed = changed_where_truth_differs(predictions)
        empty_rate = float(np.mean([not p.answer.strip() for p in predictions]))
        p_eos_first = float(np.mean([p.p_eos_first for p in predictions]))
        known = sum(image in self.trained_on for image in images)
        verdict, reason = judge(
            *(loss_gap, score_gap, empty_rate, p_eos_first, len(images), known, self.epochs),
            *(loss_moved, measure),
        )
        causes = self._causes() if verdict == "EOS collapse" else None
        if causes is not None:
            reason += "; found in a batch made as in training: " + (
                "; ".join(causes) or "none of the known causes"
            )
        return ImageUse(
            verdict=verdict,
            reason=reason,
            causes=causes or (),
            images=len(images),
            trained_on=known,
            contexts=len(rows),
            left_out=self.left_out,
            loss_nats={
                name: sum(row.nats[name] for row in rows) / weight_C.sum() for name in rows[0].nats
            },
            loss_gap=loss_gap,
            loss_moved=loss_moved,
            measure=measure,
            scores={name: vqa.percent(list(values_C)) for name, values_C in score_C.items()},
            score_gap=score_gap,
            answers_changed_where_truth_differs=changed.percent,
            pairs_where_truth_differs=changed.pairs,
            distinct_outputs=len({vqa.normalise(p.answer) for p in predictions}),
            empty_rate=empty_rate,
            p_eos_first=p_eos_first,
        )

    def _gap(self, difference_C: np.ndarray, per_C: np.ndarray) -> Interval:
        """Returns sum(difference) / sum(per) with its interval over images."""
        row_C = image_rows(row.image for row in self._rows)
        sums_I = np.bincount(row_C, difference_C)
        per_I = np.bincount(row_C, per_C)
        return ratio(sums_I, per_I, self.config.bootstrap, self.config.confidence)

    def _scores(self) -> dict[str, np.ndarray]:
        """Returns the score of each context under each condition."""
        truths = [row.prediction.references for row in self._rows]
        score = TASKS[self.task].scores
        return {
            name: np.array(score([row.said[name] for row in self._rows], truths))
            for name in self._rows[0].said
        }

    def _causes(self) -> tuple[str, ...] | None:
        """Returns what a batch made as in training shows of a collapse; None without a batch."""
        batch = self.training_batch() if self.training_batch else None
        if batch is None:
            return None
        bos = _bos_in_generation_only(self.model)
        return tuple(causes_of_collapse(batch, self.model.tokenizer, bos))


# ---- the evidence --------------------------------------------------------------------------------


def changed_where_truth_differs(predictions: Sequence[Prediction]) -> Counted:
    """Counts the answers that change with the image. Each context is paired with one of another
    image that has the same prompt and another true answer (both the most common one), where such a
    one is in the subset.

    What the model says to that context is what it says when the images of the two are exchanged, so
    the pair is a counterfactual whose right answer is known to differ; a model that ignores its
    images never changes its answer.
    """
    groups: dict[str, list[int]] = defaultdict(list)
    for index, prediction in enumerate(predictions):
        groups[prediction.prompt].append(index)
    truth = [vqa.normalise(vqa.most_common(p.references)) for p in predictions]
    said = [vqa.normalise(p.answer) for p in predictions]
    rng = np.random.default_rng(_SEED)
    changed = pairs = 0
    for group in groups.values():
        order = rng.permutation(group)
        for position, one in enumerate(order):
            for step in range(1, len(order)):
                other = order[(position + step) % len(order)]
                if truth[one] != truth[other] and predictions[one].key != predictions[other].key:
                    pairs += 1
                    changed += said[one] != said[other]
                    break
    return Counted(changed, pairs)


def complementary_pairs(predictions: Sequence[Prediction]) -> Counted:
    """Counts the pairs of which both answers are right: the same question on two similar images
    with different answers, as VQAv2 names them (`meta.pair_id`, the id of the other question);
    right is an official accuracy of at least 0.5.

    Knowledge of the texts alone gets none of them. The best of the old published figures is 17.7%
    of pairs (as the plan of this project has it; the paper was not at hand to be checked).
    """
    right = {
        p.id: vqa.accuracy(p.answer, p.references) >= 0.5
        for p in predictions
        if p.meta.get("pair_id")
    }
    pairs = {
        tuple(sorted((p.id, other)))
        for p in predictions
        if (other := (p.dataset, p.split, str(p.meta.get("pair_id")))) in right and p.id in right
    }
    return Counted(sum(right[one] and right[other] for one, other in pairs), len(pairs))


def judge(
    loss_gap: Interval | None,
    score_gap: Interval,
    empty_rate: float,
    p_eos_first: float,
    images: int,
    trained_on: int = 0,
    epochs: float | None = None,
    loss_moved: float = 0.0,
    measure: str = "accuracy",
) -> tuple[Verdict, str]:
    """Returns the verdict and its reason. `image used` needs every lower bound above its margin;
    doubt is never use.

    It also needs images that were not among the `trained_on`, and neither doubt nor `image ignored`
    means anything before the model has seen its training set once (`epochs`).
    """
    raises = f"raises the loss by {loss_gap} nats per target token and " if loss_gap else ""
    evidence = f"exchanging the images {raises}lowers the {measure} by {score_gap} points"
    if empty_rate > COLLAPSE or p_eos_first > COLLAPSE:
        return "EOS collapse", (
            f"{empty_rate:.0%} of the outputs are empty and the model ends before the first word "
            f"with probability {p_eos_first:.2f}; above {COLLAPSE:.0%} it says nothing, whatever "
            "the image"
        )
    if images < FEWEST_IMAGES:
        return "not enough evidence", (
            f"{images} images are fewer than the {FEWEST_IMAGES} an interval needs; {evidence}"
        )
    loss_used = loss_gap is not None and loss_gap.low > LOSS_MARGIN
    score_used = score_gap.low > SCORE_MARGIN
    if (loss_used or loss_gap is None) and score_used:
        if trained_on:
            return "not enough evidence", (
                f"{trained_on} of the {images} images were trained on, and a model that knows them "
                f"by heart looks as if it used them: test on new images; {evidence}"
            )
        margins = f"{LOSS_MARGIN} nats and " if loss_gap else ""
        return "image used", (
            f"{evidence}; the lower bounds are above {margins}{SCORE_MARGIN:g} points"
        )
    if epochs is not None and epochs < 1:
        why = f"after {epochs:.2g} of the first epoch it is too early to tell"
        return "not enough evidence", f"{evidence}; {why}"
    bound = _bound_of_ignoring(loss_gap, score_gap)
    if bound and not loss_used and not score_used:
        return "image ignored", f"{evidence}; {bound}"
    why = _doubt(loss_gap, loss_used, score_used, loss_moved, measure)
    return "not enough evidence", f"{evidence}; {why}"


def _bound_of_ignoring(loss_gap: Interval | None, score_gap: Interval) -> str:
    """Says which upper bound shows that another image is as good; "" where none does."""
    if loss_gap is None:
        if score_gap.high < SCORE_MARGIN:
            return f"the upper bound is below {SCORE_MARGIN:g} points: another is as good"
    elif loss_gap.high < LOSS_NEGLIGIBLE:
        return f"the upper bound is below {LOSS_NEGLIGIBLE} nats: another image is as good"
    return ""


def _doubt(
    loss_gap: Interval | None, loss_used: bool, score_used: bool, loss_moved: float, measure: str
) -> str:
    """Says why the evidence shows neither use of the image nor that it is ignored."""
    if loss_gap is None:
        return "the model gives no loss: test on more texts"
    if loss_used:
        return (
            f"the loss depends on the image, but the lower bound of the {measure} gap is not above "
            f"{SCORE_MARGIN:g} points: train longer or test on more texts"
        )
    if loss_moved > LOSS_MOVED:
        return (
            f"another image moves the loss of a text by {loss_moved:.3f} nats, in either "
            "direction: the output follows which image it is and not what it shows (images learnt "
            "by heart, or nothing learnt yet)"
        )
    if score_used:
        return (
            f"the {measure} depends on the image, but the lower bound of the loss gap is not above "
            f"{LOSS_MARGIN} nats: train longer or test on more texts"
        )
    return (
        f"the interval of the loss gap reaches from below {LOSS_MARGIN} to above {LOSS_NEGLIGIBLE} "
        "nats, so it shows neither: train longer or test on more texts"
    )


def causes_of_collapse(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, bos_in_generation_only: bool = False
) -> list[str]:
    """Returns in words what in a training batch teaches a model to end at once; [] where it is none
    of the known causes.
    """
    weight_TL = batch.weight_TL.double()
    is_eos_TL = batch.labels_TL == tokenizer.eos_token_id
    behind_TL = (
        is_eos_TL.cumsum(dim=1) - is_eos_TL.int() > 0
    )  # behind the first EOS of a row: padding
    total = float(weight_TL.sum())
    causes: list[str] = []
    if not total:
        return causes
    if (padding := float(weight_TL[behind_TL].sum()) / total) > 0:
        causes.append(
            f"{padding:.0%} of the weight of the labels lies on padding behind the first EOS, "
            "which must weigh nothing (known_mistakes.loss_on_padding)"
        )
    if starting := int((is_eos_TL[:, 0] & (weight_TL[:, 0] > 0)).sum()):
        causes.append(
            f"{starting} of {len(is_eos_TL)} targets start with EOS, so that to end at once is "
            "right"
        )
    if bos_in_generation_only:
        causes.append(
            "generation begins with a BOS token that training never showed (known_mistakes.bos)"
        )
    if (share := float(weight_TL[is_eos_TL].sum()) / total) > COLLAPSE:
        causes.append(f"EOS carries {share:.0%} of all target weight (train.eos_loss_weight)")
    return causes


def _bos_in_generation_only(model: Any) -> bool:
    return not getattr(getattr(model, "lm", None), "bos_in_training", True)
