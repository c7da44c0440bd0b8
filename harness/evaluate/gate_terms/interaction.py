"""How much of a model's score needs picture and prompt together?

Answers to the same prompts on the same pictures -> what the additive part of the model alone would
have answered: EMAP, the empirical multimodally additive projection (Hessel and Lee 2020, "Does my
multimodal model learn cross-modal interactions?", section 4), here of answers as one-hot vectors.
Legend: P pictures, T prompts, V distinct answers, C texts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

_STARTS = 20  # prompts from which a grid is grown, the most frequent ones
_DIGITS = 9  # of shares of answers: a tie is none by rounding alone


def additive_answers(answers_PT: Sequence[Sequence[str]]) -> list[list[str]]:
    """Returns, for every cell of a complete grid, the answer with the highest share among the
    picture's answers plus its share among the prompt's answers minus its share overall. Of equals
    it is the one more common for the prompt, then the first by alphabet; to prefer the cell's own
    would let the interaction back in.
    """
    distinct = sorted({answer for answers in answers_PT for answer in answers})
    column_of = {answer: column for column, answer in enumerate(distinct)}
    index_PT = np.array([[column_of[answer] for answer in answers] for answers in answers_PT])
    share_PV = np.stack([_shares(index_T, len(distinct)) for index_T in index_PT])
    share_TV = np.stack([_shares(index_P, len(distinct)) for index_P in index_PT.T])
    best_PT = np.zeros_like(index_PT)
    for prompt, share_V in enumerate(share_TV):
        additive_PV = (share_PV + share_V - share_PV.mean(axis=0)).round(_DIGITS)
        tied_PV = additive_PV == additive_PV.max(axis=1, keepdims=True)
        best_PT[:, prompt] = np.where(tied_PV, share_V, -1).argmax(axis=1)
    return [[distinct[column] for column in best_T] for best_T in best_PT]


def _shares(index_C: np.ndarray, distinct: int) -> np.ndarray:
    return np.bincount(index_C, minlength=distinct) / len(index_C)


def complete_grid(
    prompt_C: Sequence[str], image_C: Sequence[Hashable], fewest_pictures: int = 10
) -> np.ndarray | None:
    """Returns rows_PT, the text of each picture and prompt, for at least two prompts that were all
    asked of the same pictures; None where fewer than `fewest_pictures` share two.

    It looks for the most cells by greed: from each of the most frequent prompts it adds the prompt
    that keeps the most pictures. A prompt asked twice of a picture counts once.
    """
    rows_of: dict[str, dict[Hashable, int]] = defaultdict(dict)
    for row, (prompt, image) in enumerate(zip(prompt_C, image_C, strict=True)):
        rows_of[prompt].setdefault(image, row)
    frequent = sorted(
        (prompt for prompt, rows in rows_of.items() if len(rows) >= fewest_pictures),
        key=lambda prompt: -len(rows_of[prompt]),
    )
    images_of = {prompt: frozenset(rows_of[prompt]) for prompt in frequent}
    best: tuple[list[str], frozenset[Hashable]] = ([], frozenset())
    for start in frequent[:_STARTS]:
        prompts = [start]
        images = images_of[start]
        left = [prompt for prompt in frequent if prompt != start]
        while left:
            following = max(left, key=lambda prompt: len(images & images_of[prompt]))
            images = images & images_of[following]
            if len(images) < fewest_pictures:
                break
            left.remove(following)
            prompts = [*prompts, following]
            if len(prompts) * len(images) > len(best[0]) * len(best[1]):
                best = (prompts, images)
    prompts, images = best
    if not prompts:
        return None
    in_order = [image for image in dict.fromkeys(image_C) if image in images]
    return np.array([[rows_of[prompt][image] for prompt in prompts] for image in in_order])
