"""CLIP's vision tower by hub id or folder: hidden states of a layer as patch tokens, the class
token first.

Legend: I images, 3 colours, H W pixels, P patch tokens, D width of the encoder.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from harness.config.schema import VisionConfig
from harness.errors import ConfigError
from harness.model.preprocessing import CLIP_MEAN, CLIP_STD, Fit, check_size
from harness.model.pretrained import (
    load_complete,
    loading,
    quiet_transformers,
    remedy,
    without_weights,
)
from harness.model.vision.sizes import layers_below, patches_of
from harness.model.vision.tower import VisionTower

CLIP_TYPES = ("clip", "clip_vision_model")


class _ClipLayers(nn.Module):
    """A CLIP vision tower up to the hidden state that is asked for; the layers above it are never
    run nor kept.
    """

    def __init__(self, model: Any, layers: int):
        super().__init__()
        self.embeddings = model.embeddings
        self.pre_layrnorm = model.pre_layrnorm
        self.encoder = model.encoder
        self.encoder.layers = self.encoder.layers[:layers]

    def forward(self, pixels_I3HW: torch.Tensor) -> torch.Tensor:
        embedded_IPD = self.embeddings(pixels_I3HW, interpolate_pos_encoding=True)
        hidden_IPD = self.pre_layrnorm(embedded_IPD)
        return self.encoder(inputs_embeds=hidden_IPD).last_hidden_state


def load_clip(config: VisionConfig) -> VisionTower:
    """Returns the tower of a CLIP. Raises ConfigError."""
    from transformers import AutoConfig, CLIPVisionModel

    with loading("model.vision.id", config.id, remedy(config.id)), quiet_transformers():
        found = AutoConfig.from_pretrained(config.id, revision=config.revision)
        if found.model_type not in CLIP_TYPES:
            raise ConfigError(
                f"model.vision.id: {config.id} is a model of type {found.model_type!r}, expected a "
                "CLIP model (others: kind=auto)"
            )
        vision = getattr(found, "vision_config", found)
        check_size(config, vision.image_size)
        patches = patches_of(config, vision.image_size, vision.patch_size)
        layers = layers_below(config, vision.num_hidden_layers)
        if without_weights():
            model: Any = CLIPVisionModel(vision)
        else:
            model = load_complete(
                CLIPVisionModel,
                "model.vision.id",
                config.id,
                config.revision,
                dtype=torch.float32,
            )
    return VisionTower(
        _ClipLayers(getattr(model, "vision_model", model), layers),
        config,
        tokens=patches + 1,
        width=vision.hidden_size,
        scale=1 / 255,
        steps=Fit(config.image_size).words,
        **_clip_statistics(config),
    )


def _clip_statistics(config: VisionConfig) -> dict[str, Any]:
    """Returns mean and standard deviation of the colours from the model's own
    preprocessor_config.json, else OpenAI's.
    """
    from transformers.image_processing_base import ImageProcessingMixin

    try:
        found = ImageProcessingMixin.get_image_processor_dict(config.id, revision=config.revision)[
            0
        ]
    except OSError:
        found = {}
    return {
        "mean": tuple(found.get("image_mean", CLIP_MEAN)),
        "std": tuple(found.get("image_std", CLIP_STD)),
    }
