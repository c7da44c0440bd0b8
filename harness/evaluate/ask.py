"""One picture and a question to a trained model: what it says."""

from __future__ import annotations

from pathlib import Path

from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.images import ImageDecoder
from harness.errors import ConfigError
from harness.loading import opened
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
    found = opened(source, lm=lm, vision=vision)
    decoding = found.config.generate.vqa if prompt else found.config.generate.caption
    batch = one_picture(found.model, found.config, image, prompt)
    return found.model.generate(batch, decoding).texts[0]


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
