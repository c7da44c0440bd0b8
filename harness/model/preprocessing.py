"""What a model's own image processor does to a picture, read from its preprocessor_config.json: how
it becomes a square, and how the square is normalised.

The config's `vision` -> Preprocessing. Imports no torch: reading processes ask it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import huggingface_hub as hub
from huggingface_hub.errors import EntryNotFoundError

from harness.config.schema import VisionConfig
from harness.errors import ConfigError, reason_of
from harness.machine.network import why_no_hub

Mode = Literal["crop", "squash", "whole"]
Resample = Literal["bilinear", "bicubic"]
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
FILE = "preprocessor_config.json"
NEWER_FILE = "processor_config.json"  # of transformers 5, which holds the same among others
FILTERS: dict[int, Resample] = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
# Endings of one processor's name: they differ in what they compute with.
ENDINGS = ("Fast", "Pil", "ImageProcessor", "FeatureExtractor")
NAFLEX = (
    "a SigLIP 2 of the NaFlex kind, which takes pictures of any shape in patches: choose one of a "
    "fixed resolution, as google/siglip2-base-patch16-224"
)
_HALVES = (0.5, 0.5, 0.5)
_CROPS: dict[str, Any] = {
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": 224,
    "resample": 3,
    "image_mean": CLIP_MEAN,
    "image_std": CLIP_STD,
}
_SQUARE: dict[str, Any] = {"size": 224, "image_mean": _HALVES, "image_std": _HALVES}
# What transformers takes for keys that a file leaves out, by the processor's name. `short`: what a
# size that is one number means, the shortest side and not both.
PROCESSORS: dict[str, dict[str, Any]] = {
    "Bit": {**_CROPS, "short": True},
    "CLIP": {**_CROPS, "short": True},
    "DeiT": {**_SQUARE, "size": 256, "resample": 3, "do_center_crop": True, "crop_size": 224},
    "Siglip": {**_SQUARE, "size": {"height": 224, "width": 224}, "resample": 3, "short": True},
    "ViT": {**_SQUARE, "resample": 2},
}


@dataclass(frozen=True)
class Fit:
    """How a picture becomes a square of `side` pixels.

    crop: its shortest side is brought to `resized`, and the centre cut out. squash: the whole
    picture is brought to a square of `resized`, aspect not kept, and the centre cut out where that
    is larger. whole: it stays as it is, for the processor of another model.
    """

    side: int
    mode: Mode = "crop"
    resized: int = 0  # 0: as `side`
    resample: Resample = "bicubic"

    @property
    def to(self) -> int:
        """Pixels of the shortest side, or of both, before the centre is cut out."""
        return self.resized or self.side

    def at(self, side: int) -> Fit:
        """Returns the same for another side: as much of the picture is cut off."""
        return Fit(side, self.mode, round(self.to * side / self.side), self.resample)

    @property
    def words(self) -> str:
        cut = ", centre crop" if self.mode == "crop" or self.to != self.side else ""
        what = "shortest side" if self.mode == "crop" else "whole image to the square"
        more = f" of {self.to}" if self.to != self.side else ""
        return f"{what}{more}{',' if self.mode == 'squash' else ''} {self.resample}{cut}"


@dataclass(frozen=True)
class Preprocessing:
    """A picture is fitted to uint8 pixels, and these become (pixels x scale - mean) / std."""

    fit: Fit
    scale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


def preprocessing_of(vision: VisionConfig) -> Preprocessing:
    """Returns what the model that `vision` of kind auto names wants, at the size of the config.

    Raises ConfigError for a model without such a file, for a processor that is not known here, and
    as `check_size`.
    """
    own = own_preprocessing(vision.id, vision.revision)
    check_size(vision, own.fit.side)
    if vision.image_size == own.fit.side:
        return own
    return replace(own, fit=own.fit.at(vision.image_size))


def check_size(vision: VisionConfig, own: int) -> None:
    """Raises ConfigError where a config names no size, and the model's own is another one than that
    stands for: to interpolate its position embeddings must be meant.
    """
    if vision.image_size != own and "image_size" not in vision.model_fields_set:
        raise ConfigError(
            f"model.vision.image_size is not given and stands for {vision.image_size}, but "
            f"{vision.id} takes {own} pixels: set image_size={own} (or another one, for which its "
            "position embeddings are interpolated)"
        )


@lru_cache(maxsize=8)
def own_preprocessing(name: str, revision: str | None) -> Preprocessing:
    """Returns what a model wants, by hub id or folder, at its own size. Raises ConfigError."""
    try:
        newer = read_json(name, NEWER_FILE, revision) or {}
        fields = newer.get("image_processor") or read_json(name, FILE, revision)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"model.vision.id: {FILE} of {name} cannot be read: {reason_of(error)}"
        ) from error
    if fields is None:
        raise ConfigError(
            f"model.vision.id: {name} holds no {FILE}, which says how pictures are prepared for "
            "it: put the one of the model that it was made from beside its weights"
        )
    return from_fields(name, fields)


def read_json(name: str, file: str, revision: str | None) -> dict[str, Any] | None:
    """Returns what a file of a model, in a folder or on the hub, holds; None where it has none of
    that name, or it is not in the cache and the hub does not answer. Raises OSError, ValueError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        path: Path | None = folder / file
    else:
        cached = hub.try_to_load_from_cache(name, file, revision=revision)
        if isinstance(cached, str):
            path = Path(cached)
        elif why_no_hub():
            path = None
        else:
            path = _downloaded(name, file, revision)
    if path is None or not path.is_file():
        return None
    return json.loads(path.read_text(encoding="utf-8"))


