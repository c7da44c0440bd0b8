"""One picture and a question to a trained run: what its newest model says."""

from __future__ import annotations

from pathlib import Path

from harness import checkpoint
from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.images import ImageDecoder
from harness.errors import ConfigError
from harness.evaluate.run_on_disk import load_model
from shards.read import Sample
from shards.record import Record, Text


def ask(run_dir: Path | str, image: Path, prompt: str | None = None) -> str:
    """What a run's newest model says to one picture; without a prompt it describes it. Raises
    ConfigError, OSError.
    """
    found = checkpoint.at(Path(run_dir))
    config = Config(**found.state["config"])
    decode = ImageDecoder.of(config.model.vision, config.data.max_image_pixels)
    text = Text("asked", "vqa" if prompt else "caption", ("unknown",), prompt)
    sample = Sample(
        Record("asked", "asked", "asked", "asked", (text,)), Path(image).read_bytes(), "image", 0, 0
    )
    try:
        sample.payload = decode(sample)
    except ValueError as error:
        raise ConfigError(f"{image}: {error}") from error
    model = load_model(found, config, with_vision=True)
    collate = Collator.of(config, model.tokenizer, training=False)
    batch = collate([sample]).to(next(model.parameters()).device)
    return model.generate(batch, getattr(config.generate, text.task)).texts[0]
