"""Image shards -> feature shards: the frozen encoder runs once over a set, not once an epoch.

Same records, keys and order; in place of the image {"patches_PD": float16}; beside the shards the
features of a blank and of noise images, for the proof that images are used. Legend: K noise images,
P patch tokens, D encoder width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from harness.config.schema import VisionConfig
from harness.data.features import CONTROLS, control_pixels
from harness.data.images import ImageDecoder
from harness.errors import ConfigError
from harness.machine.precision import Precision, Requested, choose_or_fall_back
from harness.model.vision import VisionTower, load_vision
from harness.redact import say
from shards.loader import Loader
from shards.manifest import SKIPPED, Manifest
from shards.statistics import rows_of
from shards.write import Sample, write_shards


class Encoder:
    """The frozen encoder on its device: pixels_IHW3 (uint8) -> patch tokens IPD (float16)."""

    def __init__(self, vision: VisionConfig, precision: Requested, device: torch.device) -> None:
        self.policy: Precision = choose_or_fall_back(precision, device)
        if self.policy.fell_back:
            say(f"precision: {self.policy.reason}", sys.stderr)
        self.device = device
        self.tower: VisionTower = load_vision(vision)
        self.tower.store(self.policy.vision)
        self.tower.to(device)

    def __call__(self, pixels_IHW3: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), self.policy.autocast("vision"):
            patch_tokens_IPD = self.tower(torch.from_numpy(pixels_IHW3).to(self.device))
        return patch_tokens_IPD.to(torch.float16).cpu().numpy()

    def controls(self) -> bytes:
        """Returns controls.safetensors: what it makes of a blank and of noise images."""
        pixels = control_pixels((self.tower.image_size, self.tower.image_size, 3))
        named = {"blank_PD": self(pixels["blank"])[0], "noise_KPD": self(pixels["noise"])}
        return safetensors.numpy.save(named)

    def identity(self) -> dict[str, object]:
        """Returns what a feature set says of its encoder."""
        return self.tower.identity() | {"precision": self.policy.facts()["precision.vision"]}


def encode_set(
    folder: str | Path,
    out: str | Path,
    vision: VisionConfig,
    *,
    batch_images: int = 32,
    device: torch.device | str | None = None,
    precision: Requested = "auto",
    progress: Callable[[int, int], None] | None = None,
    max_image_pixels: int = 50_000_000,
    workers: int = 0,
    overwrite: bool = False,
) -> Manifest:
    """Runs the encoder over the image set in `folder`, writes the feature set `out` (".../SPLIT").

    device: none means the GPU where there is one. precision: as `train.precision`, for the encoder
    alone; the features are stored as float16. progress: called with (images done, images in all).
    workers: processes that decode images. An image that cannot be read, or whose features do not
    fit, is left out, logged and named in OUT/skipped.jsonl (see `skipped`). Raises ShardError or
    ConfigError for sets and encoders that cannot be used; then OUT is as it was before.
    """
    decoder = ImageDecoder.of(vision, max_image_pixels)
    reading: dict[str, Any] = {"shuffle": False, "workers": workers, "answered": False}
    loader = Loader([str(folder)], global_batch=batch_images, decode=decoder, **reading)
    source = loader.manifests[0]
    if source.kind != "images":
        raise ConfigError(
            f"{folder} holds {source.kind} already; give the set of images they were made from"
        )
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    encode = Encoder(vision, precision, on)
    files = {CONTROLS: encode.controls()}

    def samples() -> Iterator[Sample]:
        yield from _encoded(loader, encode, vision, progress)
        if loader.quarantined:  # write_shards reads `files` after the last sample
            files[SKIPPED] = _skipped_lines(loader)

    return write_shards(
        samples(),
        Path(out),
        dataset=source.dataset,
        split=source.split,
        kind="features",
        encoder=encode.identity(),
        extra_files=files,
        origin=source,
        overwrite=overwrite,
    )


def _encoded(
    loader: Loader,
    encode: Encoder,
    vision: VisionConfig,
    progress: Callable[[int, int], None] | None,
) -> Iterator[Sample]:
    """Yields what `write_shards` takes, of every image of the set that can be read."""
    source = loader.manifests[0]
    done = 0
    for _, batch in loader.iterate(epochs=1):
        readable = [sample for sample in batch if sample.error is None]
        features_IPD = encode(np.stack([s.payload for s in readable])) if readable else ()
        fit = [bool(np.isfinite(features_PD).all()) for features_PD in features_IPD]
        why = f"the features of {vision.id} do not fit into float16"
        if readable and not any(fit) and (len(fit) > 1 or not done):
            raise ConfigError(
                f"{source.folder}, key {readable[0].known.key}: {why}; choose another "
                f"model.vision.layer than {vision.layer}"
            )
        for sample, features_PD, fits in zip(readable, features_IPD, fit, strict=True):
            if not fits:
                loader.leave_out(sample, why)
                continue
            features = safetensors.numpy.save({"patches_PD": features_PD})
            row_K = rows_of(source, [sample.index])
            assert row_K is not None  # a set of pictures has them
            yield sample.known, features, "safetensors", row_K[0]
        done += len(batch)
        if progress:
            progress(done, source.samples)


def _skipped_lines(loader: Loader) -> bytes:
    lines = []
    for (_, index), error in loader.quarantined.items():
        key = loader.manifests[0].key(index)
        # Without the folder that the error begins with: the same images give the same bytes
        # wherever they lie.
        reason = error.partition(f"key {key}: ")[2] or error
        lines.append(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()
