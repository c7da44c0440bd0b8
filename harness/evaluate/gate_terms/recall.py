"""Recall of captions: does the model find the caption of a picture among those of alike pictures?

Statistics -> groups of alike pictures; nats of every caption under every picture of a group -> was
the right one found. Alike pictures leave nothing to brightness, colours or sizes. Legend: I
pictures, K columns, P pictures of a group and their captions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def recalled(nats_PC: np.ndarray, captions: Sequence[str] | None = None) -> np.ndarray:
    """Returns found_P: whether of all captions the picture's own has the fewest nats minus what it
    costs on the mean of these pictures. Without that mean a caption that is likely for every
    picture would win everywhere. Ties count as not found.

    nats_PC: nats a token of caption c under picture p, whose own is column p. `captions`: their
    texts; one of the same words as the picture's own is no rival, since no model can tell them
    apart. Raises ValueError for another shape, fewer than two pictures, or what is not finite.
    """
    pictures = len(nats_PC)
    if pictures < 2 or nats_PC.shape != (pictures, pictures):
        raise ValueError(
            f"recall needs one caption for each of at least 2 pictures, not {nats_PC.shape}"
        )
    bad_N2 = np.argwhere(~np.isfinite(nats_PC))
    if len(bad_N2):
        nats = nats_PC[tuple(bad_N2[0])]
        raise ValueError(
            f"caption {bad_N2[0, 1]} has {nats} nats under picture {bad_N2[0, 0]};"
            " recall needs finite ones"
        )
    score_PC = nats_PC - nats_PC.mean(axis=0)
    rival_PC = ~np.eye(pictures, dtype=bool) if captions is None else _rivals(captions)
    return score_PC.diagonal() < np.where(rival_PC, score_PC, np.inf).min(axis=1)


def chance(captions: Sequence[str]) -> np.ndarray:
    """Returns chance_P, in [0, 1]: how often `recalled` finds each picture's caption by luck, one
    in its rivals and itself. 1 / P where all captions differ.
    """
    return 1 / (1 + _rivals(captions).sum(axis=1))


def _rivals(captions: Sequence[str]) -> np.ndarray:
    text_P = np.array([" ".join(caption.lower().split()) for caption in captions])
    return text_P[:, None] != text_P


def groups_alike(scaled_IK: np.ndarray, size: int = 100) -> list[np.ndarray]:
    """Parts the pictures into groups of rows that are alike in statistics (of `scale.scaled`).

    Repeatedly the picture farthest from the mean of those left takes its nearest with it: outliers
    find company while there is some. A rest of less than half a group joins the last one, so every
    group has from half to one and a half times `size`, or there is one of fewer. Pictures without
    statistics are in no group.
    """
    left_rows = np.flatnonzero(~np.isnan(scaled_IK).any(axis=1))
    groups = []
    while len(left_rows) >= 1.5 * size:
        left_IK = scaled_IK[left_rows]
        outlier_K = left_IK[_square_distances(left_IK, left_IK.mean(axis=0)).argmax()]
        order = _square_distances(left_IK, outlier_K).argsort(kind="stable")
        groups.append(left_rows[np.sort(order[:size])])
        left_rows = left_rows[np.sort(order[size:])]
    return [*groups, left_rows] if len(left_rows) else groups


def _square_distances(scaled_IK: np.ndarray, point_K: np.ndarray) -> np.ndarray:
    return np.square(scaled_IK - point_K).sum(axis=1)
