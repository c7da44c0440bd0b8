"""Vision transformers by hub id or folder, through transformers' AutoModel: SigLIP, DINOv2 and what
is built like them; hidden states of a layer as patch tokens.

Of a model with a text tower the vision tower alone is built and read. Tokens are transformers' own,
all of them: a class token, and a distillation or register tokens, stand before the patches.
Legend: I images, 3 colours, H W pixels, P patch tokens, D width of the encoder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from harness.config.schema import VisionConfig
from harness.errors import ConfigError
from harness.model.preprocessing import NAFLEX, own_preprocessing, preprocessing_of
from harness.model.pretrained import (
    load_complete,
    loading,
    quiet_transformers,
    remedy,
    without_weights,
)
from harness.model.vision.sizes import layers_below, patches_of
from harness.model.vision.tower import VisionTower


@dataclass(frozen=True)
class Family:
    """How a type of model is built in transformers."""

    tokens: int  # that stand for no patch, beside config.num_register_tokens
    norm: str | None  # the attribute through which the last hidden state goes; None: through none
    head: str | None = None  # what pools the tokens, and is not used
    # Position embeddings are interpolated where this is asked; else they always are, or there are
    # none to interpolate.
    asks: bool = False


# By the `model_type` of the vision config.
FAMILIES = {
    "clip_vision_model": Family(1, None, asks=True),
    "deit": Family(2, "layernorm", "pooler", asks=True),
    "dinov2": Family(1, "layernorm"),
    "dinov2_with_registers": Family(1, "layernorm"),
    "dinov3_vit": Family(1, "norm"),
    "siglip_vision_model": Family(0, "post_layernorm", "head", asks=True),
    "vit": Family(1, "layernorm", "pooler", asks=True),
}


class Layers(nn.Module):
    """A vision transformer up to the hidden state that is asked for; the layers above it, and the
    norm and the head after them, are never run nor kept.
    """

    def __init__(self, model: Any, family: Family, layers: int):
        super().__init__()
        self.model = model
        depth = model.config.num_hidden_layers
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
        del stacks[0][layers:]
        if family.norm:
            setattr(model, family.norm, nn.Identity())
        if family.head:
            setattr(model, family.head, None)
            model.use_head = False  # of SigLIP
        self.asked = {"interpolate_pos_encoding": True} if family.asks else {}

    def forward(self, pixels_I3HW: torch.Tensor) -> torch.Tensor:
        return self.model(pixels_I3HW, **self.asked).last_hidden_state


def load_transformer(config: VisionConfig) -> VisionTower:
    """Returns the tower of a model that AutoModel knows. Raises ConfigError."""
    from transformers import AutoConfig, AutoModel

    with loading("model.vision.id", config.id, remedy(config.id)), quiet_transformers():
        found = AutoConfig.from_pretrained(config.id, revision=config.revision)
        vision = getattr(found, "vision_config", found)
        family = _family(config, vision.model_type)
        prepared = preprocessing_of(config)
        own = own_preprocessing(config.id, config.revision).fit.side
        patches = patches_of(config, own, vision.patch_size)
        layers = layers_below(config, vision.num_hidden_layers)
        if without_weights():
            model: Any = AutoModel.from_config(vision)
        else:
            model = load_complete(
                AutoModel,
                "model.vision.id",
                config.id,
                config.revision,
                new=f"{family.head}." if family.head else "",
                config=vision,
                dtype=torch.float32,
            )
    return VisionTower(
        Layers(model, family, layers),
        config,
        tokens=patches + family.tokens + getattr(vision, "num_register_tokens", 0),
        width=vision.hidden_size,
        scale=prepared.scale,
        mean=prepared.mean,
        std=prepared.std,
        steps=prepared.fit.words,
    )


def _family(config: VisionConfig, model_type: str) -> Family:
    """Raises ConfigError for a type that is not known here."""
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type.startswith("siglip2"):
        raise ConfigError(f"model.vision.id: {config.id} is {NAFLEX}")
    raise ConfigError(
        f"model.vision.id: {config.id} is a model of type {model_type!r}, expected one of those "
        f"that are known here: {', '.join(sorted(FAMILIES))}"
    )
