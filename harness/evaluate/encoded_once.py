"""A published model's encoder, which is given each picture once for all its questions.

The encoder's forward pass is put in place by one that encodes a new picture alone and remembers
the last ones: what it gives does not depend on which questions are asked together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

NAMES = ("vision_model", "vision_tower", "image_encoder")  # of encoders in transformers' models
KEPT = 64  # pictures


class EncodedOnce:
    """Stands for the forward pass of an encoder; `shown` says which picture each row shows.

    Where the rows are not one for each picture (tiles, rows repeated for a beam), it steps aside.
    """

    def __init__(self, encoder: nn.Module) -> None:
        self._forward = encoder.forward
        self.shown: Sequence[np.ndarray] = ()
        # By the picture's identity, its pixels' shape and how it is asked: the picture itself,
        # which keeps its identity alive, and what came of it.
        self._known: OrderedDict[Any, tuple[np.ndarray, Any]] = OrderedDict()
        encoder.forward = self

    def __call__(self, pixel_values: torch.Tensor, *asked: Any, **options: Any) -> Any:
        if len(pixel_values) != len(self.shown) or pixel_values.ndim != 4:
            return self._forward(pixel_values, *asked, **options)
        rows = []
        for picture, pixels_3HW in zip(self.shown, pixel_values, strict=True):
            key = (id(picture), pixels_3HW.shape, repr((asked, sorted(options.items()))))
            if key not in self._known:
                encoded = self._forward(pixels_3HW[None], *asked, **options)
                self._known[key] = (picture, encoded)
            self._known.move_to_end(key)
            rows.append(self._known[key][1])
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
        return _joined(rows)


def encode_once(model: nn.Module) -> EncodedOnce | None:
    """Has a model's encoder see each picture once; None where it has none of a known name."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in NAMES:
            return EncodedOnce(module)
    return None


def _joined(rows: Sequence[Any]) -> Any:
    """Returns the outputs of single pictures as that of a batch of them."""
    first = rows[0]
    if isinstance(first, torch.Tensor):
        return torch.cat(list(rows))
    if isinstance(first, tuple):
        return tuple(_joined(parts) for parts in zip(*rows, strict=True))
    if isinstance(first, dict):  # transformers' outputs are
        return type(first)(**{name: _joined([row[name] for row in rows]) for name in first})
    return first
