"""Feature shards: which encoder made them, and the blank and noise images that belong to them.

How they are made: encode.py. Imports no torch. Legend: K noise images, P patch tokens, D width.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from harness.config.encoder import NAMED_BY, encoder_name
from harness.config.schema import VisionConfig
from harness.errors import ConfigError
from shards.manifest import SKIPPED, Manifest

CONTROLS = "controls.safetensors"
GREY = 127  # of every pixel of the blank image
NOISE_IMAGES = 4


def control_pixels(shape: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns {"blank": one grey image, "noise": K of uniform noise}, uint8: always the same of
    this `shape` (H, W, 3).
    """
    noise_KHW3 = np.random.default_rng(0).integers(0, 256, (NOISE_IMAGES, *shape), dtype=np.uint8)
    return {"blank": np.full((1, *shape), GREY, dtype=np.uint8), "noise": noise_KHW3}


def load_controls(manifest: Manifest) -> dict[str, np.ndarray]:
    """Returns {"blank_PD", "noise_KPD"} of a feature set, float16. Raises ShardError if the file is
    missing or damaged.
    """
    return safetensors.numpy.load(manifest.read_file(CONTROLS))


def skipped(manifest: Manifest) -> list[dict[str, str]]:
    """Returns {"key", "reason"} of the images that `encode_set` could not read."""
    if SKIPPED not in [file.name for file in manifest.files]:
        return []
    return [json.loads(line) for line in manifest.read_file(SKIPPED).splitlines()]


def check_encoder(manifest: Manifest, expected: VisionConfig | dict[str, Any]) -> None:
    """Raises ConfigError, naming both, unless the feature set was made by the `expected` encoder.

    A config is compared by name, revision, layer, resolution and what of the
    picture is taken. An identity
    (`VisionTower.identity()`) is compared by its hash instead of its name, so that a folder may
    have moved.
    """
    if manifest.kind != "features" or not manifest.encoder:
        raise ConfigError(
            f"{manifest.folder} is a set of {manifest.kind} that names no encoder, expected "
            "features"
        )
    if isinstance(expected, VisionConfig):
        expected = encoder_name(expected)
        keys: tuple[str, ...] = NAMED_BY
    else:
        keys = ("kind", "hash", "layer", "image_size", "preprocessing", "stages", "flips")
    differing = [key for key in keys if manifest.encoder.get(key) != expected.get(key)]
    if differing:
        differences = ", ".join(
            f"{key} {manifest.encoder.get(key)!r} instead of {expected.get(key)!r}"
            for key in differing
        )
        raise ConfigError(
            f"{manifest.folder}: these features were made by {_words(manifest.encoder)}, not by "
            f"{_words(expected)} ({differences}): make them again with `harness shards features`, "
            "or set model.vision to their encoder"
        )


def _words(encoder: dict[str, Any]) -> str:
    revision = f" at {encoder['revision']}" if encoder.get("revision") else ""
    return f"{encoder.get('id')}{revision}"
