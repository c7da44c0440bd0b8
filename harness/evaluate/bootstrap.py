"""95% intervals over images (Efron & Tibshirani 1993, chapter 13): how far a figure would move with
other images.

Sums per image -> sums per resample -> Interval. Over images and not over texts, since the texts of
an image share it and are no independent draws. Legend: I images, K sums, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

SEED = 0  # of the resamples: the same for every run, so that runs compare
RESAMPLES = 1000
CONFIDENCE = 0.95
_CELLS = 1 << 24  # counts held at once, whatever the number of images


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the interval of the confidence asked for; infinite bounds where nothing can be
    said.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def to_dict(self, digits: int | None = None) -> dict[str, float | None]:
        """Returns {"value", "low", "high"}, JSON-ready: None for an infinite bound."""
        named = {"value": self.value, "low": self.low, "high": self.high}
        return {
            k: (v if digits is None else round(v, digits)) if math.isfinite(v) else None
            for k, v in named.items()
        }

    def flat(self, name: str) -> dict[str, float | None]:
        """Returns {name, name_low, name_high}, likewise."""
        return dict(
            zip((name, f"{name}_low", f"{name}_high"), self.to_dict().values(), strict=True)
        )


def image_rows(image_C: Iterable[Hashable]) -> np.ndarray:
    """Returns row_C: the image of each text, numbered in the order of their first texts."""
    row_of: dict[Hashable, int] = {}
    return np.array([row_of.setdefault(image, len(row_of)) for image in image_C], int)


def resampled_sums(
    values_IK: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED
) -> np.ndarray:
    """sums_RK of the values of images drawn with replacement, as many as there are; K together:
    paired.
    """
    images = len(values_IK)
    rng = np.random.default_rng(seed)
    chance_I = np.full(images, 1 / images)
    rows = max(1, _CELLS // images)
    parts = [min(rows, resamples - done) for done in range(0, resamples, rows)]
    return np.concatenate(
        [rng.multinomial(images, chance_I, size=part) @ values_IK for part in parts]
    )


def percentile(
    value: float, values_R: Any, images: int, confidence: float = CONFIDENCE
) -> Interval:
    """Returns the percentile interval; infinite over fewer than two images. Resamples without a
    value (NaN) are left out.
    """
    if images < 2:
        return Interval(float(value), -math.inf, math.inf)
    bounds = np.nanquantile(values_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(value), float(bounds[0]), float(bounds[1]))


def ratio(sums_I: np.ndarray, per_I: np.ndarray, resamples: int, confidence: float) -> Interval:
    """Returns the interval of sum(sums) / sum(per): a bootstrap, as images differ in texts."""
    sums_R2 = resampled_sums(np.stack([sums_I, per_I], axis=1), resamples)
    with np.errstate(invalid="ignore"):
        ratios_R = sums_R2[:, 0] / sums_R2[:, 1]
    return percentile(
        sums_I.sum() / per_I.sum(), ratios_R, int(np.count_nonzero(per_I)), confidence
    )


def per_text(
    values_C: np.ndarray,
    row_C: np.ndarray,
    resamples: int,
    confidence: float,
    weight_C: np.ndarray | None = None,
) -> Interval:
    """Returns the interval over images of the mean over texts, of sum(values) / sum(weight) where
    they have a weight; `row_C`: the image of each text, as `image_rows` numbers them.
    """
    per_I = np.bincount(row_C, weight_C).astype(float)
    return ratio(np.bincount(row_C, values_C), per_I, resamples, confidence)
