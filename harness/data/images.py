"""The processor's image side: encoded bytes -> a square uint8 array, as each encoder was trained to
see it.

Bytes of one image, or of one sample's features, in; numpy arrays out. Imports no torch: it runs in
reading processes. Legend: H W pixels, 3 colours, P patch tokens, D width of the encoder.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from harness.config.encoder import PACKAGES
from harness.config.schema import Config, VisionConfig
from harness.model.preprocessing import Fit, Mode, preprocessing_of
from harness.redact import masked
from shards.cache import Cache
from shards.features import read_features
from shards.images import FORMATS, on_white, upright
from shards.remote import Patience

MODES: dict[str, Mode] = {"clip": "crop", **dict.fromkeys(PACKAGES, "squash")}
RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


class ImageError(ValueError):
    """Bytes that are no usable image; the message says what was found and what is allowed."""


def decode_image(data: bytes, image_size: int, *, max_pixels: int, mode: Mode) -> np.ndarray:
    """Turns an encoded image into uint8 pixels_HW3 with both sides `image_size`, bicubic.

    crop: shortest side to `image_size`, centre crop: the pixels of transformers'
    CLIPImageProcessorPil. squash: the whole image to the square, aspect not kept. whole: as it is,
    for the processor of another model. Raises as `pixels_of`.
    """
    return pixels_of(data, Fit(image_size, mode), max_pixels)


def pixels_of(data: bytes, fit: Fit, max_pixels: int) -> np.ndarray:
    """Turns an encoded image into uint8 pixels_HW3 as `fit` says, the pixels of transformers'
    processors.

    Transparency is laid on white and the EXIF orientation is honoured, both as transformers does
    when it loads a file. Raises ImageError for what cannot be decoded, or has more than
    `max_pixels` before or after resizing.
    """
    with refusing(data, max_pixels):
        image = on_white(upright(data, size_check(fit, max_pixels))[0])
    return fitted(image, fit)


def size_check(fit: Fit, max_pixels: int) -> Callable[[int, int], None]:
    """Returns what raises ImageError for a width and a height that `pixels_of` refuses."""

    def check_size(width: int, height: int) -> None:
        scale = fit.to / min(width, height) if fit.mode == "crop" else 1.0
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


def fitted(image: Image.Image, fit: Fit) -> np.ndarray:
    """Returns uint8 pixels_HW3 of an upright RGB picture, as `fit` says."""
    if fit.mode == "whole":
        return np.array(image)
    size = resized_to(*image.size, fit)
    if image.size != size:
        image = image.resize(size, RESAMPLING[fit.resample])
    return centre(np.asarray(image), fit.side)


def resized_to(width: int, height: int, fit: Fit) -> tuple[int, int]:
    """Returns width and height to which a picture is resized before its centre is cut out."""
    if fit.mode == "squash":
        return fit.to, fit.to
    long = int(fit.to * max(width, height) / min(width, height))
    return (fit.to, long) if width <= height else (long, fit.to)


def centre(pixels_HW3: np.ndarray, side: int) -> np.ndarray:
    """Returns a copy of the square of that side in the middle."""
    height, width, _ = pixels_HW3.shape
    top = (height - side) // 2
    left = (width - side) // 2
    return pixels_HW3[top : top + side, left : left + side].copy()


class Encoded(Protocol):
    """Bytes that a reader of shards hands over, and what the end of their name says they are."""

    payload: bytes
    extension: str


@dataclass(frozen=True)
class ImageDecoder:
    """The `decode` of a Loader: image bytes -> uint8 pixels_HW3, feature bytes -> float16
    features_PD. Picklable.

    `said`: how pictures are fitted, or the config whose model says it in a file, which is read with
    the first picture: a run on features does without; without it `image_size` and `mode` say all.
    """

    image_size: int
    mode: Mode | None
    max_pixels: int
    said: Fit | VisionConfig | None = field(default=None, kw_only=True)

    @classmethod
    def of(cls, vision: VisionConfig, max_pixels: int) -> ImageDecoder:
        mode = MODES.get(vision.kind)
        return cls(vision.image_size, mode, max_pixels, said=None if mode else vision)

    @property
    def fit(self) -> Fit:
        """How pictures are fitted. Raises ConfigError, as `preprocessing_of`."""
        if isinstance(self.said, Fit):
            return self.said
        if self.said is not None:
            return preprocessing_of(self.said).fit
        assert self.mode is not None
        return Fit(self.image_size, self.mode)

    @property
    def pixels(self) -> str:
        """How pixels are made, in the word that scores.json has for it."""
        return "whole" if self.mode == "whole" else "exact"

    def __call__(self, sample: Encoded) -> np.ndarray:
        """Raises ImageError, ShardError for features that are none, or ConfigError."""
        if sample.extension != "safetensors":
            return pixels_of(sample.payload, self.fit, self.max_pixels)
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
