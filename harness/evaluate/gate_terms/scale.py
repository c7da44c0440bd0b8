"""How alike are two pictures in what no look at the content needs: distances in statistics.

statistics_IK (28 columns) -> scaled_IK (29 columns), whose Euclidean distance weighs brightness,
colour histogram, aspect ratio, size and file size alike -> the nearest rows. A row of NaN is a
picture without statistics: it is never near. Legend: I pictures, J queries, K columns.
"""

from __future__ import annotations

import numpy as np

STATISTICS = 28  # columns: brightness, 8 bins each of red, green and blue, width, height, bytes
_HISTOGRAM = slice(1, 25)
_SIZE = slice(25, 27)  # width and height, pixels
_BYTES = slice(27, 28)
_CELLS = 1 << 22  # distances held at once


def aspect(statistics_IK: np.ndarray) -> np.ndarray:
    """Returns log(width / height) as one column, float64."""
    size_I2 = _logs(statistics_IK[:, _SIZE])
    return size_I2[:, :1] - size_I2[:, 1:]


def scaled(statistics_IK: np.ndarray) -> np.ndarray:
    """Returns scaled_IK, float64: each of the five groups of columns has a total variance of 1 over
    these pictures, or 0 where it is constant. Sizes count as logarithms. Rows of NaN stay so.
    Raises ValueError for another number of columns.
    """
    if statistics_IK.ndim != 2 or statistics_IK.shape[1] != STATISTICS:
        raise ValueError(
            f"statistics of pictures have {STATISTICS} columns, these are {statistics_IK.shape}"
        )
    groups = (
        statistics_IK[:, :1].astype(float),
        statistics_IK[:, _HISTOGRAM].astype(float),
        aspect(statistics_IK),
        _logs(statistics_IK[:, _SIZE]),
        _logs(statistics_IK[:, _BYTES]),
    )
    return np.concatenate([_standardised(columns_IK) for columns_IK in groups], axis=1)


def _logs(columns_IK: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(columns_IK.astype(float), 1))


def _standardised(columns_IK: np.ndarray) -> np.ndarray:
    known_IK = columns_IK[~np.isnan(columns_IK).any(axis=1)]
    if not len(known_IK):
        return columns_IK
    # Not by the deviation: rounding makes that of a constant column small, but not 0.
    varies_K = known_IK.max(axis=0) > known_IK.min(axis=0)
    deviation_K = np.where(varies_K, known_IK.std(axis=0), 1)
    centred_IK = np.where(varies_K, columns_IK - known_IK.mean(axis=0), 0 * columns_IK)
    return centred_IK / deviation_K / np.sqrt(max(1, varies_K.sum()))


def nearest(scaled_IK: np.ndarray, row: int, allowed_rows: np.ndarray) -> int | None:
    """Returns the allowed row that is nearest to this one and not itself; of equals the one named
    first. None where there is no such row or one side has no statistics.
    """
    allowed_rows = np.asarray(allowed_rows, int)
    others_J = allowed_rows[allowed_rows != row]
    distance_J = np.square(scaled_IK[others_J] - scaled_IK[row]).sum(axis=1)
    known_J = ~np.isnan(distance_J)
    if not known_J.any():
        return None
    return int(others_J[np.where(known_J, distance_J, np.inf).argmin()])


def nearest_k(scaled_IK: np.ndarray, queries_JK: np.ndarray, k: int) -> np.ndarray:
    """Returns rows_Jk, nearest first; fewer than k where fewer rows have statistics. Works in
    blocks: what is held at once does not grow with I times J. Raises ValueError for a query of NaN.
    """
    if np.isnan(queries_JK).any():
        raise ValueError("the nearest rows to NaN cannot be told; leave such pictures out")
    known_rows = np.flatnonzero(~np.isnan(scaled_IK).any(axis=1))
    known_IK = scaled_IK[known_rows]
    k = min(k, len(known_rows))
    if not k:
        return np.zeros((len(queries_JK), 0), int)
    square_I = np.square(known_IK).sum(axis=1)
    block = max(1, _CELLS // len(known_IK))
    found = [np.zeros((0, k), int)]
    for start in range(0, len(queries_JK), block):
        # Without the square of the query, which is the same for all.
        distance_JI = square_I - 2 * queries_JK[start : start + block] @ known_IK.T
        nearest_Jk = np.argpartition(distance_JI, k - 1, axis=1)[:, :k]
        of_nearest_Jk = np.take_along_axis(distance_JI, nearest_Jk, axis=1)
        order_Jk = np.lexsort((nearest_Jk, of_nearest_Jk), axis=1)
        found.append(known_rows[np.take_along_axis(nearest_Jk, order_Jk, axis=1)])
    return np.concatenate(found)
