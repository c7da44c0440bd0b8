"""What a run needs before its first step: loader, micro-batches, model, bridge's start values."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from harness import checkpoint as checkpoints
from harness.checks import is_run
from harness.config.encoder import place_of_weights
from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.fast_resize import training_decoder
from harness.data.features import check_encoder
from harness.data.images import reading
from harness.errors import GuardError
from harness.loading import model_class
from harness.machine.precision import Precision
from harness.model.batch import Batch
from harness.model.bridge import CALIBRATED_ON
from harness.model.vlm import VisionLanguageModel
from harness.train.engine import Engine
from harness.train.together import by_rank_0
from shards import quarantine
from shards.loader import Loader
from shards.read import Sample


def micro_batches(samples: Sequence[Sample], collate: Collator, size: int) -> list[Batch]:
    """Returns this rank's share of a global batch, `size` records at a time.

    [] where there is nothing to learn from.
    """
    parts = [collate(samples[start : start + size]) for start in range(0, len(samples), size)]
    return [part for part in parts if part is not None]


def make_loader(config: Config, engine: Engine | None, **other: Any) -> Loader:
    """Returns the loader of this rank's samples; without an engine of all, in this process;
    `other`: arguments in place of the config's.
    """
    sets = config.data.train
    weights = [s.weight for s in sets if s.weight is not None]  # all have one or none has
    given: dict[str, Any] = {
        "global_batch": config.train.global_batch,
        "seed": config.seed,
        "images": config.data.train_images,
        "last_batch": config.data.last_batch,
        "lanes": config.data.lanes,
        **reading(config),
        "decode": training_decoder(config),
    }
    if engine:
        given |= {"rank": engine.rank, "world_size": engine.world_size}
        here = os.environ.get("LOCAL_WORLD_SIZE", "")
        given["ranks_here"] = int(here) if here.isdecimal() else None
    else:
        given["workers"] = 0
    if engine and engine.is_main:  # for all: the folder need not be one that the others see
        given["quarantine"] = config.out_dir / quarantine.FILE
    return Loader([s.path for s in sets], weights or None, **given | other)


def in_one_lane(config: Config) -> Config:
    """Returns the config for a look at a few images in one process: its order has one lane, which
    needs no more of a node's cache than one lane of its own did.
    """
    window = max(1, config.data.window_shards // config.data.lanes)
    data = config.data.model_copy(update={"lanes": 1, "window_shards": window})
    return config.model_copy(update={"data": data})


def build_model(
    config: Config,
    encoder: dict[str, Any] | None = None,
    *,
    precision: Precision | None = None,
    device: torch.device | str = "cpu",
) -> VisionLanguageModel:
    """Returns the model to train, with the weights that `model.init_from` names. Raises
    ConfigError.

    `encoder`: as `encoder_of` gives it. The model itself knows nothing of runs and checkpoints.
    """
    if start := config.model.bridge.init_from:
        bridge = config.model.bridge.model_copy(update={"init_from": _files_of(start)})
        parts = config.model.model_copy(update={"bridge": bridge})
        config = config.model_copy(update={"model": parts})
    model = model_class(config).build(config, encoder, precision=precision, device=device)
    if config.model.init_from:
        model.load_trained(checkpoints.model_folder(Path(config.model.init_from).expanduser()))
    return model


def _files_of(start: str) -> str:
    """Returns the saved model that a run or a checkpoint stands for; any other name as it is."""
    folder = Path(start).expanduser()
    return str(checkpoints.model_folder(folder)) if is_run(folder) else start


def calibrate(model: VisionLanguageModel, config: Config) -> None:
    """Gives the bridge its start values, from the first images of the first lane with something to
    learn: at most `CALIBRATED_ON`, however large a global batch is. Where the sets hold no image it
    keeps those that it was drawn with.

    Raises GuardError for patch tokens that are not finite: the bridge would begin, and be saved, as
    NaN.
    """
    collate = Collator.of(config, model.tokenizer)
    few = min(config.train.global_batch, CALIBRATED_ON)
    lanes = config.data.lanes
    loader = make_loader(
        config,
        None,
        world_size=lanes,
        ranks_here=1,
        global_batch=lanes * few,
        last_batch="short",
    )
    samples: list[Sample] = []
    with closing(loader.iterate(epochs=1)) as steps:
        for _, read in steps if loader.has_pictures else ():
            samples += [s for s in read if s.record is None or s.record.has_picture]
            if len(samples) >= few and collate(samples):
                break
    if whole := collate(samples):
        batches = micro_batches(samples, collate, config.train.micro_batch)
        patches_IPD = torch.cat([model.patch_tokens(batch.to(model.device)) for batch in batches])
        if not patches_IPD.isfinite().all():
            raise GuardError(
                f"what {place_of_weights(config.model.vision)} makes of the first images is not "
                "finite: ask for train.precision=fp32, or another model.vision.layer"
            )
        model.bridge.calibrate(*model.bridge_inputs(whole.to(model.device), patches_IPD))
        if config.known_mistakes.image_token_scale == "twentyfold":
            model.bridge.projection.gain_D.data *= 20


def calibrate_alike(model: VisionLanguageModel, config: Config, engine: Engine) -> None:
    """Calibrates on every rank, from the same images. Of several lanes rank 0 alone reads the
    first, and sends the others the values: their nodes need none of its shards.
    """
    if config.data.lanes == 1:
        calibrate(model, config)
        return
    named = dict(model.bridge.named_parameters())

    def start_values() -> dict[str, Any]:
        calibrate(model, config)
        return {name: named[name].tolist() for name in model.bridge.START_VALUES}

    for name, values in by_rank_0(start_values, engine).items():
        with torch.no_grad():
            named[name].copy_(torch.tensor(values))


def encoder_of(loader: Loader, config: Config) -> dict[str, Any] | None:
    """Returns the encoder that made the features of these sets; None: they are images.

    Raises ConfigError for features of another encoder than the config's.
    """
    features = [m for m in loader.manifests if m.kind == "features" and m.has_pictures]
    for manifest in features:
        check_encoder(manifest, config.model.vision)
    return features[0].encoder if features else None
