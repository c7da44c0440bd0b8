"""The training loop, to be read from top to bottom. Knows no engine by name: what differs lies in engine.py.

    accelerate launch -m harness.train configs/demo.yaml train.epochs=2      the same as `harness train ...`
    harness train configs/flickr8k_offline.yaml train.max_steps=20           a first look on a laptop

One optimizer step takes one whole global batch: every rank collates its micro-batches first, the sum of target weights
over all ranks is one all-reduce, and every micro-batch's loss is divided by it. Never an average of averages.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from harness import checkpoint as checkpoints
from harness import config as configs
from harness.batch import Batch, Collator, drawn
from harness.config import Config, ConfigError
from harness.doctor import check_before_launch, check_resume, explain
from harness.engine import Engine
from harness.evaluate.run import evaluate_model
from harness.features import check_encoder
from harness.guards import GradientGuard, GuardError, frozen_hash
from harness.model.processing import ImageDecoder
from harness.model.vlm import VisionLanguageModel
from harness.report import predictions_html
from harness.schedule import learning_rate
from harness.terminal import Terminal, memory_mb, part_rows
from harness.tracking import NoTracker, open_tracker
from shards.loader import Loader
from shards.stream import StreamState


@dataclass
class TrainState:
    """Where the run stands; with the weights and moments, all that a resumed run needs."""

    step: int = 0  # optimizer steps, skipped ones included
    skipped: int = 0
    skipped_in_a_row: int = 0
    stream: StreamState | None = None


def make_loader(config: Config, engine: Engine) -> Loader:
    sets = config.data.train
    return Loader(
        [s.path for s in sets],
        [s.weight for s in sets] if any(s.weight for s in sets) else None,
        global_batch=config.train.global_batch,
        seed=config.seed,
        rank=engine.rank,
        world_size=engine.world_size,
        workers=config.data.workers,
        prefetch=config.data.prefetch,
        window_shards=config.data.window_shards,
        last_batch=config.data.last_batch,
        decode=ImageDecoder.of(config.model.vision, config.data.max_image_pixels),
        cache_dir=config.data.cache_dir,
        cache_bytes=int(config.data.cache_gb * 1e9),
        quarantine=config.out_dir / "quarantine.jsonl",
    )


def encoder_of(loader: Loader, config: Config) -> dict | None:
    """The encoder that made the features of these sets, None for sets of images. Raises ConfigError for another's."""
    features = [manifest for manifest in loader.manifests if manifest.kind == "features"]
    for manifest in features:
        check_encoder(manifest, config.model.vision)
    return features[0].encoder if features else None


def micro_batches(samples: Sequence, collate: Collator, size: int, filler: Batch) -> list[Batch]:
    """This rank's share of a global batch, `size` images at a time; at least one, so that all ranks stay in step."""
    parts = [collate(samples[i : i + size]) for i in range(0, len(samples), size)]
    return [part for part in parts if part is not None] or [filler]


def run(config: Config, resume: str | None = None) -> Path:
    """Trains and returns the last checkpoint's folder. Raises ConfigError, ShardError or GuardError."""
    engine, out = Engine(config.train), config.out_dir
    terminal = Terminal(engine.is_main)
    found = checkpoints.find(out, resume, terminal.say)
    if resume is None and checkpoints.newest(out):
        raise ConfigError(
            f"{out} holds checkpoints of an earlier run: go on with --resume auto, or choose another out="
        )
    loader = make_loader(config, engine)
    encoder = encoder_of(loader, config)

    terminal.say(f"precision: {engine.precision.reason}")
    model = VisionLanguageModel.build(config, encoder, precision=engine.precision, device=engine.device)
    if found:  # before prepare: an engine may keep copies of the weights of its own
        check_same_model(found.state["config"], config)
        model.load_trained(found.model)
    wrapped = engine.prepare(model)
    state = TrainState(stream=StreamState(0, 0, loader.digest))
    run_id = None
    if found:
        engine.load_optimizer_state(found.optimizer())
        engine.load_scaler_state(found.state["scaler"])
        run_id = found.state["run_id"]
        saved = found.state["train"]
        state = TrainState(**{**saved, "stream": StreamState.from_json(saved["stream"])})
        terminal.say(f"going on after step {state.step} from {found.path}")

    terminal.parts(part_rows(model.parts))
    facts = {"dtype": f"{engine.precision.name}: {engine.precision.reason}", "world_size": str(engine.world_size)}
    tracker = (
        open_tracker(config, run_id=run_id, resume_step=state.step, facts=facts, datasets=loader.manifests)
        if engine.is_main
        else NoTracker()
    )
    status = "FAILED"
    try:
        last = loop(config, engine, model, wrapped, loader, state, tracker)
        status = "FINISHED"
        return last
    finally:
        tracker.close(status)
        engine.close()


