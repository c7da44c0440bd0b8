"""What a transformer's config allows a tower: its layer, and its resolution in patches."""

from __future__ import annotations

from harness.config.schema import VisionConfig
from harness.errors import ConfigError


def layers_below(config: VisionConfig, layers: int) -> int:
    """Returns how many of a model's layers make the hidden state that is asked for: there is one of
    the embeddings, and one after each layer. Raises ConfigError where it has none of that number.
    """
    states = layers + 1
    if not -states <= config.layer < states:
        raise ConfigError(
            f"model.vision.layer is {config.layer}, but {config.id} has hidden states {-states} to "
            f"{states - 1}"
        )
    return config.layer % states


def patches_of(config: VisionConfig, own: int, patch: int) -> int:
    """Returns how many patches the picture has, at the model's own resolution or at another one.
    Raises ConfigError where that is no whole number of patches.
    """
    side = config.image_size
    if side != own and side % patch:
        below = max(1, side // patch) * patch
        raise ConfigError(
            f"model.vision.image_size is {side}, which {config.id} cannot divide into patches of "
            f"{patch} pixels: set image_size={own}, its own, or a multiple, such as {below} or "
            f"{below + patch}"
        )
    return (side // patch) ** 2
