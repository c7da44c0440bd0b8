"""What `harness doctor CONFIG` looks at beside the machine: data, options and model, by the run's
own code.

Config, launch, number of processes -> Findings. Tokens are those of the run's collator, the model
is the run's model.
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

from harness.config.schema import Config
from harness.doctor.findings import Finding
from harness.doctor.machine import GB, Gpu, disk
from harness.errors import ConfigError
from harness.machine.launcher import Launch
from shards.manifest import Manifest

FIRST_IMAGES = 300  # whose texts are tokenised
# share of questions cut from which the templates are wrong, and not a question unusually long
MANY = 0.1
FEW_STEPS = 50
# Peaks that people train with are a tenth of these: T5's documentation says 1e-4 to 3e-4, LoRA's
# paper 2e-4.
HIGHEST_RATE = {"full": 1e-3, "frozen": 1e-2, "lora": 1e-2, "qlora": 1e-2}
SCALES = (0.1, 10.0)  # image tokens against word embeddings, root mean squares


def first_sample(key: str, path: str, config: Config) -> Finding:
    """Reads and decodes the first and the last sample of a set. Raises ShardError or ImageError for
    a damaged one.
    """
    from harness.data.images import ImageDecoder
    from shards.cache import Cache
    from shards.read import Reader

    manifest = Manifest.open(path, Cache.at(config.data.cache_dir, config.data.cache_gb * GB))
    reader, decode = (
        Reader(manifest),
        ImageDecoder.of(config.model.vision, config.data.max_image_pixels),
    )
    shapes = {decode(reader.read(index)).shape for index in (0, manifest.samples - 1)}
    if manifest.kind == "features" and shapes != {(expected := _shape(manifest))}:
        fix = "make the set again with `harness shards features`"
        return Finding(
            key, "error", f"{path}: features of shape {shapes}, its index says {expected}", fix
        )
    shape = " x ".join(map(str, shapes.pop()))
    found = f"{manifest.samples:,} {manifest.kind}, {manifest.texts:,} texts; the first and the last decode to {shape}"
    return Finding(key, "OK", found)


def _shape(manifest: Manifest) -> tuple[int, int]:
    return manifest.encoder["tokens"], manifest.encoder["width"]


def sets_apart(config: Config) -> Iterator[Finding]:
    """What is scored must not be what was trained on."""
    trained = {Manifest.read_index(one.path).digest: one.path for one in config.data.train}
    for part in ("dev", "test"):
        for one in getattr(config.data, part):
            if Manifest.read_index(one.path).digest in trained:
                fix = "score another split, else what is learnt by heart counts as understood"
                yield Finding(f"data.{part}", "warning", f"{one.path} is trained on too", fix)
    if not config.data.dev:
        yield Finding(
            "data.dev",
            "warning",
            "empty: nothing is scored during training",
            "data.dev=[{path: DIR}]",
        )


def precision(config: Config, gpus: Sequence[Gpu]) -> Iterator[Finding]:
    """The dtype asked for against what each GPU can do; without a GPU, see
    `doctor.checks_before_launch`.
    """
    import torch

    from harness.machine.precision import choose

    for gpu in dict.fromkeys(gpus):
        chosen = choose(config.train.precision, torch.device("cuda"), gpu.capability)
        yield Finding("train.precision", "OK", f"{gpu.name}: {chosen.reason}")


def options(config: Config, launch: Launch, gpus: Sequence[Gpu] = ()) -> Iterator[Finding]:
    """Keys that are right one by one and wrong together."""
    train, lm = config.train, config.model.lm
    if launch.zero_stage is not None:
        importlib.import_module(
            "deepspeed"
        )  # seconds; a broken installation or an absent one is an error line
        if train.precision == "fp16" or (
            train.precision == "auto" and any(not gpu.bf16 for gpu in gpus)
        ):
            found = f"fp16 together with DeepSpeed ({launch.name}) is refused: its scaler skips steps in silence"
            yield Finding(
                "train.precision",
                "error",
                found,
                "--launch multi_gpu (DDP), or train.precision=bf16",
            )
    quantised = Path(lm.id, "config.json").is_file() and _quantisation(Path(lm.id))
    if quantised:
        found = (
            f"{lm.id} is quantised already ({quantised}): it is not trained with tuning={lm.tuning}"
        )
        yield Finding(
            "model.lm.id",
            "error",
            found,
            "give the unquantised model; tuning=qlora quantises it on loading",
        )
    if not train.eos_loss_weight:
        found = "0: the end of an answer is not learnt, answers go on to max_new_tokens"
        yield Finding("train.eos_loss_weight", "warning", found, "a small weight such as 0.1")
    if not config.model.bridge.trainable and lm.tuning == "frozen":
        found = "bridge and language model are both frozen: nothing is trained"
        yield Finding("model", "error", found, "model.bridge.trainable=true, or tuning=qlora")


def encoder_for_later(config: Config) -> Iterator[Finding]:
    """A run on feature shards does without the encoder; a question about a new picture does not."""
    from harness.checks import check_vision

    if Manifest.read_index(config.data.train[0].path).kind == "features":
        try:
            check_vision(config)
        except ConfigError as error:
            fix = "only `harness ask` will need it: training and scoring on features do not"
            yield Finding("model.vision.id", "warning", str(error), fix)


def _quantisation(folder: Path) -> str | None:
    found = json.loads((folder / "config.json").read_text()).get("quantization_config")
    return found and str(found.get("quant_method", "unknown method"))


def world(config: Config, processes: int) -> Iterator[Finding]:
    """Effective batch, steps and learning rate for this number of processes."""
    from harness.train.prepare import make_loader

    train, name = config.train, "global batch"
    share = train.global_batch / processes
    found = f"{train.global_batch} images a step over {processes} processes, {share:g} on each"
    if share < 1:
        yield Finding(
            name,
            "warning",
            f"{found}: some have nothing to do",
            f"train.global_batch={processes} or more",
        )
    elif share % 1:
        fix = f"train.global_batch={processes * math.ceil(share)}"
        yield Finding(
            name, "warning", f"{found}: the ranks that have one less wait at every step", fix
        )
    else:
        rounds = math.ceil(share / train.micro_batch)
        sizes = (
            f"{rounds} micro-batches of at most {train.micro_batch}"
            if rounds > 1
            else "one micro-batch"
        )
        yield Finding(name, "OK", f"{found}, in {sizes}")
    steps = (
        make_loader(config, None).steps_per_epoch * train.epochs
    )  # refuses caches too small for their windows
    planned = min(steps, train.max_steps or steps)
    enough = planned >= FEW_STEPS
    fix = "" if enough else "more epochs, a smaller train.global_batch, or more data"
    yield Finding(
        "steps", "OK" if enough else "warning", f"{planned:,} of {train.epochs} epochs", fix
    )
    rate, highest = train.learning_rate, HIGHEST_RATE[config.model.lm.tuning]
    found = f"{rate:g} at its peak, tuning={config.model.lm.tuning}"
    if rate > highest:
        fix = f"train.learning_rate={highest / 10:g}"
        yield Finding(
            "learning rate", "warning", f"{found}: so high a rate mostly diverges or forgets", fix
        )
    elif rate < 1e-6:
        yield Finding(
            "learning rate",
            "warning",
            f"{found}: the weights will hardly move",
            "train.learning_rate=1e-4",
        )
    else:
        why = f"it belongs to a global batch of {train.global_batch} on any number of processes"
        yield Finding("learning rate", "OK", f"{found}; {why}")


def tracking(config: Config) -> Finding:
    """Asks the store for its experiments. A run goes on without one, and sends what it missed when
    it is back.
    """
    from harness.tracking.store import database, store_uri, without_password

    if config.tracking.kind == "none":
        return Finding("MLflow", "OK", "not used: figures go to metrics.jsonl alone")
    uri = store_uri(config)
    shown = without_password(uri)
    try:
        if uri.startswith("sqlite"):
            file = database(uri)
            if not file.exists():
                return Finding("MLflow", "OK", f"{shown}, which the run will make")
            with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as store:
                runs = store.execute("SELECT count(*) FROM runs").fetchone()[0]
            return Finding("MLflow", "OK", f"{shown} with {runs} runs")
        # (!) By default one call to a server that does not answer blocks for 246 s.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
        from mlflow import MlflowClient

        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        return Finding("MLflow", "OK", f"{shown} answers")
    except Exception as error:  # every kind of store has exceptions of its own
        reason = without_password(" ".join(str(error).split()))[:200]
        fix = "start the server, or tracking.uri=sqlite:///mlflow.db; a run goes on without it and sends all later"
        return Finding("MLflow", "warning", f"{shown} does not answer: {reason}", fix)


def texts(config: Config) -> Iterator[Finding]:
    """Real batches of the first images: what `max_prompt_tokens` and `max_target_tokens` cut, and
    what has no label.
    """
    from transformers import AutoTokenizer

    from harness.data.collate import Collator
    from harness.data.prompts import template
    from harness.train.prepare import make_loader, micro_batches

    tokenizer = AutoTokenizer.from_pretrained(config.model.lm.id, revision=config.model.lm.revision)
    collate = Collator(
        tokenizer, config.data, config.prompts, config.seed, config.train.eos_loss_weight
    )
    loader, batches, images = make_loader(config, None), [], 0
    with closing(loader.iterate(epochs=1)) as steps:
        for _, samples in islice(steps, math.ceil(FIRST_IMAGES / loader.global_batch)):
            images += len(samples)
            batches += micro_batches(samples, collate, config.train.micro_batch)
    if loader.quarantined:
        fix = "`harness shards verify` names them all"
        found = f"{len(loader.quarantined)} of the first {images} cannot be used: {loader.quarantined[0][2]}"
        yield Finding("images", "error" if not batches else "warning", found, fix)
    if not batches:
        yield Finding(
            "labels",
            "error",
            f"the first {images} images carry nothing to learn",
            "`harness shards stats`",
        )
        return
    contexts = [context for batch in batches for context in batch.contexts]
    targets = sum(len(batch.labels_TL) for batch in batches)

    limit, cut = config.data.max_prompt_tokens, collate.truncated["prompt"]
    before = template("vqa", config.prompts.vqa).partition("{question}")[0]
    asked = [
        f"{before}{(context.text.prompt or '').strip()}"
        for context in contexts
        if context.text.task == "vqa"
    ]
    lost = (
        sum(len(ids) > limit - 1 for ids in tokenizer(asked, add_special_tokens=False)["input_ids"])
        if asked
        else 0
    )
    found = f"{cut} of {len(contexts)} are longer than data.max_prompt_tokens={limit}"
    fix = "a larger data.max_prompt_tokens, or a shorter template"
    if lost:
        found += f"; {lost} of {len(asked)} lose a part of the question itself"
    yield Finding("prompts", _state(lost / max(1, len(asked)), cut), found, fix if cut else "")

    limit, cut = config.data.max_target_tokens, collate.truncated["target"]
    found = f"{cut} of {targets} are longer than data.max_target_tokens={limit}"
    yield Finding(
        "targets", _state(0, cut), found, "a larger data.max_target_tokens" if cut else ""
    )

    counted = [
        (batch.weight_TL > 0) & (batch.labels_TL != tokenizer.eos_token_id) for batch in batches
    ]
    masked = sum(int((~words_TL.any(dim=1)).sum()) for words_TL in counted)
    found = f"{masked} of the first {targets} targets have no word that counts"
    fix = "a larger data.max_target_tokens, a tokenizer that knows the words, texts that are not empty"
    yield Finding("labels", _state(masked / targets, masked), found, fix if masked else "")


def _state(share: float, any_at_all: int) -> str:
    return "error" if share >= MANY else "warning" if any_at_all else "OK"


def model(config: Config, device: str) -> Iterator[Finding]:
    """Builds the run's model: the scale of its image tokens on the first batch, and the bytes of
    its checkpoints.
    """
    from harness.data.collate import Collator
    from harness.plan.planner import checkpoint_bytes
    from harness.train.prepare import build_model, calibrate, encoder_of, make_loader, micro_batches

    loader = make_loader(config, None)
    built = build_model(config, encoder_of(loader, config), device=device)
    if not config.model.init_from:
        calibrate(built, config)
    collate = Collator(built.tokenizer, config.data, config.prompts, config.seed)
    with closing(loader.iterate()) as steps:
        batches = micro_batches(next(steps)[1], collate, config.train.micro_batch)
    if batches:
        scales = built.eval().scales(batches[0].to(device))
        ratio = scales["image_token_rms"] / scales["embedding_rms"]
        found = f"{scales['image_token_rms']:.3g} (rms), {ratio:.3g} times the scale of the word embeddings"
        if SCALES[0] <= ratio <= SCALES[1]:
            yield Finding("image tokens", "OK", found)
        else:
            fix = "begin anew without model.init_from; its bridge belongs to another language model or encoder"
            yield Finding(
                "image tokens", "warning", f"{found}: the language model reads noise", fix
            )
    trained = sum(value.numel() * value.element_size() for value in built.trained_state().values())
    yield disk(config.out_dir, needed=checkpoint_bytes(config, trained))


def plan(config: Config, launch: Launch, processes: int) -> Finding:
    """The verdict of `harness plan` for the device that is here. Raises ConfigError where the run
    cannot fit.
    """
    from harness.plan.plan import check

    said: list[str] = []
    check(config, launch, processes, said.append, force=False)
    return Finding("plan", "OK", " ".join(" ".join(said).split()))
