"""Evidence of all sets and tasks -> the verdict of each, and the worst of every task.

What one pass collected -> the exchanges, the floors and the recall -> TaskResult.uses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from harness.evaluate.bootstrap import Interval, image_rows, per_text
from harness.evaluate.collected import Collected, Picture
from harness.evaluate.floors import neighbour_floor, shallow_floor
from harness.evaluate.gate_terms.scale import scaled
from harness.evaluate.image_use.asking import recall_term
from harness.evaluate.image_use.evidence import (
    RECALL,
    SHALLOW,
    TEXT_ONLY,
    Term,
)
from harness.evaluate.image_use.gate import Gate
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import Prediction, Stratum
from shards.statistics import rows_of

_NO_STATISTICS = (
    "the set holds no statistics of its pictures, and the pictures are not at hand: build it anew"
)


def exchange(collected: Collected) -> None:
    """Asks every text of the gates again with other pictures."""
    for gate in collected.gates.values():
        known_IK = statistics_of(gate.predictions, collected)
        gate.measure(None if known_IK is None else scaled(known_IK), _NO_STATISTICS)
    for stratum, gate in collected.gates.items():
        _across(stratum, gate, collected)


def add_verdicts(collected: Collected, *, floors: bool) -> None:
    """Judges every set and task on its own, once the exchange was made; `floors`: with floors and
    recall, else by the exchanges alone, which is never use.
    """
    for stratum, gate in collected.gates.items():
        further = _further(stratum, gate, collected) if floors else None
        use = gate.result(further)
        if use is not None:
            result = collected.evaluation.tasks[stratum.task]
            result.uses[stratum.set] = use
    for task, result in collected.evaluation.tasks.items():
        result.pooled = _pooled(task, collected)


def _across(stratum: Stratum, gate: Gate, collected: Collected) -> None:
    """Measures the exchange with another set where the one within the set shows nothing."""
    others = [
        other.bank_rows
        for known, other in collected.gates.items()
        if known.task == stratum.task and known.set != stratum.set
    ]
    if others and "shuffled" in gate.said and not gate.exchange_term().passed:
        gate.measure_across(np.unique(np.concatenate(others)))


def _further(stratum: Stratum, gate: Gate, collected: Collected) -> tuple[Term, ...]:
    """Returns the terms that the task needs beside the exchanges."""
    result = collected.evaluation.tasks[stratum.task]
    own = [p for p in result.predictions if p.set == stratum.set and p.has_picture]
    if TASKS[stratum.task].has_right:
        only_set = len({p.set for p in result.predictions}) == 1
        known = result.text_only_accuracy if only_set else None
        words = () if known is None else (_text_only(own, known, collected),)
        statistics_IK = statistics_of(own, collected)
        if statistics_IK is None:
            return (*words, Term(SHALLOW, None, missing=_NO_STATISTICS))
        return (*words, shallow_floor(own, statistics_IK, collected.config.evaluation))
    return _recall(gate, collected), neighbour_floor(own, collected)


def _recall(gate: Gate, collected: Collected) -> Term:
    known_IK = statistics_of(gate.predictions, collected)
    if known_IK is None:
        return Term(RECALL, None, missing=_NO_STATISTICS)
    return recall_term(gate, scaled(known_IK), collected.config.evaluation.recall_images)


def _text_only(own: Sequence[Prediction], known: float, collected: Collected) -> Term:
    """Returns how far the accuracy is above that of the model without images, a known figure."""
    settings = collected.config.evaluation
    row_C = image_rows(p.picture for p in own)
    scores_C = np.array(TASKS["vqa"].scores([p.answer for p in own], [p.references for p in own]))
    above = per_text(100 * scores_C - known, row_C, settings.bootstrap, settings.confidence)
    return Term(TEXT_ONLY, above, score=known, images=int(row_C.max()) + 1)


def _pooled(task: str, collected: Collected) -> Interval | None:
    """Returns the cost of the exchange over all sets together; None for a single set."""
    gates = [gate for stratum, gate in collected.gates.items() if stratum.task == task]
    gates = [gate for gate in gates if gate.is_exchanged]
    if len(gates) < 2:
        return None
    settings = collected.config.evaluation
    gap_C = np.concatenate([gate.scores("true") - gate.scores("shuffled") for gate in gates])
    row_C = image_rows(p.picture for gate in gates for p in gate.predictions)
    return per_text(gap_C, row_C, settings.bootstrap, settings.confidence)


def statistics_of(predictions: Sequence[Prediction], collected: Collected) -> np.ndarray | None:
    """Returns statistics_IK of the pictures of these predictions, in the order of their first
    texts; None where they are not known.
    """
    pictures: list[Picture] = list(dict.fromkeys(p.picture for p in predictions))
    found: dict[Picture, np.ndarray] = {}
    for number, index_of in collected.by_set(pictures).items():
        known_SK = rows_of(collected.manifests[number], index_of.values())
        if known_SK is None:
            return None
        found |= zip(index_of, known_SK, strict=True)
    return np.stack([found[picture] for picture in pictures]) if found else None