def loop(config, engine, model, wrapped, loader, state, tracker) -> Path:
    """Steps until the last epoch, `max_steps`, or a request to stop. Every rank runs every line of it alike."""
    train, device, out = config.train, engine.device, config.out_dir
    collate = Collator(model.tokenizer, config.data, config.prompts, config.seed, train.eos_loss_weight)
    shape = (model.config.encoder["tokens"], model.config.encoder["width"])
    size = config.model.vision.image_size
    filler = collate.filler(shape, True) if model.vision is None else collate.filler((size, size, 3), False)
    planned_steps = loader.steps_per_epoch * train.epochs
    last_step = min(planned_steps, train.max_steps or planned_steps)
    stop_asked = asked_to_stop()
    frozen, guard = frozen_hash(model), GradientGuard(model)
    written: checkpoints.Checkpoint | None = None
    clock = Clock()
    model.train()

    if state.step >= last_step:
        raise ConfigError(f"nothing is left to do: {out} stands at step {state.step} of {last_step}")
    with (
        Terminal(engine.is_main, last_step, state.step) as terminal,
        closing(loader.iterate(state.stream, train.epochs)) as steps,
    ):
        for stream, samples in steps:
            clock.waited()
            batches = micro_batches(samples, collate, train.micro_batch, filler)
            # The model's randomness (dropout) is a function of (seed, step, rank): no RNG state to save or disturb.
            torch.manual_seed(drawn(config.seed, state.step, f"rank {engine.rank}") >> 1)
            images = sum(b.images for b in batches if b is not filler)
            targets = sum(len(b.labels_TL) for b in batches if b is not filler)
            weight, images, targets = engine.sum([sum(float(b.weight) for b in batches), images, targets])

            loss_sum = 0.0
            for index, batch in enumerate(batches):
                with engine.micro_step(last=index == len(batches) - 1):
                    loss = wrapped(batch.to(device)).sum / max(weight, 1e-8)
                    engine.backward(loss)
                loss_sum += loss.detach().item()
            # One packed tensor of flags decides for all ranks alike.
            loss, bad, stop = engine.sum([loss_sum, not math.isfinite(loss_sum), stop_asked()])
            rate = learning_rate(train, state.step, planned_steps)
            norm = engine.step(rate, skip=bool(bad))
            state.step, state.stream = state.step + 1, stream

            if norm is None:
                state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
                guard.forget()
                terminal.say(
                    f"step {state.step}: loss or gradient is not finite, step skipped ({state.skipped} so far)"
                )
                if state.skipped_in_a_row >= train.max_skipped_in_a_row:
                    good = checkpoints.newest(out)
                    raise GuardError(
                        f"{state.skipped_in_a_row} steps in a row were not finite; "
                        f"the last good checkpoint is {good.path if good else 'none: no checkpoint was written yet'}"
                    )
            else:
                state.skipped_in_a_row = 0
                if guard:
                    guard.check()
                    check_frozen(model, frozen)
                    guard = None
                    scales = model.scales(batches[0].to(device))  # far apart, the language model reads noise
                    terminal.say(", ".join(f"{name} {value:.4g}" for name, value in scales.items()))
                    tracker.metrics({f"train/{name}": value for name, value in scales.items()}, state.step)

            clock.step(images, targets)
            epoch_ends = stream.position == loader.samples
            ends = state.step == last_step or bool(stop)
            if state.step % train.log_every == 0 or ends:
                numbers = {"loss": loss, "learning_rate": rate, "skipped_steps": state.skipped, **clock.rates()}
                numbers |= {"grad_norm": norm or math.nan, "memory_mb": memory_mb(device), "epoch": stream.epoch}
                numbers["quarantined_samples"] = len(loader.quarantined)
                numbers["truncated_texts"] = collate.truncated.total()
                terminal.advance(state.step, numbers)
                tracker.metrics({f"train/{k}": v for k, v in numbers.items()}, state.step)
            if ends or (state.step % train.evaluate_every == 0 if train.evaluate_every else epoch_ends):
                evaluate(config, engine, model, state, terminal, tracker)
            if ends or (state.step % train.save_every == 0 if train.save_every else epoch_ends):
                if ends:
                    check_frozen(model, frozen)
                written = save(config, engine, model, state, tracker)
            if ends:
                break
            clock.restart()
    return written.path


