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
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from harness import checkpoint as checkpoints
from harness.checks import changes, check_before_launch, check_resume
from harness.config.load import load
from harness.config.schema import Config
from harness.data.collate import Collator, drawn
from harness.data.features import check_encoder
from harness.data.images import reading
from harness.engine import Engine, make_engine
from harness.errors import GuardError, explain
from harness.evaluate.run import evaluate_model
from harness.evaluate.small_gate import SmallSet, small_gate, small_gate_metrics, small_set
from harness.guards import GradientGuard, check_frozen, first_nonfinite, frozen_hash
from harness.machine.signals import stop_requests
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from harness.report.terminal import Clock, Terminal, memory_mb, part_rows
from harness.schedule import learning_rate
from harness.tracking.tracker import NoTracker, Tracker, open_tracker, recorded_run_id
from shards.loader import Loader
from shards.manifest import Manifest
from shards.read import Sample
from shards.stream import StreamState


@dataclass
class TrainState:
    """Where the run stands; with the weights and moments, all that a resumed run needs."""

    stream: StreamState
    step: int = 0  # optimizer steps, skipped ones included
    skipped: int = 0
    skipped_in_a_row: int = 0


@dataclass(frozen=True)
class Run:
    """What a run consists of, on every rank; `wrapped` is the model as the engine wants it called."""

    config: Config
    engine: Engine
    model: VisionLanguageModel
    wrapped: nn.Module
    loader: Loader
    state: TrainState
    terminal: Terminal
    tracker: Tracker

    @property
    def epochs(self) -> float:
        """How often the training set was seen."""
        return self.state.stream.epoch + self.state.stream.position / self.loader.samples


def loop(run: Run, stop_asked: Callable[[], int]) -> int:
    """Steps until the last epoch or `max_steps`; or until a signal came, whose number it returns. All ranks alike."""
    config, engine, model, loader, state = run.config, run.engine, run.model, run.loader, run.state
    train, terminal = config.train, run.terminal
    collate = Collator(model.tokenizer, config.data, config.prompts, config.seed, train.eos_loss_weight)
    filler = filler_of(collate, model)
    planned_steps = state.step + steps_left(loader, state.stream, train.epochs)
    last_step = min(planned_steps, train.max_steps or planned_steps)
    # As many on every rank, whatever it reads: under ZeRO each of them is a meeting of all ranks.
    micro_steps = math.ceil(math.ceil(train.global_batch / engine.world_size) / train.micro_batch)
    frozen, guard = frozen_hash(model), GradientGuard(model)
    samples_of_steps = loader.iterate(state.stream, train.epochs)  # refuses a state of another order
    clock, stop, small = Clock(), 0, None

    def due(every: int | None) -> bool:
        return state.step % every == 0 if every else state.stream.position == loader.samples

    if state.step and (state.step >= last_step or due(train.evaluate_every) or due(None)):
        evaluate(run, again=False)  # the earlier process may have been killed in the middle of it
    if state.step >= last_step:
        terminal.say(f"nothing is left to do: {config.out_dir} stands at step {state.step} of {last_step}")
        return 0
    model.train()
    with (
        terminal.progress(last_step, state.step),
        closing(samples_of_steps) as steps,
    ):
        for stream, samples in steps:
            clock.waited()
            real = micro_batches(samples, collate, train.micro_batch)
            batches = real + [filler] * (micro_steps - len(real))
            weight, images, targets = engine.sum(totals(real))

            # The model's randomness (dropout) is a function of (seed, step, rank): no RNG state to save or disturb.
            torch.manual_seed(drawn(config.seed, state.step, f"rank {engine.rank}") >> 1)
            loss_sum = 0.0
            for index, batch in enumerate(batches):
                with engine.micro_step(last=index == len(batches) - 1):
                    loss = run.wrapped(batch.to(engine.device)).sum / max(weight, 1e-8)
                    engine.backward(loss)
                loss_sum += loss.item()
            # One packed tensor of flags decides for all ranks alike.
            flags = [loss_sum, not math.isfinite(loss_sum), stop_asked() > 0]
            flags += [len(loader.quarantined), collate.truncated.total()]
            loss, bad, stop, quarantined, truncated = engine.sum(flags)
            rate = learning_rate(train, state.step, planned_steps)
            norm = engine.step(rate, skip=bad > 0)
            state.step, state.stream = state.step + 1, stream

            if norm is None:
                state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
                terminal.say(f"step {state.step}: loss or gradient not finite, step skipped ({state.skipped} so far)")
                if state.skipped_in_a_row >= train.max_skipped_in_a_row:
                    raise GuardError(too_many_skipped(run, batches))
            else:
                state.skipped_in_a_row = 0
            if guard and norm is None:
                guard.forget()
            elif guard:
                guard.check()
                check_frozen(model, frozen)
                guard = None
                scales = model.scales(batches[0].to(engine.device))  # far apart, the language model reads noise
                terminal.say(", ".join(f"{name} {value:.4g}" for name, value in scales.items()))
                run.tracker.metrics({f"train/{name}": value for name, value in scales.items()}, state.step)

            clock.step(images, targets)
            ends = state.step == last_step
            numbers = {"loss": loss, "learning_rate": rate, "grad_norm": math.nan if norm is None else norm}
            numbers |= {"epoch": stream.epoch, "skipped_steps": state.skipped, "quarantined_samples": quarantined}
            numbers |= {"truncated_texts": truncated, "loss_scale": engine.loss_scale}
            numbers |= {"memory_mb": memory_mb(engine.device), **clock.rates()}
            terminal.advance(state.step, numbers)
            if state.step % train.log_every == 0 or ends or stop:
                run.tracker.metrics({f"train/{name}": value for name, value in numbers.items()}, state.step)
                clock.reset()
            if ends or stop:
                check_frozen(model, frozen)
            if ends or stop or due(train.save_every):  # before the evaluation: whatever befalls that, this step is kept
                save(run)
            if stop:  # who stops a run may give it seconds
                return stop_asked() or signal.SIGTERM
            if ends or due(train.evaluate_every) or due(None):  # at the end of every epoch in any case
                evaluate(run)
            elif train.image_use_every and config.data.dev and due(train.image_use_every):
                small = small or (small_set(model, config) if engine.is_main else None)
                look(run, small)
            if ends:
                break
            clock.restart()
    return 0


