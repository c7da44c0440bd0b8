"""Image shards -> feature shards: the frozen encoder runs once over a set, not once an epoch.

Same records, keys and order; in place of the image {"patches_PD": float16}; beside the shards the
features of a blank and of noise images, for the proof that images are used. Several processes, each
with an encoder, may share the work, and what was killed goes on: shards/parts.py. Legend: I images,
K noise images, P patch tokens, D encoder width.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch

from harness.config.encoder import place_of_weights
from harness.config.schema import VisionConfig
from harness.data.features import CONTROLS, control_pixels
from harness.data.images import ImageDecoder
from harness.errors import ConfigError
from harness.machine.precision import Precision, Requested, choose_or_fall_back
from harness.model.vision import VisionTower, load_vision
from harness.redact import say
from shards.loader import Loader
from shards.manifest import INDEX, SKIPPED, Manifest
from shards.parts import Parts, Share
from shards.quarantine import NAMED
from shards.read import Reader
from shards.statistics import rows_of, unknown
from shards.stream import StreamState
from shards.write import Sample, write_shards

PART_BATCHES = 8  # batches of a part: what is lost at most when a process is killed


class Encoder:
    """The frozen encoder on its device: pixels_IHW3 (uint8) -> patch tokens IPD (float16)."""

    def __init__(
        self, vision: VisionConfig, precision: Requested, device: torch.device, tells: bool = True
    ) -> None:
        self.policy: Precision = choose_or_fall_back(precision, device)
        if self.policy.fell_back and tells:
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
    folder: str | Path, out: str | Path, vision: VisionConfig, **options: Any
) -> Manifest:
    """Runs the encoder over the image set in `folder`, writes the feature set `out` (".../SPLIT").

    `options`: as of `SetEncoding`, and overwrite: replace what is there. Raises ShardError or
    ConfigError for sets and encoders that cannot be used; then OUT is as it was before.
    """
    overwrite = options.pop("overwrite", False)
    return SetEncoding(folder, out, vision, **options).write(overwrite)


class SetEncoding:
    """An image set on its way to a feature set, by this process or by several."""

    def __init__(
        self,
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
        share: Share | None = None,
    ) -> None:
        """device: none means the GPU where there is one. precision: as `train.precision`, for the
        encoder alone; the features are stored as float16. progress: called with (images done,
        images in all). workers: processes that decode images. share: which process of how many
        this is. An image that cannot be read, or whose features do not fit, is left out, logged and
        named in OUT/skipped.jsonl (see `skipped`).
        """
        decoder = ImageDecoder.of(vision, max_image_pixels)
        reading: dict[str, Any] = {"shuffle": False, "workers": workers, "answered": False}
        self.loader = Loader([str(folder)], global_batch=batch_images, decode=decoder, **reading)
        self.source = self.loader.manifests[0]
        if self.source.kind != "images":
            raise ConfigError(
                f"{folder} holds {self.source.kind} already; give the set of images they were made "
                "from"
            )
        on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        share = share or Share()
        self.encode = Encoder(vision, precision, on, tells=share.rank == 0)
        self.out = Path(out)
        self.vision = vision
        self.progress = progress
        self._images = PART_BATCHES * batch_images  # of a part
        made_of = [self.source.digest, self.encode.identity(), self._images, max_image_pixels]
        made_of += [on.type, torch.__version__]
        count = -(-self.source.samples // self._images)
        self._parts = Parts(self.out, made_of, count, share)
        self._done = 0  # images
        self._at = -1  # the part that `_batches` goes on with
        self._batches: Generator[tuple[StreamState, list[Any]], None, None] | None = None

    def make_own(self, overwrite: bool = False) -> None:
        """Makes the parts that are this process's, for the first one to write."""
        if (self.out / INDEX).exists() and not overwrite:
            return  # which that one says, or has just written
        try:
            self._parts.make_own(self._part)
        finally:
            self._stop_reading()

    def write(self, overwrite: bool = False) -> Manifest:
        """Writes the set, of parts of its own and of the other processes."""
        files = {CONTROLS: self.encode.controls()}
        left_out: dict[int, str] = {}

        def samples() -> Iterator[Sample]:
            yield from self._samples(left_out)
            if left_out:  # write_shards reads `files` after the last sample
                files[SKIPPED] = _skipped_lines(self.source, left_out)

        try:
            made = write_shards(
                samples(),
                self.out,
                dataset=self.source.dataset,
                split=self.source.split,
                kind="features",
                encoder=self.encode.identity(),
                extra_files=files,
                origin=self.source,
                overwrite=overwrite,
            )
        finally:
            self._stop_reading()
        self._parts.remove()
        return made

    def _samples(self, left_out: dict[int, str]) -> Iterator[Sample]:
        """Yields what `write_shards` takes, of every image of the set that can be read; the others
        go to `left_out`, by index with the reason.
        """
        reader = Reader(self.source, answered=False)
        for number, part in self._parts.each(self._part):
            indices = range(self.source.samples)[number * self._images :][: self._images]
            features_IPD = safetensors.numpy.load(part)["features_IPD"]
            refused = {int(index): why for index, why in json.loads(_metadata(part)["left_out"])}
            left_out |= refused
            made = iter(features_IPD)
            for index in indices:
                if index in refused:
                    continue
                record = reader.read(index).known
                if not record.has_picture:
                    yield record, b"", "", unknown(1)[0]
                    continue
                features = safetensors.numpy.save({"patches_PD": next(made)})
                row_K = rows_of(self.source, [index])
                assert row_K is not None  # a set of pictures has them
                yield record, features, "safetensors", row_K[0]
            if self._done < indices.stop:
                self._tell(indices.stop)

    def _part(self, number: int) -> bytes:
        """Returns the features of the readable images of a part, and which are left out and why."""
        if self._at != number:
            self._stop_reading()
            state = StreamState(0, number * self._images, self.loader.digest)
            self._batches = self.loader.iterate(state, epochs=1)
        assert self._batches is not None
        made: list[np.ndarray] = []
        left_out: list[tuple[int, str]] = []
        for state, batch in islice(self._batches, PART_BATCHES):
            made += self._encoded(batch, state.position - len(batch), left_out)
            self._tell(state.position)
        self._at = number + 1
        features_IPD = np.stack(made) if made else np.zeros((0, 0, 0), np.float16)
        return safetensors.numpy.save(
            {"features_IPD": features_IPD}, metadata={"left_out": json.dumps(left_out)}
        )

    def _encoded(
        self, batch: list[Any], done: int, left_out: list[tuple[int, str]]
    ) -> Iterator[np.ndarray]:
        """Yields features_PD of the images of a batch that can be read."""
        left_out += [(each.index, each.error) for each in batch if each.error is not None]
        readable = [each for each in batch if each.error is None and each.known.has_picture]
        features_IPD = self.encode(np.stack([s.payload for s in readable])) if readable else ()
        fit = [bool(np.isfinite(features_PD).all()) for features_PD in features_IPD]
        why = f"the features of {place_of_weights(self.vision)} do not fit into float16"
        if readable and not any(fit) and (len(fit) > 1 or not done):
            raise ConfigError(
                f"{self.source.folder}, key {readable[0].known.key}: {why}; choose another "
                f"model.vision.layer than {self.vision.layer}"
            )
        for sample, features_PD, fits in zip(readable, features_IPD, fit, strict=True):
            if fits:
                yield features_PD
            else:
                self.loader.leave_out(sample, why)
                left_out.append((sample.index, why))

    def _tell(self, done: int) -> None:
        self._done = done
        if self.progress:
            self.progress(done, self.source.samples)

    def _stop_reading(self) -> None:
        if self._batches is not None:
            self._batches.close()


def _metadata(part: bytes) -> dict[str, str]:
    """Returns what stands beside the tensors of a safetensors file."""
    size = int.from_bytes(part[:8], "little")
    return json.loads(part[8 : 8 + size])["__metadata__"]


def _skipped_lines(source: Manifest, left_out: dict[int, str]) -> bytes:
    lines = []
    for index, error in list(left_out.items())[:NAMED]:
        key = source.key(index)
        # Without the folder that the error begins with: the same images give the same bytes
        # wherever they lie.
        reason = error.partition(f"key {key}: ")[2] or error
        lines.append(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()
