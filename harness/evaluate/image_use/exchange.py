"""Which other image each context is given: any of its set, the one that is most alike without
having the same answer, or one of another set.

Statistics of pictures, questions and truths -> rows of donors. Legend: I images, C contexts, K
columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from harness.evaluate import vqa
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


def matched_captions(scaled_IK: np.ndarray, image_C: np.ndarray) -> Matched:
    """Returns for each caption the picture nearest to its own in statistics."""
    donor_I = np.full(len(scaled_IK), -1)
    known_I = np.flatnonzero(np.isfinite(scaled_IK).all(axis=1))
    for image in known_I:
        others_I = known_I[known_I != image]
        if len(others_I):
            donor_I[image] = others_I[_distances(scaled_IK, image, others_I).argmin()]
    donor_C = donor_I[image_C]
    return Matched(donor_C, int((donor_C < 0).sum()), 0)


def matched_questions(
    scaled_IK: np.ndarray, image_C: np.ndarray, asked: Sequence[Prediction]
) -> Matched:
    """Returns for each question the picture nearest to its own in statistics among those that were
    asked the same (else a question of the same type) and have another answer.
    """
    truth_C = [vqa.normalise(vqa.most_common(p.references)) for p in asked]
    groups = _groups([vqa.same_question(p.question or p.prompt) for p in asked])
    types = _groups([str(p.meta.get("question_type") or "") for p in asked])
    known_I = np.isfinite(scaled_IK).all(axis=1)
    donor_C = np.full(len(asked), -1)
    told = 0
    for context, image in enumerate(image_C):
        if not known_I[image]:
            continue
        for group in (groups, types):
            pool = [c for c in group[context] if image_C[c] != image and known_I[image_C[c]]]
            others = [c for c in pool if truth_C[c] != truth_C[context]]
            if others:
                break
        else:
            continue
        far_O = _distances(scaled_IK, image, image_C[others])
        nearest = _distances(scaled_IK, image, image_C[pool]).min()
        if far_O.min() <= _AS_FAR * nearest:
            donor_C[context] = image_C[others[int(far_O.argmin())]]
        else:
            told += 1
    return Matched(donor_C, int((donor_C < 0).sum()) - told, told)


def _groups(name_C: Sequence[str]) -> list[list[int]]:
    """Returns for each context those of the same name; [] for one without a name."""
    members: dict[str, list[int]] = defaultdict(list)
    for context, name in enumerate(name_C):
        if name:
            members[name].append(context)
    return [members[name] if name else [] for name in name_C]


def _distances(scaled_IK: np.ndarray, image: int | np.integer, others_O: np.ndarray) -> np.ndarray:
    return np.linalg.norm(scaled_IK[others_O] - scaled_IK[image], axis=1)
