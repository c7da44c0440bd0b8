"""The kinds of encoder: a config's `vision` -> its tower."""

from __future__ import annotations

from collections.abc import Callable

from harness.config.encoder import PACKAGES
from harness.config.schema import VisionConfig
from harness.model.vision.clip import load_clip
from harness.model.vision.efficientnet import load_efficientnet
from harness.model.vision.tower import VisionTower
from harness.model.vision.transformer import load_transformer

LOADERS: dict[str, Callable[[VisionConfig], VisionTower]] = {
    "clip": load_clip,
    "auto": load_transformer,
    **dict.fromkeys(PACKAGES, load_efficientnet),
}


def load_vision(config: VisionConfig) -> VisionTower:
    """Returns the encoder of a config, on the CPU in float32. Raises ConfigError naming the id and
    the remedy.
    """
    return LOADERS[config.kind](config)
