"""Frozen weights stored in the dtype that their layer computes in: half the memory of fp32, and no
cast in each step.

Autocast casts the weights of linear layers and convolutions, as often as they are used, and those
alone; stored in that dtype they give the same results bit for bit. Norms and embeddings, which
autocast leaves in fp32, stay.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from harness.model.language.quantise import quantised_layers

CAST_BY_AUTOCAST = (nn.Linear, nn.Conv2d, Conv1D)


def store_frozen(part: nn.Module, dtype: torch.dtype | None) -> None:
    """Stores the frozen weights that autocast would cast to `dtype` in it; None: no autocast.

    What is trained stays in fp32, and so does a matrix that serves as an embedding too.
    """
    if dtype is None:
        return
    packed = set(map(id, quantised_layers(part)))
    casts = [m for m in part.modules() if isinstance(m, CAST_BY_AUTOCAST) and id(m) not in packed]
    cast = set(map(id, casts))
    kept = {
        id(parameter)
        for module in part.modules()
        if id(module) not in cast
        for parameter in module.parameters(recurse=False)
    }
    for module in casts:
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad and id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)