def micro_batches(samples: Sequence[Sample], collate: Collator, size: int) -> list[Batch]:
    """This rank's share of a global batch, `size` images at a time; [] where there is nothing to learn from."""
    parts = [collate(samples[start : start + size]) for start in range(0, len(samples), size)]
    return [part for part in parts if part is not None]


def totals(batches: Sequence[Batch]) -> tuple[float, int, int]:
    """The weight, images and targets of this rank's share."""
    return sum(float(b.weight) for b in batches), sum(b.images for b in batches), sum(len(b.labels_TL) for b in batches)


def filler_of(collate: Collator, model: VisionLanguageModel) -> Batch:
    """The batch of weight 0 for a rank that has none of its own, so that all ranks stay in step."""
    if model.vision is None:
        return collate.filler((model.config.encoder["tokens"], model.config.encoder["width"]), True)
    return collate.filler((model.vision.image_size, model.vision.image_size, 3), False)


def steps_left(loader: Loader, stream: StreamState, epochs: int) -> int:
    """Optimizer steps from `stream` to the end of the last epoch; also where `global_batch` or `epochs` was changed."""
    rest = loader.samples - stream.position
    in_epoch = rest // loader.global_batch if loader.last_batch == "drop" else -(-rest // loader.global_batch)
    return max(0, in_epoch + (epochs - stream.epoch - 1) * loader.steps_per_epoch)


def too_many_skipped(run: Run, batches: Sequence[Batch]) -> str:
    """Why the run cannot go on: what was not finite first in this rank's share of the last step."""
    engine, good = run.engine, checkpoints.newest(run.config.out_dir)
    with engine.whole():
        seen = (first_nonfinite(run.model, batch.to(engine.device), engine.loss_scale) for batch in batches)
        first = next(filter(None, seen), "nothing on this rank")
        engine.wait()
    return (
        f"{run.state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, the first of the last "
        f"one: {first} (loss scale {engine.loss_scale:g}); lower train.learning_rate, or ask for train.precision=fp32; "
        f"the last good checkpoint is {good.path if good else 'none: none was written yet'}"
    )


