"""What `harness doctor CONFIG` looks at beside the machine, by the run's own code.

Config, launch, number of processes -> Findings on data, options and model. Tokens are those of the
run's collator, the model is the run's model.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path

import torch

from harness.checks import check_vision, without_dev
from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.images import ImageDecoder, cache_of, patience_of
from harness.data.prompts import template
from harness.doctor.findings import Finding, State, error, ok, warning
from harness.doctor.machine import Gpu, disk
from harness.errors import ConfigError
from harness.loading import tokenizer_of
from harness.machine.hardware import multiplies_bf16
from harness.machine.launch_file import Launch
from harness.machine.launcher import undecided
from harness.machine.precision import choose
from harness.model.batch import Batch
from harness.plan.plan import check
from harness.plan.planner import checkpoint_bytes
from harness.redact import clean
from harness.tracking.store import database, store_uri
from harness.train.prepare import (
    build_model,
    calibrate,
    encoder_of,
    in_one_lane,
    make_loader,
    micro_batches,
)
from shards.loader import about_lanes
from shards.manifest import Manifest
from shards.read import Reader, Sample

FIRST_IMAGES = 300  # whose texts are tokenised
# Share of questions cut from which the templates are wrong, and not a question unusually long.
MANY = 0.1
FEW_STEPS = 50
# Peaks that people train with are a tenth of these: T5's documentation says 1e-4 to 3e-4, LoRA's
# paper 2e-4.
HIGHEST_RATE = {"full": 1e-3, "frozen": 1e-2, "lora": 1e-2, "qlora": 1e-2}
LOWEST_RATE = 1e-6
SCALES = (0.1, 10.0)  # image tokens against word embeddings, root mean squares


def first_sample(key: str, path: str, config: Config) -> Finding:
    """Decodes the first and the last picture of a set. Raises ShardError, ImageError."""
    manifest = Manifest.open(path, cache_of(config), patience_of(config))
    reader = Reader(manifest)
    decode = ImageDecoder.of(config.model.vision, config.data.max_image_pixels)
    if not manifest.has_pictures:
        return ok(key, f"{manifest.samples:,} records without a picture, {manifest.texts:,} texts")
    ends = [first_picture(reader, step) for step in (1, -1)]
    shapes = {decode(sample).shape for sample in ends}
    if encoder := manifest.encoder:
        expected = (encoder["tokens"], encoder["width"])
        if shapes != {expected}:
            fix = "make the set again with `harness shards features`"
            found = f"{path}: features of shape {shapes}, its index says {expected}"
            return error(key, found, fix)
    shape = " x ".join(map(str, shapes.pop()))
    pictures = manifest.samples - manifest.without_picture
    found = f"{pictures:,} {manifest.kind}, {manifest.texts:,} texts"
    if manifest.without_picture:
        found += f", {manifest.without_picture:,} records without a picture"
    return ok(key, f"{found}; the first and the last decode to {shape}")


def first_picture(reader: Reader, step: int) -> Sample:
    """Returns the first sample of a set that has a picture; the last one with a `step` of -1."""
    places = range(reader.manifest.samples)[::step]
    return next(s for index in places if (s := reader.read(index)).known.has_picture)


def sets_apart(config: Config) -> Iterator[Finding]:
    """Yields a warning for what is scored and was trained on."""
    trained = {Manifest.read_index(train.path).digest for train in config.data.train}
    for part in ("dev", "test"):
        for scored in getattr(config.data, part):
            if Manifest.read_index(scored.path).digest in trained:
                fix = "score another split, else what is learnt by heart counts as understood"
                yield warning(f"data.{part}", f"{scored.path} is trained on too", fix)
    for sentence in without_dev(config):
        yield warning("data.dev", sentence, "data.dev=[{path: DIR}]")


def precision(config: Config, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """Yields the dtype that each kind of GPU gets; without a GPU see checks_before_launch."""
    if not gpus and config.train.precision == "bf16" and not multiplies_bf16():
        found = choose("bf16", torch.device("cpu")).reason
        yield warning("train.precision", found, "train.precision=auto")
    for gpu in dict.fromkeys(gpus):
        chosen = choose(config.train.precision, torch.device("cuda"), gpu.capability)
        yield ok("train.precision", f"{gpu.name}: {chosen.reason}")


def options(config: Config, launch: Launch, gpus: Sequence[Gpu] = ()) -> Iterator[Finding]:
    """Yields what is right key by key and wrong together."""
    train = config.train
    lm = config.model.lm
    if launch.zero_stage is not None:
        # Takes seconds; a broken installation or an absent one is an error line.
        importlib.import_module("deepspeed")
        is_fp16 = train.precision == "auto" and any(not gpu.bf16 for gpu in gpus)
        if is_fp16 or train.precision == "fp16":
            yield error(
                "train.precision",
                f"fp16 together with DeepSpeed ({launch.name}) is refused: its scaler skips steps "
                "in silence",
                "--launch multi_gpu (DDP), or train.precision=bf16",
            )
    if quantised := _quantisation(Path(lm.id)):
        yield error(
            "model.lm.id",
            f"{lm.id} is quantised already ({quantised}): it is not trained with "
            f"tuning={lm.tuning}",
            "give the unquantised model; tuning=qlora quantises it on loading",
        )
    if not train.eos_loss_weight:
        found = "0: the end of an answer is not learnt, answers go on to max_new_tokens"
        yield warning("train.eos_loss_weight", found, "a small weight such as 0.1")
    if not config.model.bridge.trainable and lm.tuning == "frozen":
        found = "bridge and language model are both frozen: nothing is trained"
        yield error("model", found, "model.bridge.trainable=true, or tuning=qlora")


def launch_file(config: Config, launch: Launch, processes: int) -> Iterator[Finding]:
    """Yields what of a launch file decides nothing. Raises ConfigError for what contradicts the
    config.
    """
    for sentence in undecided(launch, config.train, processes):
        yield warning("launch file", sentence, "take it out of the file")


def _quantisation(folder: Path) -> str | None:
    """Returns how the model in a folder is quantised; None where it is not, or is no folder."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    found = json.loads(file.read_text()).get("quantization_config")
    return found and str(found.get("quant_method", "unknown method"))


