"""Image shards -> feature shards: the frozen encoder runs once over a set instead of once in every
epoch.

Same records, keys and order; in place of the image {"patches_PD": float16}; beside the shards the
features of a blank and of noise images, for the proof that images are used. Legend: K noise images,
P patch tokens, D encoder width.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.numpy

from harness.config.encoder import encoder_name
from harness.config.schema import VisionConfig
from harness.data.images import ImageDecoder
from harness.errors import ConfigError
from shards.manifest import SKIPPED, Manifest
from shards.record import Record

if TYPE_CHECKING:
    import torch

    from harness.machine.precision import Requested
    from shards.loader import Loader

CONTROLS = "controls.safetensors"
GREY = 127  # of every pixel of the blank image
NOISE_IMAGES = 4


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
    """Runs the encoder over the image set in `folder` and writes the feature set `out`
    (".../SPLIT").

    device: none means the GPU where there is one. precision: as `train.precision`, for the encoder
    alone; the features are stored as float16. progress: called with (images done, images in all).
    workers: processes that decode images. An image that cannot be read is left out, logged and
    named in OUT/skipped.jsonl (see `skipped`). Raises ShardError or ConfigError for sets and
    encoders that cannot be used; then OUT is as it was before.
    """
    import torch

    from harness.machine.precision import choose
    from harness.model.vision import load_vision
    from shards.loader import Loader
    from shards.write import write_shards

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    policy = choose(precision, device)
    decoder = ImageDecoder.of(vision, max_image_pixels)
    loader = Loader(
        [str(folder)], global_batch=batch_images, shuffle=False, decode=decoder, workers=workers
    )
    source = loader.manifests[0]
    if source.kind != "images":
        raise ConfigError(
            f"{folder} holds {source.kind} already; give the set of images they were made from"
        )
    tower = load_vision(vision).to(device)

    def encode(pixels_IHW3: np.ndarray) -> np.ndarray:
        with torch.inference_mode(), policy.autocast("vision"):
            patch_tokens_IPD = tower(torch.from_numpy(pixels_IHW3).to(device))
        return patch_tokens_IPD.to(torch.float16).cpu().numpy()

    pixels = control_pixels((tower.image_size, tower.image_size, 3))
    controls = {"blank_PD": encode(pixels["blank"])[0], "noise_KPD": encode(pixels["noise"])}
    files = {CONTROLS: safetensors.numpy.save(controls)}

    def samples() -> Iterator[tuple[Record, bytes, str]]:
        yield from _encoded(loader, encode, vision, progress)
        if loader.quarantined:  # write_shards reads `files` after the last sample
            files[SKIPPED] = _skipped_lines(loader)

    return write_shards(
        samples(),
        Path(out),
        dataset=source.dataset,
        split=source.split,
        kind="features",
        encoder=tower.identity() | {"precision": policy.facts()["precision.vision"]},
        extra_files=files,
        overwrite=overwrite,
    )


def _encoded(
    loader: Loader,
    encode: Callable[[np.ndarray], np.ndarray],
    vision: VisionConfig,
    progress: Callable[[int, int], None] | None,
) -> Iterator[tuple[Record, bytes, str]]:
    """Yields what `write_shards` takes, of every image of the set that can be read."""
    source = loader.manifests[0]
    done = 0
    for _, batch in loader.iterate(epochs=1):
        readable = [sample for sample in batch if sample.error is None]
        features_IPD = encode(np.stack([s.payload for s in readable])) if readable else ()
        for sample, features_PD in zip(readable, features_IPD, strict=True):
            record = sample.record
            assert record is not None  # it was read
            if not np.isfinite(features_PD).all():
                raise ConfigError(
                    f"{source.folder}, key {record.key}: the features of {vision.id} do not fit "
                    f"into float16; choose another model.vision.layer than {vision.layer}"
                )
            yield record, safetensors.numpy.save({"patches_PD": features_PD}), "safetensors"
        done += len(batch)
        if progress:
            progress(done, source.samples)


def _skipped_lines(loader: Loader) -> bytes:
    lines = []
    for _, index, error in loader.quarantined:
        key = loader.manifests[0].key(index)
        # Without the folder that the error begins with: the same images give the same bytes
        # wherever they lie.
        reason = error.partition(f"key {key}: ")[2] or error
        lines.append(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()


def control_pixels(shape: Sequence[int]) -> dict[str, np.ndarray]:
    """Returns {"blank": one grey image, "noise": K of uniform noise}, uint8: always the same of
    this `shape` (H, W, 3).
    """
    noise_KHW3 = np.random.default_rng(0).integers(0, 256, (NOISE_IMAGES, *shape), dtype=np.uint8)
    return {"blank": np.full((1, *shape), GREY, dtype=np.uint8), "noise": noise_KHW3}


def load_controls(manifest: Manifest) -> dict[str, np.ndarray]:
    """Returns {"blank_PD", "noise_KPD"} of a feature set, float16. Raises ShardError if the file is
    missing or damaged.
    """
    return safetensors.numpy.load(manifest.read_file(CONTROLS))


def skipped(manifest: Manifest) -> list[dict[str, str]]:
    """Returns {"key", "reason"} of the images that `encode_set` could not read."""
    if SKIPPED not in [file.name for file in manifest.files]:
        return []
    return [json.loads(line) for line in manifest.read_file(SKIPPED).splitlines()]


def check_encoder(manifest: Manifest, expected: VisionConfig | dict[str, Any]) -> None:
    """Raises ConfigError, naming both, unless the feature set was made by the `expected` encoder.

    A config is compared by name, revision, layer and resolution. An identity
    (`VisionTower.identity()`) is compared by its hash instead of its name, so that a folder may
    have moved.
    """
    if manifest.kind != "features" or not manifest.encoder:
        raise ConfigError(
            f"{manifest.folder} is a set of {manifest.kind} that names no encoder, expected "
            "features"
        )
    if isinstance(expected, VisionConfig):
        expected = encoder_name(expected)
        keys: tuple[str, ...] = ("kind", "id", "revision", "layer", "image_size")
    else:
        keys = ("kind", "hash", "layer", "image_size", "preprocessing")
    differing = [key for key in keys if manifest.encoder.get(key) != expected.get(key)]
    if differing:
        differences = ", ".join(
            f"{key} {manifest.encoder.get(key)!r} instead of {expected.get(key)!r}"
            for key in differing
        )
        raise ConfigError(
            f"{manifest.folder}: these features were made by {_words(manifest.encoder)}, not by "
            f"{_words(expected)} ({differences}): make them again with `harness shards features`, "
            "or set model.vision to their encoder"
        )


def _words(encoder: dict[str, Any]) -> str:
    revision = f" at {encoder['revision']}" if encoder.get("revision") else ""
    return f"{encoder.get('id')}{revision}"
