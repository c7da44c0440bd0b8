"""Answers that change with the image where the truth does, and pairs of them that are right."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from harness.evaluate import vqa
from harness.evaluate.predict import Prediction

_SEED = 0  # of partners: the same for every run, so that runs compare


class Counted(NamedTuple):
    """How many of some pairs have a property."""

    having: int
    pairs: int

    @property
    def percent(self) -> float | None:
        """None where there are no pairs."""
        return 100 * self.having / self.pairs if self.pairs else None


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