def encoder_for_later(config: Config) -> Iterator[Finding]:
    """Yields what a run on features does without, and a question about a new picture does not."""
    sets = [Manifest.read_index(train.path) for train in config.data.train]
    if any(each.kind == "features" and each.has_pictures for each in sets):
        try:
            check_vision(config)
        except ConfigError as problem:
            fix = "only `harness ask` will need it: training and scoring on features do not"
            yield warning("model.vision.id", str(problem), fix)


def world(config: Config, processes: int, machines: int = 1) -> Iterator[Finding]:
    """Yields effective batch, steps and learning rate for so many processes, on all machines."""
    yield _shares(config, processes)
    train = config.train
    # make_loader refuses caches too small for the windows of a machine's lanes.
    here = max(1, processes // machines)
    loader = make_loader(config, None, world_size=processes, ranks_here=here)
    for found in about_lanes(loader.manifests, loader.lanes, processes):
        fix = "a data.lanes that fits processes and shards, or more and smaller shards"
        yield warning("lanes", found, fix)
    steps = loader.steps_per_epoch * train.epochs
    planned = min(steps, train.max_steps or steps)
    found = f"{planned:,} of {train.epochs} epochs"
    if planned >= FEW_STEPS:
        yield ok("steps", found)
    else:
        yield warning("steps", found, "more epochs, a smaller train.global_batch, or more data")
    yield _learning_rate(config)


def _shares(config: Config, processes: int) -> Finding:
    train = config.train
    name = "global batch"
    share = train.global_batch / processes
    found = f"{train.global_batch} images a step over {processes} processes, {share:g} on each"
    if share < 1:
        fix = f"train.global_batch={processes} or more"
        return warning(name, f"{found}: some have nothing to do", fix)
    if share % 1:
        fix = f"train.global_batch={processes * math.ceil(share)}"
        return warning(name, f"{found}: the ranks that have one less wait at every step", fix)
    rounds = math.ceil(share / train.micro_batch)
    if rounds > 1:
        return ok(name, f"{found}, in {rounds} micro-batches of at most {train.micro_batch}")
    return ok(name, f"{found}, in one micro-batch")


def _learning_rate(config: Config) -> Finding:
    name = "learning rate"
    rate = config.train.learning_rate
    tuning = config.model.lm.tuning
    highest = HIGHEST_RATE[tuning]
    found = f"{rate:g} at its peak, tuning={tuning}"
    if rate > highest:
        fix = f"train.learning_rate={highest / 10:g}"
        return warning(name, f"{found}: so high a rate mostly diverges or forgets", fix)
    if rate < LOWEST_RATE:
        return warning(name, f"{found}: the weights will hardly move", "train.learning_rate=1e-4")
    batch = config.train.global_batch
    return ok(name, f"{found}; it belongs to a global batch of {batch} on any number of processes")


def tracking(config: Config) -> Finding:
    """Asks the store for its experiments; a run goes on without one and sends all later."""
    if config.tracking.kind == "none":
        return ok("MLflow", "not used: figures go to metrics.jsonl alone")
    uri = store_uri(config)
    shown = clean(uri)
    try:
        if uri.startswith("sqlite"):
            file = database(uri)
            if not file.exists():
                return ok("MLflow", f"{shown}, which the run will make")
            with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as store:
                runs = store.execute("SELECT count(*) FROM runs").fetchone()[0]
            return ok("MLflow", f"{shown} with {runs} runs")
        # (!) By default one call to a server that does not answer blocks for 246 s.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        from mlflow import MlflowClient  # not installed where tracking.kind is none

        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        return ok("MLflow", f"{shown} answers")
    except Exception as problem:  # every kind of store has exceptions of its own
        reason = clean(" ".join(str(problem).split()))[:200]
        return warning(
            "MLflow",
            f"{shown} does not answer: {reason}",
            "start the server, or tracking.uri=sqlite:///mlflow.db; a run goes on without it and "
            "sends all later",
        )


def texts(config: Config) -> Iterator[Finding]:
    """Yields what the limits cut of the first images' real batches, and what has no label."""
    collate = Collator.of(config, tokenizer_of(config))
    loader = make_loader(in_one_lane(config), None)
    batches: list[Batch] = []
    images = 0
    with closing(loader.iterate(epochs=1)) as steps:
        for _, samples in islice(steps, math.ceil(FIRST_IMAGES / loader.global_batch)):
            images += len(samples)
            batches += micro_batches(samples, collate, config.train.micro_batch)
    if loader.quarantined:
        count = len(loader.quarantined)
        first = next(iter(loader.quarantined.values()))
        found = f"{count} of the first {images} cannot be used: {first}"
        state: State = "warning" if batches else "error"
        yield Finding("images", state, found, "`harness shards verify` names them all")
    if not batches:
        found = f"the first {images} images carry nothing to learn"
        yield error("labels", found, "`harness shards stats`")
        return
    yield _cut_prompts(config, collate, batches)
    yield _cut_targets(config, collate, batches)
    yield _without_label(collate, batches)


def _cut_prompts(config: Config, collate: Collator, batches: Sequence[Batch]) -> Finding:
    contexts = [context for batch in batches for context in batch.contexts]
    limit = config.data.max_prompt_tokens
    cut = collate.truncated["prompt"]
    before = template("vqa", config.prompts.vqa).partition("{question}")[0]
    asked = [
        f"{before}{(context.text.prompt or '').strip()}"
        for context in contexts
        if context.text.task == "vqa"
    ]
    lost = 0
    if asked:
        rows = collate.tokenizer(asked, add_special_tokens=False)["input_ids"]
        lost = sum(len(ids) > limit - 1 for ids in rows)
    found = f"{cut} of {len(contexts)} are longer than data.max_prompt_tokens={limit}"
    if lost:
        found += f"; {lost} of {len(asked)} lose a part of the question itself"
    fix = "a larger data.max_prompt_tokens, or a shorter template"
    return _by_share("prompts", lost / max(1, len(asked)), cut, found, fix)


def _cut_targets(config: Config, collate: Collator, batches: Sequence[Batch]) -> Finding:
    limit = config.data.max_target_tokens
    cut = collate.truncated["target"]
    targets = sum(len(batch.labels_TL) for batch in batches)
    found = f"{cut} of {targets} are longer than data.max_target_tokens={limit}"
    return _by_share("targets", 0, cut, found, "a larger data.max_target_tokens")


def _without_label(collate: Collator, batches: Sequence[Batch]) -> Finding:
    eos = collate.tokenizer.eos_token_id
    masked = 0
    targets = 0
    for batch in batches:
        counts_TL = (batch.weight_TL > 0) & (batch.labels_TL != eos)
        masked += int((~counts_TL.any(dim=1)).sum())
        targets += len(counts_TL)
    found = f"{masked} of the first {targets} targets have no word that counts"
    fix = (
        "a larger data.max_target_tokens, a tokenizer that knows the words, texts that are not "
        "empty"
    )
    return _by_share("labels", masked / targets, masked, found, fix)


def _by_share(name: str, share: float, count: int, found: str, fix: str) -> Finding:
    """Returns an error where `share` is large, a warning where there is any, else OK."""
    if share >= MANY:
        return error(name, found, fix)
    return warning(name, found, fix) if count else ok(name, found)


def model(config: Config, device: str) -> Iterator[Finding]:
    """Builds the run's model: the scale of its image tokens, the bytes of its checkpoints."""
    config = in_one_lane(config)
    loader = make_loader(config, None)
    built = build_model(config, encoder_of(loader, config), device=device)
    if not config.model.init_from:
        calibrate(built, config)
    collate = Collator.of(config, built.tokenizer)
    with closing(loader.iterate()) as steps:
        batches = micro_batches(next(steps)[1], collate, config.train.micro_batch)
    shown = [batch for batch in batches if batch.images]
    if shown and not config.train.objective:
        scales = built.eval().scales(shown[0].to(device))
        rms = scales["image_token_rms"]
        ratio = rms / scales["embedding_rms"]
        found = f"{rms:.3g} (rms), {ratio:.3g} times the scale of the word embeddings"
        if SCALES[0] <= ratio <= SCALES[1]:
            yield ok("image tokens", found)
        else:
            yield warning(
                "image tokens",
                f"{found}: the language model reads noise",
                "begin anew without model.init_from; its bridge belongs to another language model "
                "or encoder",
            )
    trained = sum(value.numel() * value.element_size() for value in built.trained_state().values())
    yield disk(config.out_dir, needed=checkpoint_bytes(config, trained))


def plan(config: Config, launch: Launch, processes: int) -> Finding:
    """Asks `harness plan` for the device that is here. Raises ConfigError where it cannot fit."""
    said: list[str] = []
    check(config, launch, processes, said.append, force=False)
    return ok("plan", " ".join(" ".join(said).split()))
