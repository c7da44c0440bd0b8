"""One reader of features for training, checking and the doctor: bytes -> patches_PD, float16.

Legend: P patch tokens, D width of the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors.numpy

from shards.files import ShardError


def read_features(payload: bytes, encoder: Mapping[str, Any] | None = None) -> np.ndarray:
    """Returns features_PD of one sample; `encoder`: as the index of its set names it.

    Raises ShardError for another shape than the encoder's, and for a value that is not finite: one
    alone would make a batch's loss, and the bridge's start values, NaN.
    """
    try:
        tensors = safetensors.numpy.load(payload)
    except Exception as error:  # its own, and what numpy raises for a type that it has not
        raise ShardError(f"the features cannot be read: {error}") from error
    if "patches_PD" not in tensors:
        raise ShardError(f"the features hold {', '.join(tensors) or 'nothing'}, not patches_PD")
    found_PD = tensors["patches_PD"]
    shape = tuple((encoder or {}).get(name) for name in ("tokens", "width"))
    fits = found_PD.ndim == 2 and all(
        wanted in (None, size) for wanted, size in zip(shape, found_PD.shape, strict=True)
    )
    if not fits:
        expected = "(patches, width)" if None in shape else shape
        raise ShardError(f"patches_PD has shape {found_PD.shape}, expected {expected}")
    if found_PD.dtype.kind != "f":
        raise ShardError(f"patches_PD is of {found_PD.dtype}, expected float16")
    with np.errstate(over="ignore"):
        features_PD = found_PD.astype(np.float16, copy=False)
    if not np.isfinite(features_PD).all():
        raise ShardError("patches_PD holds values that are not finite in float16")
    return features_PD