def evaluate(config: Config, engine: Engine, model, state: TrainState, terminal: Terminal, tracker) -> None:
    """Scores on the dev sets, and the answers to the same images as always; the main process alone, others wait."""
    if engine.is_main and config.data.dev:
        limit = config.evaluation.dev_images
        result = evaluate_model(model, [s.path for s in config.data.dev], config, limit=limit)
        tracker.metrics({f"dev/{name}": value for name, value in result.metrics().items()}, state.step)
        terminal.say(f"step {state.step}: " + ", ".join(f"{k} {v:.4g}" for k, v in result.metrics().items()))
        terminal.answers([(p.prompt, p.references[0], p.answer) for p in result.shown])
        page = predictions_html(result.shown_images, config.out_dir / "answers" / f"step-{state.step:06d}.html")
        tracker.artifact(page, "answers")
    model.train()
    engine.wait()


def save(config: Config, engine: Engine, model, state: TrainState, tracker) -> checkpoints.Checkpoint | None:
    """Gathers on all ranks, writes on one; returns the checkpoint there, and its place on the others."""
    weights, optimizer = engine.trained_state(), engine.optimizer_state()
    written = None
    if engine.is_main:
        document = {
            "step": state.step,
            "train": {**asdict(state), "stream": state.stream.to_json()},
            "scaler": engine.scaler_state(),
            "config": config.model_dump(mode="json"),
            "run_id": tracker.run_id,
            "world_size": engine.world_size,
        }
        written = checkpoints.write(
            config.out_dir, state.step, lambda folder: model.save_pretrained(folder, weights), optimizer, document
        )
        checkpoints.prune(config.out_dir, config.train.keep_checkpoints)
        tracker.checkpoint(written.path, written.digest, state.step)
    engine.wait()
    return written


def check_frozen(model, before: str) -> None:
    if frozen_hash(model) != before:
        raise GuardError("a frozen parameter or buffer has changed during training; this is a bug, please report it")


def check_same_model(saved: dict, config: Config) -> None:
    """A checkpoint goes on only with the model it was written by."""
    before, now = configs.flatten(Config(**saved)), configs.flatten(config)
    for key in sorted(before.keys() | now.keys()):
        if key.startswith("model.") and before.get(key) != now.get(key):
            raise ConfigError(f"--resume: {key} was {before.get(key)!r} in the checkpoint and is {now.get(key)!r} now")


def asked_to_stop():
    """A function that tells whether SIGTERM or SIGINT came: the run then saves and ends, as before a preemption."""
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: asked.append(True))
    return lambda: bool(asked)


class Clock:
    """Speed since the last report: images and targets a second, and the share of time spent waiting for data."""

    def __init__(self) -> None:
        self._reset()
        self._mark = time.perf_counter()

    def _reset(self) -> None:
        self._images = self._targets = 0.0
        self._wait = self._busy = 0.0

    def waited(self) -> None:
        now = time.perf_counter()
        self._wait, self._mark = self._wait + now - self._mark, now

    def step(self, images: float, targets: float) -> None:
        now = time.perf_counter()
        self._busy, self._mark = self._busy + now - self._mark, now
        self._images, self._targets = self._images + images, self._targets + targets

    def restart(self) -> None:
        """What happened since the step (an evaluation, a checkpoint) is neither work nor waiting."""
        self._mark = time.perf_counter()

    def rates(self) -> dict[str, float]:
        seconds = max(self._wait + self._busy, 1e-9)
        rates = {
            "images_per_second": self._images / seconds,
            "targets_per_second": self._targets / seconds,
            "data_wait": self._wait / seconds,
        }
        self._reset()
        return rates


def main(arguments: Sequence[str] | None = None) -> int:
    """What `accelerate launch -m harness.train` runs. Bad input: one sentence from rank 0, exit code 2."""
    parser = argparse.ArgumentParser(prog="harness.train", description="Train a vision-language model.")
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--resume", help="auto, or a checkpoint's folder")
    given = parser.parse_args(arguments)
    try:
        config = configs.load(given.config, given.overrides)
        check_before_launch(config)
        check_resume(config, given.resume)
        last = run(config, given.resume)
    except Exception as error:
        if (sentence := explain(error)) is None:
            raise
        if os.environ.get("RANK", "0") == "0":
            print(f"harness: {sentence}", file=sys.stderr)
        return 2
    if os.environ.get("RANK", "0") == "0":
        print(f"checkpoint: {last}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
