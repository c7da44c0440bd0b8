"""Paired group accuracy: questions whose answer must change with the picture, all right or not.

Questions on pictures, their truths and what the model got right -> the shares of NaturalBench (Li
et al. 2024, "NaturalBench: Evaluating Vision-Language Models on Natural Adversarial Samples",
section 3). Knowledge of the texts alone gets no group right. Legend: C texts, G groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from harness.evaluate.vqa import same_question


@dataclass(frozen=True)
class Paired:
    """Shares in [0, 1]. `chance` is the group accuracy of guessing between the two true answers of
    each question in the group: what a yes/no model gets by luck, and more than others get.
    """

    groups: int
    questions: int  # of each group: 2, or 1 in complementary pairs
    group_accuracy: float  # G-Acc: all texts of the group right
    question_accuracy: float  # Q-Acc: one question right on both pictures
    image_accuracy: float  # I-Acc: all the group's questions right on one picture
    chance: float  # 1/16, or 1/4 in complementary pairs


def paired(
    question_C: Sequence[str],
    image_C: Sequence[Hashable],
    truth_C: Sequence[str],
    right_C: Sequence[bool],
    pair_id_of_C: Sequence[Hashable | None] | None = None,
) -> Paired | None:
    """Returns the accuracy over groups, of which every text is in one at most; None without any.

    `pair_id_of_C`: the same name for the two texts of a complementary pair (one question on two
    pictures with different truths), None for all others. Where there are such pairs, they are the
    groups. Else a group is two pictures with the same two questions, in the order of the texts:
    each question has another truth on the other picture, and each picture another truth for the
    other question, so that neither a question nor a picture gives one answer away.
    """
    rows = _complementary(truth_C, image_C, pair_id_of_C or ())
    rows = rows or _crossed([same_question(question) for question in question_C], image_C, truth_C)
    if not rows:
        return None
    right_GQI = np.asarray(right_C, bool)[np.array(rows)]
    questions = right_GQI.shape[1]
    return Paired(
        groups=len(rows),
        questions=questions,
        group_accuracy=float(right_GQI.all(axis=(1, 2)).mean()),
        question_accuracy=float(right_GQI.all(axis=2).mean()),
        image_accuracy=float(right_GQI.all(axis=1).mean()),
        chance=0.25**questions,
    )


Group = tuple[tuple[int, int], ...]  # the two rows, one a picture, of each question


def _complementary(
    truth_C: Sequence[str],
    image_C: Sequence[Hashable],
    pair_id_of_C: Sequence[Hashable | None],
) -> list[Group]:
    rows_of: dict[Hashable, list[int]] = defaultdict(list)
    for row, name in enumerate(pair_id_of_C):
        if name is not None:
            rows_of[name].append(row)
    pairs = [(rows[0], rows[1]) for rows in rows_of.values() if len(rows) == 2]
    return [
        (pair,)
        for pair in pairs
        if truth_C[pair[0]] != truth_C[pair[1]] and image_C[pair[0]] != image_C[pair[1]]
    ]


def _crossed(
    question_C: Sequence[str], image_C: Sequence[Hashable], truth_C: Sequence[str]
) -> list[Group]:
    rows_of: dict[Hashable, dict[str, int]] = defaultdict(dict)
    for row, (question, image) in enumerate(zip(question_C, image_C, strict=True)):
        rows_of[image].setdefault(question, row)
    # By the two questions, then by their two truths: the rows that wait for another picture.
    waiting: dict[tuple[str, str], dict[tuple[str, str], list[tuple[int, int]]]] = defaultdict(
        lambda: defaultdict(list)
    )
    grouped: set[int] = set()
    groups: list[Group] = []
    for row_of in rows_of.values():
        for one, other in combinations(sorted(row_of), 2):
            rows = (row_of[one], row_of[other])
            truths = (truth_C[rows[0]], truth_C[rows[1]])
            if truths[0] == truths[1] or not grouped.isdisjoint(rows):
                continue
            partner = _partner(waiting[one, other], truths, grouped)
            if partner is None:
                waiting[one, other][truths].append(rows)
            else:
                groups.append(((partner[0], rows[0]), (partner[1], rows[1])))
                grouped.update(partner, rows)
    return groups


def _partner(
    waiting: dict[tuple[str, str], list[tuple[int, int]]],
    truths: tuple[str, str],
    grouped: set[int],
) -> tuple[int, int] | None:
    """Returns the rows that have waited longest for such truths and are in no group yet."""
    for theirs, rows in waiting.items():
        if theirs[0] == truths[0] or theirs[1] == truths[1]:
            continue
        while rows:
            found = rows.pop(0)
            if grouped.isdisjoint(found):
                return found
    return None
