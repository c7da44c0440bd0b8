"""The floors of the gate: what a score reaches without looking at the content of a picture.

Predictions of one set -> what a random forest on words and statistics would have answered, or the
captions of the nearest training pictures -> a Term, paired over the same texts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from harness.config.schema import EvaluationConfig
from harness.evaluate import vqa
from harness.evaluate.bootstrap import image_rows, per_text
from harness.evaluate.collected import Collected
from harness.evaluate.gate_terms.neighbours import consensus_captions
from harness.evaluate.gate_terms.shallow import ShallowFloor, shallow_answers
from harness.evaluate.image_use.evidence import NEIGHBOUR, SHALLOW, Term
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import Prediction


def shallow_floor(
    predictions: Sequence[Prediction], statistics_IK: np.ndarray, settings: EvaluationConfig
) -> Term:
    """Returns how far the answers are above those of a random forest on the question's words and
    statistics of the picture (`statistics_IK`, in the order of the predictions' first texts).
    """
    image_C = image_rows(p.picture for p in predictions)
    known_C = np.isfinite(statistics_IK[image_C]).all(axis=1)
    own = [p for p, known in zip(predictions, known_C, strict=True) if known]
    images = len({p.picture for p in own})
    if images < 2:
        return Term(SHALLOW, None, missing="no statistics of these pictures are known")
    floor = shallow_answers(
        [p.question or p.prompt for p in own],
        [vqa.most_common(p.references) for p in own],
        statistics_IK[image_C[known_C]],
        image_C[known_C].tolist(),
    )
    if floor is None:
        return Term(SHALLOW, None, missing=f"{images} images are too few for five folds")
    judged = [own[row] for row in floor.rows_C]
    return above(SHALLOW, judged, floor.answers, settings, floor.seconds, _rules(floor))


def _rules(floor: ShallowFloor) -> str:
    """Tells which rule answered, and in how many of the folds."""
    counts = Counter(floor.rules)
    of = f"of {len(floor.rules)} folds"
    return ", ".join(f"{rule} ({folds} {of})" for rule, folds in counts.items())


def neighbour_floor(predictions: Sequence[Prediction], collected: Collected) -> Term:
    """Returns how far the captions are above the consensus caption of the nearest training
    pictures, by the mean of their patches.
    """
    began = time.perf_counter()
    training = collected.training
    if isinstance(training, str):
        return Term(NEIGHBOUR, None, missing=training)
    rows = training.rows_with_captions()
    if not rows:
        return Term(NEIGHBOUR, None, missing="no local training set holds captions")
    features_JD = np.stack([collected.pooled[p.picture] for p in predictions])
    captions_N = [training.captions_N[row] for row in rows]
    captions = consensus_captions(features_JD, training.features_of(rows), captions_N)
    seconds = time.perf_counter() - began
    about = f"{len(rows)} training pictures"
    settings = collected.config.evaluation
    return above(NEIGHBOUR, predictions, captions, settings, seconds, about)


def above(
    name: str,
    predictions: Sequence[Prediction],
    floor: Sequence[str],
    settings: EvaluationConfig,
    seconds: float,
    about: str = "",
) -> Term:
    """Returns the score of the predictions less that of the floor's answers to the same texts."""
    scores = TASKS[predictions[0].task].scores
    references = [p.references for p in predictions]
    own_C = 100 * np.array(scores([p.answer for p in predictions], references))
    floor_C = 100 * np.array(scores(list(floor), references))
    row_C = image_rows(p.picture for p in predictions)
    return Term(
        name,
        per_text(own_C - floor_C, row_C, settings.bootstrap, settings.confidence),
        score=float(floor_C.mean()),
        images=int(row_C.max()) + 1,
        about=about,
        seconds=seconds,
    )
