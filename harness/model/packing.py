"""Packed targets: where each token stands when the targets of one prefix share a row.

    [image tokens][prompt of a context][its targets ...][prompt of the next context][...]

A token sees the image tokens, the prompt of its own context and what of its own target stands
before it, and its position is counted along that way: so a row gives what a row for each target
would give, and the prefix runs once. Everything is laid out in main memory, from lengths alone.
Legend: C contexts, T targets, R rows, W text positions of a row, S all of them, K kept (weighted)
tokens, L tokens of a target, P pieces, N tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

# Text positions from which the targets go on in a row of their own, behind the prefix once more:
# attention costs their square.
MOST_POSITIONS = 512


class Packed(NamedTuple):
    """The rows; image tokens stand before their first position. Integers are int64."""

    # which of [prompt_ids_CL, labels_TL, the token that answers begin after], flat
    source_RW: torch.Tensor
    context_RW: torch.Tensor  # in [0, C); -1: padding
    target_RW: torch.Tensor  # in [0, T); -1: the prompt's
    place_RW: torch.Tensor  # positions before it on its way, image tokens aside
    context_R: torch.Tensor  # a context of each row: all of a row read the same image tokens
    # of each kept token the position from which it is told; -1: that of the last image token
    row_K: torch.Tensor
    column_K: torch.Tensor
    bare_RW: torch.Tensor | None  # bool: no prompt stands before it; None: one does everywhere
    longest: int  # positions of the longest way, image tokens aside

    def mapped(self, change: Callable[[Any], Any]) -> Packed:
        changed: dict[str, Any] = {
            name: change(value)
            for name, value in self._asdict().items()
            if isinstance(value, torch.Tensor | np.ndarray)
        }
        return self._replace(**changed)


class Lengths(NamedTuple):
    """What a layout is made from, in main memory."""

    prompt_C: np.ndarray  # tokens
    columns: int  # of prompt_ids_CL
    counts_TL: np.ndarray  # bool: which labels have a weight
    context_T: np.ndarray


def pack(lengths: Lengths, row_of_C: np.ndarray, begins: bool) -> Packed:
    """Returns the layout in which contexts of the same number in `row_of_C` share a row, as far as
    they fit. `begins`: a token stands between a prompt and its answers.
    """
    counts_TL = lengths.counts_TL
    labels = counts_TL.shape[1]
    # no word follows the last label that counts
    words_T = (counts_TL * np.arange(labels)).max(axis=1, initial=0)
    prefix_C = lengths.prompt_C + begins
    first_label = len(prefix_C) * lengths.columns
    pieces: list[tuple[int, ...]] = []  # row, length, source, place, context, target
    told_T = np.zeros((len(words_T), 3), dtype=np.int64)  # row, columns of first and second label
    context_R: list[int] = []
    here = -1
    behind = -1
    used = 0
    end = 0
    for target in np.lexsort((lengths.context_T, row_of_C[lengths.context_T])).tolist():
        context = int(lengths.context_T[target])
        words = int(words_T[target])
        prefix = int(prefix_C[context])
        needs = words + (prefix if context != behind else 0)
        opens = row_of_C[context] != here or used + needs > MOST_POSITIONS
        if opens:
            here = int(row_of_C[context])
            used = 0
            context_R.append(context)
        row = len(context_R) - 1
        if opens or context != behind:
            prompt = prefix - begins
            pieces.append((row, prompt, context * lengths.columns, 0, context, -1))
            pieces.append((row, int(begins), first_label + counts_TL.size, prompt, context, -1))
            behind = context
            used += prefix
            end = used - 1
        pieces.append((row, words, first_label + target * labels, prefix, context, target))
        told_T[target] = row, end, used
        used += words
    return _laid_out(np.array(pieces).T, np.array(context_R), counts_TL, told_T, prefix_C)


def _laid_out(
    pieces: np.ndarray,
    context_R: np.ndarray,
    counts_TL: np.ndarray,
    told_T: np.ndarray,
    prefix_C: np.ndarray,
) -> Packed:
    """Returns the tensors of pieces that follow each other, row by row."""
    row_P, length_P, source_P, place_P, context_P, target_P = pieces
    piece_N = np.repeat(np.arange(len(row_P)), length_P)  # of all N tokens
    row_N = row_P[piece_N]
    at_N = np.arange(len(piece_N))
    within_N = at_N - (length_P.cumsum() - length_P)[piece_N]
    column_N = at_N - np.searchsorted(row_N, np.arange(len(context_R)))[row_N]
    width = int(column_N.max(initial=0)) + 1

    def rows(value_N: np.ndarray, fill: int) -> torch.Tensor:
        value_RW = np.full((len(context_R), width), fill, dtype=np.int64)
        value_RW[row_N, column_N] = value_N
        return torch.from_numpy(value_RW)

    place_N = place_P[piece_N] + within_N
    kept_K2 = np.argwhere(counts_TL)
    label_K = kept_K2[:, 1]
    told_K = told_T[kept_K2[:, 0]]
    column_K = np.where(label_K == 0, told_K[:, 1], told_K[:, 2] + label_K - 1)
    bare_N = prefix_C[context_P[piece_N]] == 0
    return Packed(
        source_RW=rows(source_P[piece_N] + within_N, 0),
        context_RW=rows(context_P[piece_N], -1),
        target_RW=rows(target_P[piece_N], -1),
        place_RW=rows(place_N, 0),
        context_R=torch.from_numpy(context_R),
        row_K=torch.from_numpy(told_K[:, 0].copy()),
        column_K=torch.from_numpy(column_K),
        bare_RW=rows(bare_N, 0).bool() if (prefix_C == 0).any() else None,
        longest=int(place_N.max(initial=0)) + 1,
    )


def seen_before(packed: Packed, tokens: int, has_picture_R: torch.Tensor) -> torch.Tensor:
    """Returns seen_RSS, whether a position (first S) attends to another: S is `tokens` image tokens
    and W. A row without a picture does not see them; but what stands behind nothing at all sees
    the last of them, since an attention over nothing is undefined.
    """
    context_RS = torch.nn.functional.pad(packed.context_RW, (tokens, 0), value=-2)
    target_RS = torch.nn.functional.pad(packed.target_RW, (tokens, 0), value=-1)
    order_S = torch.arange(context_RS.shape[1], device=context_RS.device)
    seen_RSS = context_RS[:, :, None] == context_RS[:, None]
    seen_RSS &= (target_RS[:, None] < 0) | (target_RS[:, None] == target_RS[:, :, None])
    seen_RSS &= order_S[:, None] >= order_S
    seen_RSS[:, tokens:, :tokens] = has_picture_R[:, None, None]
    if packed.bare_RW is not None:
        seen_RSS[:, tokens:, tokens - 1] |= packed.bare_RW
    return seen_RSS