def _downloaded(name: str, file: str, revision: str | None) -> Path | None:
    try:
        return Path(hub.hf_hub_download(name, file, revision=revision))
    except EntryNotFoundError:
        return None


def from_fields(name: str, fields: Mapping[str, Any]) -> Preprocessing:
    """Returns what the fields of a preprocessor_config.json say. Raises ConfigError."""
    said = str(fields.get("image_processor_type") or fields.get("feature_extractor_type"))
    kind = said
    for ending in ENDINGS:
        kind = kind.removesuffix(ending)
    if kind not in PROCESSORS:
        raise ConfigError(_unknown(name, said, kind))
    known = {**PROCESSORS[kind], **{key: v for key, v in fields.items() if v is not None}}
    if not known.get("do_resize", True):
        raise _refused(name, "do_resize", False, "true")
    if known["resample"] not in FILTERS:
        raise _refused(name, "resample", known["resample"], "2 (bilinear) or 3 (bicubic)")
    normalises = known.get("do_normalize", True)
    return Preprocessing(
        _fit(name, known),
        known.get("rescale_factor", 1 / 255) if known.get("do_rescale", True) else 1.0,
        tuple(known["image_mean"]) if normalises else (0.0,) * 3,
        tuple(known["image_std"]) if normalises else (1.0,) * 3,
    )


def _fit(name: str, known: Mapping[str, Any]) -> Fit:
    size = known["size"]
    if isinstance(size, int):
        size = {"shortest_edge": size} if known.get("short") else {"height": size, "width": size}
    short = size.get("shortest_edge")
    resized = short or size.get("height")
    if not resized or (short and len(size) > 1) or (not short and size.get("width") != resized):
        raise _refused(name, "size", size, "a square, or a shortest_edge alone")
    crop = known.get("crop_size") if known.get("do_center_crop") else None
    if isinstance(crop, Mapping):
        if crop.get("height") != crop.get("width"):
            raise _refused(name, "crop_size", crop, "a square")
        crop = crop.get("height")
    if (short and not crop) or (crop and crop > resized):
        raise _refused(name, "crop_size", crop, f"a square of at most {resized} pixels")
    mode: Mode = "crop" if short else "squash"
    return Fit(crop or resized, mode, resized, FILTERS[known["resample"]])


def _unknown(name: str, said: str, kind: str) -> str:
    if kind == "Siglip2":
        return f"model.vision.id: {name} is {NAFLEX}"
    return (
        f"model.vision.id: the image processor of {name} is {said}, whose pixels are not made "
        f"here; known are those called {', '.join(PROCESSORS)} + ImageProcessor"
    )


def _refused(name: str, key: str, found: Any, expected: str) -> ConfigError:
    return ConfigError(
        f"model.vision.id: {key} in {FILE} of {name} is {found!r}, expected {expected}"
    )
