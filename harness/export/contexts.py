"""The pictures and texts on which an export is compared with its run: some of its dev sets.

Config -> a batch of contexts with one target each, and their pictures as they lie in the set.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from harness.config.schema import Config
from harness.data.collate import Collator, most_common
from harness.data.images import ImageDecoder, cache_of, patience_of
from harness.data.prompts import prompt
from harness.model.batch import Batch, Context
from shards.files import ShardError
from shards.manifest import Manifest
from shards.origin import pictures_of
from shards.read import Reader, Sample
from shards.record import Record, Text

PICTURES = 16
TEXTS = 2  # of each picture
RANDOM = 4  # pictures of noise where a run's sets cannot be read


@dataclass(frozen=True)
class Contexts:
    """What is asked, of run and export alike."""

    batch: Batch  # every context with one target, so C = T
    pictures: list[bytes]  # of I, encoded; [] where features are compared
    source: str  # in words
    has_pictures: bool  # of the run's sets, neither features nor noise


def dev_contexts(config: Config, tokenizer: PreTrainedTokenizerBase, pictures: int) -> Contexts:
    """Returns contexts of the first of the run's dev, test and training sets that can be read, of
    random pictures where none can; features stand in where their pictures are gone.
    """
    decode = ImageDecoder.of(config.model.vision, config.data.max_image_pixels)
    source = "random pictures, since none of the run's sets can be read"
    samples = [_random(number) for number in range(RANDOM)]
    is_own = False
    for manifest in _sets(config):
        found = _samples(manifest, config, pictures)
        if found:
            samples = found
            is_own = True
            source = f"{manifest.dataset}/{manifest.split}"
            if found[0].extension == "safetensors":
                source += " (features: their pictures were not found)"
            break
    encoded = [sample.payload for sample in samples]
    kept = samples[0].extension != "safetensors"
    images = np.stack([decode(sample) for sample in samples])
    return Contexts(
        _batch(images, samples, config, tokenizer), encoded if kept else [], source, kept and is_own
    )


def _batch(
    images: np.ndarray, samples: list[Sample], config: Config, tokenizer: PreTrainedTokenizerBase
) -> Batch:
    """Returns few contexts of each sample: one target each, and all its references to score by."""
    rows = [
        (Context(sample.known, text, prompt(text.task, _template(config, text), text.prompt)), row)
        for row, sample in enumerate(samples)
        for text in _chosen(sample.known)
    ]
    collate = Collator.of(config, tokenizer, training=False)
    return collate.assemble(
        images,
        [context for context, _ in rows],
        [row for _, row in rows],
        [most_common(context.text.targets) for context, _ in rows],
        list(range(len(rows))),
    )


def _template(config: Config, text: Text) -> str:
    return getattr(config.prompts, text.task)


def _sets(config: Config) -> Iterator[Manifest]:
    cache = cache_of(config)
    for part in (config.data.dev, config.data.test, config.data.train):
        for dataset in part:
            try:
                yield Manifest.open(dataset.path, cache, patience_of(config))
            except ShardError:  # it was moved since; the next one is tried, the one used is named
                continue


def _samples(manifest: Manifest, config: Config, wanted: int) -> list[Sample]:
    """Returns samples evenly spaced over a set, as pictures where they are there."""
    indices = np.unique(np.linspace(0, manifest.samples - 1, wanted).astype(int)).tolist()
    cache = cache_of(config)
    reader = Reader(manifest, cache)
    pictures = pictures_of(manifest, indices, cache)
    decode = ImageDecoder.of(config.model.vision, config.data.max_image_pixels)
    found: dict[bool, list[Sample]] = {True: [], False: []}
    for index, picture in zip(indices, pictures, strict=True):
        try:
            sample = reader.read(index)
            if not sample.known.has_picture:  # export and run are compared on pictures
                continue
            if picture is not None:
                sample = replace(sample, payload=picture, extension="picture")
            decode(sample)
        except (ShardError, ValueError):  # `evaluate` counts and names what cannot be read
            continue
        if _chosen(sample.known):
            found[picture is not None].append(sample)
    return found[True] or found[False]


def _chosen(record: Record) -> list[Text]:
    """Returns at most one text without a question of a record and some with; [] where none has a
    target.
    """
    texts = [text for text in record.texts if any(target.strip() for target in text.targets)]
    captions = [text for text in texts if text.task == "caption"]
    asked = [text for text in texts if text.task != "caption"]
    return [*captions[:1], *asked][:TEXTS]


def _random(number: int) -> Sample:
    pixels_HW3 = np.random.default_rng(number).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels_HW3).save(file, "PNG")
    texts = (
        Text("caption", "caption", ("a picture",)),
        Text("question", "vqa", ("yes",), "What is in the picture?"),
    )
    record = Record(str(number), "random", "random", str(number), texts)
    return Sample(record, file.getvalue(), "picture", 0, number)
