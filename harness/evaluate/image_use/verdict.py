"""Evidence -> a verdict, its reason, and what would change it. Pure: no model, no data.

`image used` needs every term that was measured, and the two exchanges always; each other name says
what was used instead, the worst first. Doubt is never use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from harness.evaluate.image_use.evidence import (
    COLLAPSE,
    EXCHANGE,
    EXCHANGE_NOTICED,
    FEWEST_IMAGES,
    FLOORS,
    IMAGE_IGNORED,
    IMAGE_USED,
    LOSS_MARGIN,
    LOSS_NEGLIGIBLE,
    MATCHED,
    NEIGHBOUR,
    NO_CONTENT,
    NOT_ENOUGH,
    SCORE_MARGIN,
    SHALLOW,
    TEXT_ONLY,
    WORST_FIRST,
    ImageUse,
    Term,
)

# nats per target token: a mean change in either direction that shows that images are told apart
LOSS_MOVED = 0.2
# share of the image tokens that differs from picture to picture; a bridge that learns has 0.1 to 1,
# one that has collapsed 0.00003 to 0.01 (docs/log.md, 2026-11-28)
SAME_TOKENS = 0.02
_NEAR_THE_TOP = 2.0  # points below the highest possible score: such a floor leaves no room

ADVICE = {
    "EOS collapse": "mend what teaches the model to end at once (why-is-my-caption-empty.md)",
    "endless captions": "check that the targets end with EOS and that it has weight "
    "(train.eos_loss_weight), or raise generate.caption.max_new_tokens",
    "set only": "train on more images of each set, or look at each set alone: the model tells "
    "the sets apart and nothing within them",
    IMAGE_IGNORED: "check that the bridge trains (harness doctor), train longer, or raise its "
    "learning rate",
    "global statistics only": "train longer or on a better encoder: brightness, colours and sizes "
    "of a picture give the same answers",
    "not above global statistics": "train further, until the score is above what the words of the "
    "question and statistics of the picture give",
    "retrieval is as good": "train further or on more pictures: captions copied from the nearest "
    "training pictures are as good",
    NO_CONTENT: "judge it on a set whose answers need more than statistics of the picture",
    NOT_ENOUGH: "test on more texts and pictures, or train longer",
    EXCHANGE_NOTICED: "an evaluation measures the floors too (harness evaluate RUN)",
    IMAGE_USED: "",
}
SAME_TOKENS_ADVICE = "begin anew with a lower train.bridge_learning_rate or a longer train.warmup"


@dataclass(frozen=True)
class Evidence:
    """All that a verdict rests on, of one set and task."""

    exchange: Term
    matched: Term
    further: tuple[Term, ...] = ()  # floors and recall, as the task has them
    across: Term | None = None  # the exchange with images of another set, where it was measured
    images: int = 0
    trained_on: int = 0
    epochs: float | None = None
    measure: str = "accuracy"
    loss_moved: float = 0.0
    empty_rate: float = 0.0
    endless_rate: float = 0.0
    p_eos_first: float = 0.0
    not_finite: str = ""  # what of it is NaN or infinite
    highest: float | None = None  # the score of the best possible answers
    image_share: float | None = None  # of the image tokens, that differs from picture to picture


class Judgement(NamedTuple):
    """A verdict, why it was given and what would change it."""

    verdict: str
    reason: str
    advice: str = ""


def judge(evidence: Evidence) -> Judgement:
    """Returns the first name that holds. Collapses come before everything: what says nothing, or
    never ends, has shown nothing of its images.
    """
    named = _named(evidence)
    if named.verdict == IMAGE_IGNORED and (same := told_same_tokens(evidence.image_share)):
        return Judgement(named.verdict, f"{named.reason}; {same}", SAME_TOKENS_ADVICE)
    return named._replace(advice=ADVICE.get(named.verdict, ""))


def told_same_tokens(image_share: float | None) -> str:
    """Says that a bridge has collapsed, so that nothing behind it can use the image; "" where it
    has not, or where that is not known.
    """
    if image_share is None or image_share > SAME_TOKENS:
        return ""
    return (
        f"the bridge has collapsed: of the size of its image tokens a share of {image_share:.2g} "
        "differs from picture to picture"
    )


def judge_exchange(evidence: Evidence) -> Judgement:
    """Judges by exchanges alone, as during training: `exchange noticed` at best, never use.

    Where no exchange was matched either, the one with any image of the set decides.
    """
    found = judge(evidence)
    is_unmatched = evidence.matched.advantage is None and evidence.exchange.passed
    collapsed = found.verdict in ("EOS collapse", "endless captions")
    if found.verdict == IMAGE_USED or (is_unmatched and not collapsed and not evidence.not_finite):
        return Judgement(EXCHANGE_NOTICED, _told(evidence), ADVICE[EXCHANGE_NOTICED])
    return found


def worst(uses: Iterable[ImageUse]) -> ImageUse | None:
    """Returns the worst use. A set of too few images does not decide beside larger ones."""
    found = list(uses)
    large = [use for use in found if use.images >= FEWEST_IMAGES]
    return min(large or found, key=lambda use: WORST_FIRST.index(use.name), default=None)


def _named(e: Evidence) -> Judgement:
    told = _told(e)
    if e.not_finite:
        why = f"{e.not_finite}: nothing can be said of a model whose figures are none"
        return Judgement(NOT_ENOUGH, why)
    if e.empty_rate > COLLAPSE or e.p_eos_first > COLLAPSE:
        why = (
            f"{e.empty_rate:.0%} of the outputs are empty and the model ends before the first word "
            f"with probability {e.p_eos_first:.2f}; above {COLLAPSE:.0%} it says nothing, whatever "
            "the image"
        )
        return Judgement("EOS collapse", why)
    if e.endless_rate > COLLAPSE:
        why = (
            f"{e.endless_rate:.0%} of the captions did not end before they were cut "
            "(generate.caption.max_new_tokens)"
        )
        return Judgement("endless captions", why)
    if e.images < FEWEST_IMAGES:
        why = f"{e.images} images are fewer than the {FEWEST_IMAGES} an interval needs; {told}"
        return Judgement(NOT_ENOUGH, why)
    if top := _at_the_top(e):
        return Judgement(NO_CONTENT, f"{top}; {told}")
    if not e.exchange.passed:
        return _without_exchange(e, told)
    if e.trained_on:
        why = (
            f"{e.trained_on} of the {e.images} images were trained on, and a model that knows them "
            f"by heart looks as if it used them: test on new images; {told}"
        )
        return Judgement(NOT_ENOUGH, why)
    return _by_terms(e, told)


def _at_the_top(e: Evidence) -> str:
    """Says which floor leaves no room above it; "" where none does."""
    for term in e.further:
        if term.name not in FLOORS or term.score is None or e.highest is None:
            continue
        if term.score > e.highest - _NEAR_THE_TOP:
            return (
                f"the {term.name} has {term.score:.1f} of the {e.highest:.1f} points that can be "
                "had, so that a score shows no look at the content"
            )
    return ""


def _by_terms(e: Evidence, told: str) -> Judgement:
    """Names what a model lacks, or has, that changes its answers with the image."""
    if e.matched.advantage is None:
        why = f"the {MATCHED} was not measured ({e.matched.missing}); {told}"
        return Judgement(NOT_ENOUGH, why)
    needed = (e.matched, *e.further)
    failed = [term for term in needed if term.advantage is not None and not term.passed]
    if not failed:
        return _used([term for term in needed if term.advantage is None], told)
    names = {term.name for term in failed}
    name = NOT_ENOUGH
    if MATCHED in names:
        # Clearly cheaper than any other image, or there is doubt.
        if e.exchange.advantage is not None and (
            e.matched.advantage.high < e.exchange.advantage.low
        ):
            name = "global statistics only"
    elif SHALLOW in names and names <= {SHALLOW, TEXT_ONLY}:
        name = "not above global statistics"
    elif names == {NEIGHBOUR}:
        name = "retrieval is as good"
    return Judgement(name, f"{told}; {_lacking(failed)}")


def _used(missing: Sequence[Term], told: str) -> Judgement:
    """Names what could not be measured: it is never counted as passed."""
    why = f"{told}; every lower bound is above its margin"
    if not missing:
        return Judgement(IMAGE_USED, why)
    without = ", ".join(term.name for term in missing)
    why += "; not measured: " + "; ".join(f"{term.name}: {term.missing}" for term in missing)
    return Judgement(f"{IMAGE_USED} (not measured: {without})", why)


def _without_exchange(e: Evidence, told: str) -> Judgement:
    """Names a model whose answers no exchange within the set was shown to change."""
    if e.epochs is not None and e.epochs < 1:
        why = f"{told}; after {e.epochs:.2g} of the first epoch it is too early to tell"
        return Judgement(NOT_ENOUGH, why)
    within = e.exchange.advantage
    if within is None:
        why = f"the {EXCHANGE} was not measured ({e.exchange.missing})"
        return Judgement(NOT_ENOUGH, f"{why}; {told}" if told else why)
    across = e.across.advantage if e.across else None
    if across and across.low > SCORE_MARGIN and within.high < across.low:
        why = (
            f"{told}; images of another set lower the {e.measure} by {across} points: the model "
            "tells the sets apart and nothing within this one"
        )
        return Judgement("set only", why)
    bound = _bound_of_ignoring(e)
    if bound and not _loss_used(e) and not _score_used(e):
        return Judgement(IMAGE_IGNORED, f"{told}; {bound}")
    return Judgement(NOT_ENOUGH, f"{told}; {_doubt(e)}")


def _told(e: Evidence) -> str:
    """Tells the evidence itself, term by term."""
    nats = e.exchange.nats
    raises = f"raises the loss by {nats} nats per target token and " if nats else ""
    cost = e.exchange.advantage
    parts = []
    if cost is not None:
        parts.append(f"exchanging the images {raises}lowers the {e.measure} by {cost} points")
    if e.matched.advantage is not None:
        parts.append(f"the most alike image lowers it by {e.matched.advantage}")
    for term in e.further:
        if term.advantage is None:
            continue
        if term.name in FLOORS:
            parts.append(f"it is {term.advantage} points above the {term.name} ({term.score:.1f})")
        else:
            parts.append(f"{term.name} is {term.advantage} points above chance")
    return "; ".join(parts)


def _lacking(failed: Sequence[Term]) -> str:
    return "lacking: " + ", ".join(
        f"{term.lacking:.1f} points of the {term.name}"
        if term.lacking
        else f"the loss of the {term.name} (lower bound not above {LOSS_MARGIN} nats)"
        for term in failed
    )


def _loss_used(e: Evidence) -> bool:
    return e.exchange.nats is not None and e.exchange.nats.low > LOSS_MARGIN


def _score_used(e: Evidence) -> bool:
    return e.exchange.advantage is not None and e.exchange.advantage.low > SCORE_MARGIN


def _bound_of_ignoring(e: Evidence) -> str:
    """Says which upper bound shows that another image is as good; "" where none does."""
    if e.exchange.nats is None:
        if e.exchange.advantage is not None and e.exchange.advantage.high < SCORE_MARGIN:
            return f"the upper bound is below {SCORE_MARGIN:g} points: another is as good"
    elif e.exchange.nats.high < LOSS_NEGLIGIBLE:
        return f"the upper bound is below {LOSS_NEGLIGIBLE} nats: another image is as good"
    return ""


def _doubt(e: Evidence) -> str:
    """Says why the evidence shows neither use of the image nor that it is ignored."""
    if e.exchange.nats is None:
        return "the model gives no loss: test on more texts"
    if _loss_used(e):
        return (
            f"the loss depends on the image, but the lower bound of the {e.measure} gap is not "
            f"above {SCORE_MARGIN:g} points: train longer or test on more texts"
        )
    if e.loss_moved > LOSS_MOVED:
        return (
            f"another image moves the loss of a text by {e.loss_moved:.3f} nats, in either "
            "direction: the output follows which image it is and not what it shows (images learnt "
            "by heart, or nothing learnt yet)"
        )
    if _score_used(e):
        return (
            f"the {e.measure} depends on the image, but the lower bound of the loss gap is not "
            f"above {LOSS_MARGIN} nats: train longer or test on more texts"
        )
    return (
        f"the interval of the loss gap reaches from below {LOSS_MARGIN} to above {LOSS_NEGLIGIBLE} "
        "nats, so it shows neither: train longer or test on more texts"
    )
