"""The one place that knows how questions and captions differ in scores and result files.

Answers and their references -> VQA accuracy in [0, 1], or CIDEr-D in [0, 10]: one score a text, a
hundredth of it a point. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from harness.evaluate import vqa
from harness.evaluate.captions import cider_d_per_image, read_caption_results

RIGHT = 0.5  # the VQA accuracy from which an answer counts as right


def _accuracy(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    return [vqa.accuracy(answer, truth) for answer, truth in zip(answers, references, strict=True)]


def _cider(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Document frequencies are those of the texts given; with few images they are coarse, for all
    conditions alike.
    """
    said = {str(n): text for n, text in enumerate(answers)}
    wanted = {str(n): texts for n, texts in enumerate(references)}
    return list(cider_d_per_image(said, wanted).values())


class Task(NamedTuple):
    """All in which questions and captions differ when they are scored."""

    measure: str  # the name of its score
    scores: Callable[[Sequence[str], Sequence[Sequence[str]]], list[float]]  # of each answer
    files: str  # how its result files end: DATASET_SPLIT_answers.json
    read: Callable[[Path], dict[str, str]]  # such a file
    results: Callable[[Iterable[tuple[str, str]]], list[dict[str, Any]]]  # what it holds
    of_images: bool  # answers stand under image ids, not under those of texts
    has_right: bool  # an answer is right or wrong


TASKS: Mapping[str, Task] = {
    "vqa": Task(
        measure="accuracy",
        scores=_accuracy,
        files="answers",
        read=vqa.read_results,
        results=vqa.vqa_results,
        of_images=False,
        has_right=True,
    ),
    "caption": Task(
        measure="CIDEr",
        scores=_cider,
        files="captions",
        read=read_caption_results,
        results=vqa.caption_results,
        of_images=True,
        has_right=False,
    ),
}


def is_right(task: str, answer: str, references: Sequence[str]) -> bool | None:
    """Returns whether an answer counts as right; None of a caption, of which nothing says so."""
    return vqa.accuracy(answer, references) >= RIGHT if TASKS[task].has_right else None
