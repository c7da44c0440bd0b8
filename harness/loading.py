"""A run, a checkpoint, the folder of a saved model or a name of the hub -> its model.

model = harness.load("runs/mine")    # its newest checkpoint
model = harness.load("owner/name")   # of the hub
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from harness import checkpoint as checkpoints
from harness.config.schema import Config, VisionConfig
from harness.errors import ConfigError
from harness.machine.precision import Requested, choose_or_fall_back
from harness.model.arguments import model_folder
from harness.model.language.quantise import load_tokenizer
from harness.model.vlm import VisionLanguageModel
from harness.redact import say


class Opened(NamedTuple):
    """A trained model with what belongs to it."""

    model: VisionLanguageModel
    config: Config  # of a saved model without its run: its own, and defaults for all else
    folder: Path  # of its weights


def load(
    source: Path | str,
    *,
    lm: Path | str | None = None,
    vision: Path | str | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | None = None,
) -> VisionLanguageModel:
    """Returns a trained model in eval mode; without a `device` on the GPU, where there is one.

    `source`: a run, of which the newest checkpoint is meant, or that which `checkpoint` names
    (newest, best or a step); a checkpoint; the folder of a saved model; a name of the hub. `lm`
    and `vision`: where its frozen parts are, if they are not found. Raises ConfigError.
    """
    return opened(source, checkpoint, lm=lm, vision=vision, device=device).model


def opened(source: Path | str, checkpoint: str | None = None, **loaded: Any) -> Opened:
    """Returns the model that `load` returns, and what belongs to it. `loaded`: as for
    `load_model`.
    """
    folder = Path(source).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file():
        found = checkpoints.at(folder, checkpoint)
        config = Config(**found.state["config"])
        model = load_model(found, config, **loaded)
        return Opened(model, where_found(config, model), found.model)
    if checkpoint:
        raise ConfigError(f"{source} is no run, which alone has checkpoints; asked is {checkpoint}")
    folder = model_folder(source, {})
    model = _placed(folder, "auto", **loaded)
    parts = ("model", "prompts", "generate", "known_mistakes")
    own = {part: getattr(model.config, part) for part in parts}
    return Opened(model, Config(name=folder.name or "model", **own), folder)


def load_model(found: checkpoints.Checkpoint, config: Config, **loaded: Any) -> VisionLanguageModel:
    """Returns the checkpoint's model in eval mode, on the GPU where there is one.

    In the precision of its training, or in the device's own where it cannot do that: then says so.
    `loaded`: `lm` and `vision`, where its frozen parts are, if they are not found; `with_vision`,
    false for a model that reads features; `device`; `kind`, as `model_class` gives it: without it a
    first stage is refused.
    """
    return _placed(found.model, config.train.precision, **loaded)


def where_found(config: Config, model: VisionLanguageModel) -> Config:
    """Returns the config of a run with its encoder where the model's was found: files that lie
    there say how pictures are fitted.
    """
    if model.vision is None:
        return config
    found = VisionConfig(**model.config.model["vision"])
    place = {"id": found.id, "weights": found.weights}
    parts = {"vision": config.model.vision.model_copy(update=place)}
    return config.model_copy(update={"model": config.model.model_copy(update=parts)})


def model_class(config: Config) -> type[VisionLanguageModel]:
    """Returns the class of the model that a config trains."""
    if not config.train.objective:
        return VisionLanguageModel
    from harness.model.first_stage import FirstStageModel

    return FirstStageModel


def tokenizer_of(config: Config) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of the model that a config trains. Raises ConfigError."""
    if not config.train.objective:
        return load_tokenizer(config.model.lm, config.prompts.chat)
    from harness.model.first_stage import Vocabulary

    return Vocabulary(config.model).tokenizer


def _placed(
    folder: Path,
    asked: Requested,
    *,
    device: torch.device | str | None = None,
    kind: type[VisionLanguageModel] = VisionLanguageModel,
    **parts: Any,
) -> VisionLanguageModel:
    on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    precision = choose_or_fall_back(asked, on)
    if precision.fell_back:
        say(f"precision: {precision.reason}", sys.stderr)
    return kind.from_pretrained(folder, precision=precision, device=on, **parts)
