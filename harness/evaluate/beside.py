"""Figures beside the verdict: they help to read it and decide nothing.

What one pass collected -> interaction, neighbour floor, paired accuracy and space of each set and
task -> TaskResult.beside, JSON-ready; a figure that cannot be had is {"missing": reason}. Legend: P
pictures and T prompts of a grid, J judged pictures, C texts, G groups.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from harness.config.schema import EvaluationConfig
from harness.evaluate import vqa
from harness.evaluate.bootstrap import ratio
from harness.evaluate.collected import Collected
from harness.evaluate.floors import above
from harness.evaluate.gate_terms.interaction import additive_answers, complete_grid
from harness.evaluate.gate_terms.neighbours import neighbour_answers
from harness.evaluate.gate_terms.pairs import paired
from harness.evaluate.image_use.evidence import NEIGHBOUR
from harness.evaluate.image_use.gate import Gate
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import Prediction, Stratum
from harness.evaluate.space import (
    Source,
    UnmeasuredError,
    mirrored,
    patches_dropped,
    tiles_shuffled,
)

_NEIGHBOUR_TEXTS = 10_000  # that are answered from the nearest training pictures, evenly spaced

Figure = dict[str, Any]


def add_beside(collected: Collected) -> None:
    """Adds the figures of every set and task."""
    source = Source(collected)
    for stratum, gate in collected.gates.items():
        result = collected.evaluation.tasks[stratum.task]
        figures: dict[str, Figure] = {}
        seconds: dict[str, float] = {}
        for name, measure in _measures(stratum, gate, collected, source).items():
            began = time.perf_counter()
            try:
                figure = measure()
            except UnmeasuredError as error:
                figure = {"missing": str(error)}
            if figure is not None:
                figures[name] = figure
                seconds[name] = round(time.perf_counter() - began, 2)
        result.beside[stratum.set] = figures
        result.beside_seconds[stratum.set] = seconds


def _measures(
    stratum: Stratum, gate: Gate, collected: Collected, source: Source
) -> dict[str, Callable[[], Figure | None]]:
    """Returns what makes each figure, by its name; those of answers for questions alone."""
    settings = collected.config.evaluation
    predictions = collected.evaluation.tasks[stratum.task].predictions
    own = [p for p in predictions if p.set == stratum.set and p.has_picture]
    measures: dict[str, Callable[[], Figure | None]] = {}
    if TASKS[stratum.task].has_right:
        measures["interaction"] = partial(interaction, own, settings)
        measures["neighbour_floor"] = partial(neighbour_floor_of_questions, own, collected)
        measures["paired"] = partial(paired_accuracy, own, settings)
    if settings.space_images:
        most = settings.space_images
        measures["shuffled_tiles"] = partial(tiles_shuffled, gate, source, most)
        measures["mirror_image"] = partial(mirrored, gate, source, most)
        measures["dropped_patches"] = partial(patches_dropped, gate, source, most)
    return measures


def interaction(predictions: Sequence[Prediction], settings: EvaluationConfig) -> Figure:
    """Returns the score of the answers on a grid of pictures and prompts, that of their additive
    part, and the gap between them, in points. Raises UnmeasuredError where no two prompts meet the
    same pictures.
    """
    rows_PT = complete_grid(
        [vqa.same_question(p.question or p.prompt) for p in predictions],
        [p.picture for p in predictions],
    )
    if rows_PT is None:
        raise UnmeasuredError("no two questions were asked of the same ten pictures")
    additive_PT = additive_answers(
        [[vqa.normalise(predictions[row].answer) for row in row_T] for row_T in rows_PT]
    )
    own_PT = np.array([[_points(predictions[row]) for row in row_T] for row_T in rows_PT])
    floor_PT = np.array(
        [
            [_points(predictions[row], said) for row, said in zip(row_T, said_T, strict=True)]
            for row_T, said_T in zip(rows_PT, additive_PT, strict=True)
        ]
    )
    gap_P = (own_PT - floor_PT).mean(axis=1)
    gap = ratio(gap_P, np.ones(len(gap_P)), settings.bootstrap, settings.confidence)
    return {
        "score": float(own_PT.mean()),
        "additive_score": float(floor_PT.mean()),
        **gap.flat("gap"),
        "images": rows_PT.shape[0],
        "prompts": rows_PT.shape[1],
    }


def _points(prediction: Prediction, answer: str | None = None) -> float:
    said = prediction.answer if answer is None else answer
    return 100 * vqa.accuracy(said, prediction.references)


def neighbour_floor_of_questions(predictions: Sequence[Prediction], collected: Collected) -> Figure:
    """Returns how far the answers are above the most common answer that the nearest training
    pictures have to the same question. Raises UnmeasuredError.
    """
    training = collected.training
    if isinstance(training, str):
        raise UnmeasuredError(training)
    training_rows = training.rows_with_questions()
    if not training_rows:
        raise UnmeasuredError("no local training set holds questions")
    count = min(len(predictions), _NEIGHBOUR_TEXTS)
    judged = [predictions[int(row)] for row in np.linspace(0, len(predictions) - 1, count)]
    pictures = list(dict.fromkeys(p.picture for p in judged))
    row_of = {picture: row for row, picture in enumerate(pictures)}
    said = neighbour_answers(
        [p.question or p.prompt for p in judged],
        [row_of[p.picture] for p in judged],
        np.stack([collected.pooled[picture] for picture in pictures]),
        training.features_of(training_rows),
        [training.questions_N[row] for row in training_rows],
    )
    term = above(NEIGHBOUR, judged, said, collected.config.evaluation, 0.0)
    assert term.advantage is not None  # as it was measured
    return {
        "score": term.score,
        **term.advantage.flat("advantage"),
        "images": term.images,
        "texts": count,
        "training_images": len(training_rows),
    }


def paired_accuracy(predictions: Sequence[Prediction], settings: EvaluationConfig) -> Figure:
    """Returns NaturalBench's shares in percent, the group accuracy with its interval over groups.
    Raises UnmeasuredError where no pictures are opposite.
    """
    found = paired(
        [p.question or p.prompt for p in predictions],
        [p.picture for p in predictions],
        [vqa.normalise(vqa.most_common(p.references)) for p in predictions],
        [_points(p) >= 50 for p in predictions],
        [_pair(p) for p in predictions],
    )
    if found is None:
        raise UnmeasuredError("no two pictures have opposite answers to the same questions")
    right_G = np.arange(found.groups) < round(found.group_accuracy * found.groups)
    ones_G = np.ones(found.groups)
    accuracy = ratio(100.0 * right_G, ones_G, settings.bootstrap, settings.confidence)
    return {
        **accuracy.flat("group_accuracy"),
        "question_accuracy": 100 * found.question_accuracy,
        "image_accuracy": 100 * found.image_accuracy,
        "chance": 100 * found.chance,
        "groups": found.groups,
        "questions": found.questions,
    }


def _pair(prediction: Prediction) -> tuple[str, ...] | None:
    """Returns the name of a complementary pair: the ids of its two questions."""
    other = prediction.meta.get("pair_id")
    return tuple(sorted((prediction.text_id, str(other)))) if other else None
