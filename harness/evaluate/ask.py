"""One picture and a question to a trained model: what it says."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.images import ImageDecoder
from harness.errors import ConfigError
from harness.loading import Opened, opened
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from shards.files import read_plain
from shards.read import Sample
from shards.record import Record, Text


def ask(
    source: Path | str,
    image: Path,
    prompt: str | None = None,
    *,
    lm: Path | None = None,
    vision: Path | None = None,
) -> str:
    """Returns what a model says to one picture; without a prompt it describes it.

    `source`: anything that harness.load takes; `lm`, `vision`: where its frozen parts are, if they
    are not found. Raises ConfigError, OSError.
    """
    return answered(opened(source, lm=lm, vision=vision), image, prompt).text


class Answered(NamedTuple):
    """What was said to what."""

    text: str
    batch: Batch


def answered(found: Opened, image: Path, prompt: str | None) -> Answered:
    """Returns what an opened model says to one picture. Raises ConfigError, OSError."""
    decoding = found.config.generate.vqa if prompt else found.config.generate.caption
    batch = one_picture(found.model, found.config, image, prompt)
    return Answered(found.model.generate(batch, decoding).texts[0], batch)


def one_picture(
    model: VisionLanguageModel, config: Config, image: Path | str, prompt: str | None = None
) -> Batch:
    """Returns the batch of one picture and a question; without one, of the caption prompt.

    Raises ConfigError for a file that is no picture, OSError for one that is not there.
    """
    decode = ImageDecoder.of(config.model.vision, config.data.max_image_pixels)
    text = Text("asked", "vqa" if prompt else "caption", ("unknown",), prompt)
    record = Record("asked", "asked", "asked", "asked", (text,))
    sample = Sample(record, read_plain(Path(image)), "image", 0, 0)
    try:
        sample.payload = decode(sample)
    except ValueError as error:
        raise ConfigError(f"{image}: {error}") from error
    batch = Collator.of(config, model.tokenizer, training=False)([sample])
    assert batch is not None  # one sample with a text
    return batch.to(model.device)
