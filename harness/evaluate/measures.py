"""The measure of each task by which images and variants are compared: one score a text, a hundredth
of it a point.

Answers and their references -> VQA accuracy in [0, 1], or CIDEr-D in [0, 10]. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from harness.evaluate import vqa
from harness.evaluate.captions import cider_d_per_image


def _accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    return [vqa.accuracy(answer, truth) for answer, truth in zip(answers, references, strict=True)]


def _cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Document frequencies are those of the texts given; with few images they are coarse, for all
    conditions alike.
    """
    said, wanted = (
        {str(n): text for n, text in enumerate(texts)} for texts in (answers, references)
    )
    return list(cider_d_per_image(said, wanted).values())


# task -> the name of its measure, and the score of each answer against its references.
SCORES: Mapping[
    str, tuple[str, Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]]
] = {
    "vqa": ("accuracy", _accuracy),
    "caption": ("CIDEr", _cider),
}
