"""Training's own way from an encoded image to pixels, sooner: torch resizes in place of
Pillow.

Torch's kernel for uint8 is Pillow's filter in vector instructions; its pixels are on average 0.004
of 255 beside those of `decode_image`, and 2 at most of a photograph whose centre is cut out. Scores
and features are made of the exact ones.
Legend: H W pixels, 3 colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from harness.config.schema import Config
from harness.data.images import (
    Encoded,
    ImageDecoder,
    centre,
    refusing,
    resized_to,
    size_check,
)
from harness.model.preprocessing import Resample
from shards.images import rgb_pixels


@dataclass(frozen=True)
class FastDecoder(ImageDecoder):
    """An ImageDecoder whose pixels are nearly the same; `reduced`: those of JPEGs that were decoded
    at 1/2, 1/4 or 1/8 of their size, which differ by some 3 of 255 on average.
    """

    reduced: bool = False

    @property
    def pixels(self) -> str:
        return "reduced" if self.reduced else "fast"

    def __call__(self, sample: Encoded) -> np.ndarray:
        """Raises ImageError, or ShardError for features that are none."""
        if sample.extension == "safetensors":
            return super().__call__(sample)
        data = sample.payload
        fit = self.fit
        with refusing(data, self.max_pixels):
            pixels_HW3 = rgb_pixels(
                data,
                size_check(fit, self.max_pixels),
                fit.to if self.reduced else None,
            )
        height, width, _ = pixels_HW3.shape
        size = resized_to(width, height, fit)
        return centre(_resized(pixels_HW3, *size, fit.resample), fit.side)


def _resized(pixels_HW3: np.ndarray, width: int, height: int, how: Resample) -> np.ndarray:
    if pixels_HW3.shape[:2] == (height, width):
        return pixels_HW3
    # In this order the batch's own stride shows torch that a pixel's colours lie side by side: the
    # result lies so too, and is made in half the time.
    pixels_13HW = torch.from_numpy(pixels_HW3)[None].permute(0, 3, 1, 2)
    made_13HW = functional.interpolate(pixels_13HW, (height, width), mode=how, antialias=True)
    return made_13HW[0].permute(1, 2, 0).numpy()


def training_decoder(config: Config) -> ImageDecoder:
    """Returns the decoder of images that a config asks for in training."""
    exact = ImageDecoder.of(config.model.vision, config.data.max_image_pixels)
    if config.data.resize == "exact":
        return exact
    reduced = config.data.resize == "reduced"
    return FastDecoder(exact.image_size, exact.mode, exact.max_pixels, reduced, said=exact.said)
