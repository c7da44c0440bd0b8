"""The processor's image side: encoded bytes -> a square uint8 array, as each encoder was trained to
see it.

Bytes of one image, or of one sample's features, in; numpy arrays out. Imports no torch: it runs in
reading processes. Legend: H W pixels, 3 colours, P patch tokens, D width of the encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    with refusing(data, max_pixels):
        image = on_white(upright(data, size_check(image_size, max_pixels, mode))[0])
    return fitted(image, image_size, mode)


def size_check(image_size: int, max_pixels: int, mode: Mode) -> Callable[[int, int], None]:
    """Returns what raises ImageError for a width and a height that `decode_image` refuses."""

    def check_size(width: int, height: int) -> None:
        scale = image_size / min(width, height) if mode == "crop" else 1.0
        if max(1.0, scale) ** 2 * width * height > max_pixels:
            raise ImageError(
                f"the image has {width} x {height} pixels, too many to resize within the limit of "
                f"{max_pixels} (data.max_image_pixels)"
            )

    return check_size


@contextmanager
def refusing(data: bytes, max_pixels: int) -> Iterator[None]:
    """Turns whatever a decoder raises for `data` into ImageError."""
    try:
        with warnings.catch_warnings():
            # Pillow's own limit of pixels: ours is checked before decoding
            warnings.simplefilter("ignore")
            yield
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


def fitted(image: Image.Image, image_size: int, mode: Mode) -> np.ndarray:
    """Returns uint8 pixels_HW3 of an upright RGB picture, as `decode_image` says of each mode."""
    if mode == "whole":
        return np.array(image)
    resized = _resized(image, *resized_to(*image.size, image_size, mode))
    return centre(np.asarray(resized), image_size)


def resized_to(width: int, height: int, image_size: int, mode: Mode) -> tuple[int, int]:
    """Returns width and height to which a picture is resized before its centre is cut out."""
    if mode == "squash":
        return image_size, image_size
    long = int(image_size * max(width, height) / min(width, height))
    return (image_size, long) if width <= height else (long, image_size)


def centre(pixels_HW3: np.ndarray, side: int) -> np.ndarray:
    """Returns a copy of the square of that side in the middle."""
    height, width, _ = pixels_HW3.shape
    top = (height - side) // 2
    left = (width - side) // 2
    return pixels_HW3[top : top + side, left : left + side].copy()


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

    @property
    def pixels(self) -> str:
        """How pixels are made, in the word that scores.json has for it."""
        return "whole" if self.mode == "whole" else "exact"

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
