"""Which other image each context is given: any of its set, the one that is most alike without
having the same answer, or one of another set.

Statistics of pictures, questions and truths -> rows of donors. Legend: I images, C contexts, K
columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Container, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from harness.evaluate import vqa
from harness.evaluate.gate_terms.scale import nearest
from harness.evaluate.predict import Prediction

# A donor is alike when it is at most so many times as far as the nearest picture of all that could
# have been taken, whatever its answer. Where none is, the statistics tell the answer.
_AS_FAR = 2.0


def donors(images: int, roll: int) -> torch.Tensor:
    """donor_I: for every image another one. A roll, not a random permutation: none may keep its
    own.
    """
    if images < 2:
        raise ValueError(f"images can be exchanged among at least 2, this batch has {images}")
    return (torch.arange(images) + 1 + roll % (images - 1)) % images


class Matched(NamedTuple):
    """A donor for each context, -1 where there is none, and why there is none."""

    donor_C: np.ndarray
    lonely: int  # contexts whose question nobody else was asked with another answer
    told: int  # contexts whose answer the statistics tell: nothing alike has another one


def matched_captions(
    scaled_IK: np.ndarray, image_C: np.ndarray, asked: Sequence[Prediction]
) -> Matched:
    """Returns for each caption the picture nearest to its own in statistics that shares no caption
    with it: one of the same words has nothing else to say.
    """
    captions_C = [{vqa.same_question(text) for text in p.references} for p in asked]
    sharing: dict[str, set[int]] = defaultdict(set)
    for context, captions in enumerate(captions_C):
        for caption in captions:
            sharing[caption].add(context)
    everyone = list(range(len(asked)))
    donors_of = _Donors(scaled_IK, image_C)
    for context, captions in enumerate(captions_C):
        alike = set[int]().union(*(sharing[caption] for caption in captions))
        donors_of.find(context, everyone, partial(_is_none_of, alike))
    return donors_of.found


def matched_questions(
    scaled_IK: np.ndarray, image_C: np.ndarray, asked: Sequence[Prediction]
) -> Matched:
    """Returns for each question the picture nearest to its own in statistics among those that were
    asked the same (else a question of the same type) and have another answer.
    """
    truth_C = [vqa.normalise(vqa.most_common(p.references)) for p in asked]
    groups = _groups([vqa.same_question(p.question or p.prompt) for p in asked])
    types = _groups([str(p.meta.get("question_type") or "") for p in asked])
    donors_of = _Donors(scaled_IK, image_C)
    for context, truth in enumerate(truth_C):

        def differs(other: int, context: int = context, truth: str = truth) -> bool:
            return truth_C[other] != truth and image_C[other] != image_C[context]

        same = groups[context]
        pool = same if any(map(differs, same)) else types[context]
        donors_of.find(context, pool, differs)
    return donors_of.found


class _Donors:
    """Finds the donor of one context after the other."""

    def __init__(self, scaled_IK: np.ndarray, image_C: np.ndarray):
        self._scaled_IK = scaled_IK
        self._image_C = image_C
        self._donor_C = np.full(len(image_C), -1)
        self._told = 0

    def find(self, context: int, pool: Sequence[int], differs: Callable[[int], bool]) -> None:
        """Notes the nearest picture of the pool whose text differs, if it is alike."""
        others = [other for other in pool if differs(other)]
        donor = self._nearest(context, others)
        if donor is None:
            return
        if self._far(context, donor) <= _AS_FAR * self._far(context, self._nearest(context, pool)):
            self._donor_C[context] = donor
        else:
            self._told += 1

    def _nearest(self, context: int, others: Sequence[int]) -> int | None:
        return nearest(self._scaled_IK, self._image_C[context], self._image_C[list(others)])

    def _far(self, context: int, image: int | None) -> float:
        """Returns the distance from a context's own picture."""
        own_K = self._scaled_IK[self._image_C[context]]
        return float(np.linalg.norm(self._scaled_IK[image] - own_K))

    @property
    def found(self) -> Matched:
        alone = int((self._donor_C < 0).sum()) - self._told
        return Matched(self._donor_C, alone, self._told)


def _is_none_of(known: Container[int], other: int) -> bool:
    return other not in known


def _groups(name_C: Sequence[str]) -> list[list[int]]:
    """Returns for each context those of the same name; [] for one without a name."""
    members: dict[str, list[int]] = defaultdict(list)
    for context, name in enumerate(name_C):
        if name:
            members[name].append(context)
    return [members[name] if name else [] for name in name_C]