def look(run: Run, small: SmallSet | None) -> None:
    """The gate on a few dev images between two evaluations; the main process alone has some, others wait."""
    config, engine, state = run.config, run.engine, run.state
    with engine.whole():
        if small:
            uses = small_gate(run.model, small, config, run.epochs)
            figures = small_gate_metrics(uses)
            run.tracker.metrics({f"gate/{name}": value for name, value in figures.items()}, state.step)
        engine.wait()


def evaluate(run: Run, again: bool = True) -> None:
    """Scores on the dev sets, and the answers to the same images as always; the main process alone, others wait.

    `again` False: only where this step's answers are not there yet. Raises GuardError as `stop_if_image_ignored` says.
    """
    config, engine, state, ignored = run.config, run.engine, run.state, ""
    page, result = config.out_dir / "answers" / f"step-{state.step:06d}.html", None
    (wanted,) = engine.sum([engine.is_main and bool(config.data.dev) and (again or not page.exists())])
    with engine.whole() if wanted else nullcontext():
        if wanted and engine.is_main:
            result = evaluate_model(
                run.model,
                [s.path for s in config.data.dev],
                config,
                limit=config.evaluation.dev_images,
                counterfactual_texts=config.evaluation.dev_counterfactual_texts,
                epochs=run.epochs,
            )
        engine.wait()
    if result:
        values = {**result.metrics(), "unreadable_samples": result.unreadable}
        run.tracker.metrics({f"dev/{name}": value for name, value in values.items()}, state.step)
        run.tracker.predictions(result.shown_images, state.step)
        run.terminal.say(f"step {state.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
        run.terminal.answers(result.shown_images)
        for task, use in ((task, scored.image_use) for task, scored in result.tasks.items()):
            if use:
                run.terminal.say(f"{task}: {use.verdict}: {use.reason}")
                ignored = f"{task}: {use.reason}" if use.verdict == "image ignored" else ignored
    run.model.train()
    (stop,) = engine.sum([bool(ignored)])
    if stop and run.epochs >= 1 and config.train.stop_if_image_ignored:
        raise GuardError(f"train.stop_if_image_ignored: after step {state.step} the images are ignored ({ignored})")


def save(run: Run) -> None:
    """Gathers on all ranks, writes on one."""
    engine, config, state = run.engine, run.config, run.state
    weights, optimizer = engine.trained_state(), engine.optimizer_state()
    if engine.is_main:
        document = {
            "step": state.step,
            "train": asdict(state),
            "scaler": engine.scaler_state(),
            "config": config.model_dump(mode="json"),
            "run_id": run.tracker.run_id,
            "world_size": engine.world_size,
        }
        written = checkpoints.write(
            config.out_dir, state.step, lambda folder: run.model.save_pretrained(folder, weights), optimizer, document
        )
        checkpoints.prune(config.out_dir, state.step, config.train.keep_checkpoints)
        run.tracker.checkpoint(written.path, written.digest, state.step)
    engine.wait()


# ---- before the loop and after it ------------------------------------------------------------------------------------


def run(config: Config, resume: str | None = None) -> Path:
    """Trains and returns the last checkpoint's folder. Raises ConfigError, ShardError, OSError or GuardError.

    After SIGTERM or SIGINT: saves, and raises SystemExit with 128 + the signal's number.
    """
    check_resume(config, resume)
    engine, out = make_engine(config.train), config.out_dir
    terminal = Terminal(engine.is_main)
    found = checkpoints.find(out, resume, terminal.say)
    for sentence in changes(found, config) if found else ():
        terminal.say(sentence)
    loader = make_loader(config, engine)
    terminal.say(f"precision: {engine.precision.reason}")
    model = VisionLanguageModel.build(
        config, encoder_of(loader, config), precision=engine.precision, device=engine.device
    )
    state = TrainState(StreamState(0, 0, loader.digest))
    if found:  # before prepare: an engine may keep copies of the weights of its own
        model.load_trained(found.model)
        saved = found.state["train"]
        state = TrainState(**{**saved, "stream": StreamState.from_json(saved["stream"])})
        terminal.say(f"going on after step {state.step} from {found.path}")
    elif not config.model.init_from:
        calibrate(model, config)
    wrapped = engine.prepare(model)
    if found:
        engine.load_optimizer_state(found.optimizer())
        engine.load_scaler_state(found.state["scaler"])
    terminal.parts(part_rows(model.parts))

    tracker: Tracker = NoTracker()
    if engine.is_main:
        # From another folder's checkpoint a new run begins; a job killed before its first one goes on with its own.
        own = found.path.resolve().is_relative_to(out.resolve()) if found else resume == "auto"
        run_id = (found and found.state["run_id"]) or recorded_run_id(config) if own else None
        sets = [*loader.manifests, *(Manifest.open(dev.path) for dev in config.data.dev)]
        tracker = open_tracker(config, run_id=run_id, resume_step=state.step, facts=engine.facts(), datasets=sets)
    status = "FAILED"
    try:
        with stop_requests() as stop_asked:
            number = loop(Run(config, engine, model, wrapped, loader, state, terminal, tracker), stop_asked)
        status = "KILLED" if number else "FINISHED"
    finally:
        tracker.close(status)
    engine.close()  # when the main process has reported everything: a launcher ends all as soon as one has failed
    last = checkpoints.place(out, state.step)
    if number:
        terminal.say(f"stopped by {signal.Signals(number).name} after step {state.step}, which is saved: {last}")
        raise SystemExit(128 + number)
    return last


def make_loader(config: Config, engine: Engine | None) -> Loader:
    """Of this rank's samples; without an engine of all samples, in this process."""
    sets = config.data.train
    return Loader(
        [s.path for s in sets],
        [s.weight for s in sets] if any(s.weight for s in sets) else None,
        global_batch=config.train.global_batch,
        seed=config.seed,
        rank=engine.rank if engine else 0,
        world_size=engine.world_size if engine else 1,
        images=config.data.train_images,
        last_batch=config.data.last_batch,
        quarantine=config.out_dir / "quarantine.jsonl" if engine else None,
        **reading(config) | ({} if engine else {"workers": 0}),
    )


def calibrate(model: VisionLanguageModel, config: Config) -> None:
    """The bridge's start values, from the first global batch: every rank reads all of it, so that all start alike."""
    collate, size = Collator(model.tokenizer, config.data, config.prompts, config.seed), config.train.micro_batch
    with closing(make_loader(config, None).iterate()) as steps:
        samples = next(steps)[1]
    if batches := micro_batches(samples, collate, size):
        patches_IPD = torch.cat([model.patch_tokens(batch.to(model.device)) for batch in batches])
        model.bridge.calibrate(*model.bridge_inputs(collate(samples).to(model.device), patches_IPD))


def encoder_of(loader: Loader, config: Config) -> dict | None:
    """The encoder that made the features of these sets, None for sets of images. Raises ConfigError for another's."""
    features = [manifest for manifest in loader.manifests if manifest.kind == "features"]
    for manifest in features:
        check_encoder(manifest, config.model.vision)
    return features[0].encoder if features else None


def main(arguments: Sequence[str] | None = None) -> int:
    """What `accelerate launch -m harness.train` runs. Bad input: one sentence, of one rank, and exit code 2."""
    parser = argparse.ArgumentParser(prog="harness.train", description="Train a vision-language model.")
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--resume", help="auto, or a checkpoint's folder")
    given = parser.parse_args(arguments)
    rank = os.environ.get("RANK", "0")
    try:
        config = load(given.config, given.overrides)
        check_before_launch(config)
        last = run(config, given.resume)
    except Exception as error:
        if (sentence := explain(error)) is None:
            raise
        if rank != "0":
            time.sleep(3)  # what concerns all ranks is said by the first, whose end ends this one
        print(f"harness: {sentence}" if rank == "0" else f"harness, rank {rank}: {sentence}", file=sys.stderr)
        return 2
    if rank == "0":
        print(f"checkpoint: {last}")
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as left:
        code = left.code
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # the interpreter's own way out meets gloo's threads: 1 launch in 100 aborted there, its work done
