"""The processor's image side: encoded bytes -> a square uint8 array, as each encoder was trained to
see it.

Bytes of one image, or of one sample's features, in; numpy arrays out. Imports no torch: it runs in
reading processes. Legend: H W pixels, 3 colours, P patch tokens, D width of the encoder.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from harness.config.schema import Config, VisionConfig
from harness.redact import masked
from shards.cache import Cache
from shards.features import read_features
from shards.images import FORMATS, on_white, upright
from shards.remote import Patience

Mode = Literal["crop", "squash", "whole"]
MODES: dict[str, Mode] = {"clip": "crop", "efficientnet_lite0": "squash"}


class ImageError(ValueError):
    """Bytes that are no usable image; the message says what was found and what is allowed."""


def decode_image(data: bytes, image_size: int, *, max_pixels: int, mode: Mode) -> np.ndarray:
    """Turns an encoded image into uint8 pixels_HW3 with both sides `image_size`.

    crop: shortest side to `image_size` (bicubic), centre crop: the pixels of transformers'
    CLIPImageProcessorPil. squash: the whole image to the square (bicubic), aspect not kept. whole:
    as it is, for the processor of another model. Transparency is laid on white and the EXIF
    orientation is honoured, both as transformers does when it loads a file. Raises ImageError for
    what cannot be decoded, or has more than `max_pixels` before or after resizing.
    """

    def check_size(width: int, height: int) -> None:
        scale = image_size / min(width, height) if mode == "crop" else 1.0
        if max(1.0, scale) ** 2 * width * height > max_pixels:
            raise ImageError(
                f"the image has {width} x {height} pixels, too many to resize within the limit of "
                f"{max_pixels} (data.max_image_pixels)"
            )

    try:
        with warnings.catch_warnings():
            # Pillow's own limit of pixels: ours is checked before decoding
            warnings.simplefilter("ignore")
            image = on_white(upright(data, check_size)[0])
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(f"the image is above the limit of {max_pixels} pixels: {error}") from error
    except UnidentifiedImageError as error:  # whose own text holds an address in memory
        raise ImageError(
            f"{len(data)} bytes cannot be decoded as an image: they begin {data[:8]!r}, "
            f"expected {', '.join(FORMATS)}"
        ) from error
    except Exception as error:  # Pillow raises at least six types for damaged files
        raise ImageError(f"{len(data)} bytes cannot be decoded as an image: {error}") from error
    return fitted(image, image_size, mode)


def fitted(image: Image.Image, image_size: int, mode: Mode) -> np.ndarray:
    """Returns uint8 pixels_HW3 of an upright RGB picture, as `decode_image` says of each mode."""
    if mode == "whole":
        return np.array(image)
    if mode == "squash":
        return np.array(_resized(image, image_size, image_size))
    width, height = image.size
    long = int(image_size * max(width, height) / min(width, height))
    width, height = (image_size, long) if width <= height else (long, image_size)
    left = (width - image_size) // 2
    top = (height - image_size) // 2
    pixels_HW3 = np.asarray(_resized(image, width, height))
    return pixels_HW3[top : top + image_size, left : left + image_size].copy()


def _resized(image: Image.Image, width: int, height: int) -> Image.Image:
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


class Encoded(Protocol):
    """Bytes that a reader of shards hands over, and what the end of their name says they are."""

    payload: bytes
    extension: str


@dataclass(frozen=True)
class ImageDecoder:
    """The `decode` of a Loader: image bytes -> uint8 pixels_HW3, feature bytes -> float16
    features_PD. Picklable.
    """

    image_size: int
    mode: Mode
    max_pixels: int

    @classmethod
    def of(cls, vision: VisionConfig, max_pixels: int) -> ImageDecoder:
        return cls(vision.image_size, MODES[vision.kind], max_pixels)

    def __call__(self, sample: Encoded) -> np.ndarray:
        """Raises ImageError, or ShardError for features that are none."""
        if sample.extension != "safetensors":
            return decode_image(
                sample.payload, self.image_size, max_pixels=self.max_pixels, mode=self.mode
            )
        return read_features(sample.payload)


def reading(config: Config) -> dict[str, Any]:
    """Returns the keyword arguments of a Loader that a config gives for any of its sets, to train
    on or to score.
    """
    return {
        "workers": config.data.workers,
        "prefetch": config.data.prefetch,
        "window_shards": config.data.window_shards,
        "decode": ImageDecoder.of(config.model.vision, config.data.max_image_pixels),
        "cache_dir": config.data.cache_dir,
        "cache_bytes": int(config.data.cache_gb * 1e9),
        "patience": patience_of(config),
        "mask": masked,
    }


def patience_of(config: Config) -> Patience:
    """Returns how long a config lets its data be waited for."""
    return Patience(config.data.read_attempts, config.data.read_timeout)


def cache_of(config: Config) -> Cache | None:
    """Returns the cache that a config gives its remote sets; None: it names no folder."""
    return Cache.at(config.data.cache_dir, config.data.cache_gb * 1e9, patience_of(config))
