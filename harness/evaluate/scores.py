"""Predictions -> the official scores with their intervals, over all sets given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harness.config.schema import EvaluationConfig
from harness.evaluate import captions, vqa
from harness.evaluate.bootstrap import Interval
from harness.evaluate.collected import Collected
from harness.evaluate.floor import Majority
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import Prediction


def add_scores(
    collected: Collected, majority: Majority | None, text_only_accuracy: float | None
) -> None:
    """Fills in the scores and known floors of every task, once all its predictions are there."""
    settings = collected.config.evaluation
    for task, result in collected.evaluation.tasks.items():
        result.predictions.sort(key=lambda p: collected.place[p.picture])
        if not TASKS[task].has_right:
            result.intervals = score_captions(result.predictions, settings)
            result.stripped = score_stripped(result.predictions)
            continue
        scored = score_vqa(result.predictions, settings)
        result.intervals = {"accuracy": scored.pop("overall")}
        result.groups = scored
        result.majority_accuracy = majority.accuracy(result.predictions) if majority else None
        result.text_only_accuracy = text_only_accuracy


def score_vqa(predictions: Sequence[Prediction], settings: EvaluationConfig) -> dict[str, Any]:
    """Returns the official accuracies over all sets given, as `vqa.intervals` has them."""
    said = {"/".join(p.id): p.answer for p in predictions}
    truths = [
        vqa.VQATruth(
            question_id="/".join(p.id),
            answers=p.references,
            answer_type=_group(p.meta.get("answer_type")),
            question_type=_group(p.meta.get("question_type")),
            image_id="/".join((p.dataset, p.split, p.key)),
        )
        for p in predictions
    ]
    return vqa.intervals(vqa.graded(said, truths), settings.confidence, settings.bootstrap)


def _group(name: Any) -> str | None:
    """Returns the name of a group of questions, which a set made elsewhere may give as anything."""
    return None if name is None else str(name)


def score_captions(
    predictions: Sequence[Prediction], settings: EvaluationConfig
) -> dict[str, Interval]:
    """Returns BLEU, ROUGE-L and CIDEr-D, with the document frequencies of all sets given."""
    scores = captions.score(*_said_and_wanted(predictions))
    return scores.with_intervals(settings.confidence, settings.bootstrap)


def score_stripped(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Returns the same measures of captions and references without punctuation, digits and words
    of one letter, as some projects publish them: beside the official ones, never in their place.
    """
    return captions.stripped_scores(*_said_and_wanted(predictions)).corpus


def _said_and_wanted(
    predictions: Sequence[Prediction],
) -> tuple[dict[str, str], dict[str, Sequence[str]]]:
    said = {"/".join(p.id): p.answer for p in predictions}
    return said, {"/".join(p.id): p.references for p in predictions}
