"""The training loop, to be read from top to bottom. Knows no engine by name: what differs lies in
engine.py.

    accelerate launch -m harness.train configs/demo.yaml train.epochs=2      the same as `harness train ...`
    harness train configs/flickr8k_offline.yaml train.max_steps=20           a first look on a laptop

One optimizer step takes one whole global batch: every rank collates its micro-batches first, the
sum of target weights over all ranks is one all-reduce, and every micro-batch's loss is divided by
it. Never an average of averages.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable, Sequence
from contextlib import closing

import torch

from harness import checkpoint as checkpoints
from harness.data.collate import Collator, drawn
from harness.errors import GuardError
from harness.evaluate.small_gate import small_set
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from harness.train.between_steps import evaluate, look, save
from harness.train.clock import Clock, memory_mb
from harness.train.guards import GradientGuard, check_frozen, first_nonfinite, frozen_hash
from harness.train.prepare import micro_batches
from harness.train.schedule import learning_rate
from harness.train.state import Run
from shards.loader import Loader
from shards.stream import StreamState


def loop(run: Run, stop_asked: Callable[[], int]) -> int:
    """Steps until the last epoch or `max_steps`; or until a signal came, whose number it returns.
    All ranks alike.
    """
    config, engine, model, loader, state = run.config, run.engine, run.model, run.loader, run.state
    train, terminal = config.train, run.terminal
    collate = Collator(
        model.tokenizer, config.data, config.prompts, config.seed, train.eos_loss_weight
    )
    filler = filler_of(collate, model)
    planned_steps = state.step + steps_left(loader, state.stream, train.epochs)
    last_step = min(planned_steps, train.max_steps or planned_steps)
    # As many on every rank, whatever it reads: under ZeRO each of them is a meeting of all ranks.
    micro_steps = math.ceil(math.ceil(train.global_batch / engine.world_size) / train.micro_batch)
    frozen, guard = frozen_hash(model), GradientGuard(model)
    samples_of_steps = loader.iterate(
        state.stream, train.epochs
    )  # refuses a state of another order
    clock, stop, small = Clock(), 0, None

    def due(every: int | None) -> bool:
        return state.step % every == 0 if every else state.stream.position == loader.samples

    if state.step and (state.step >= last_step or due(train.evaluate_every) or due(None)):
        evaluate(run, again=False)  # the earlier process may have been killed in the middle of it
    if state.step >= last_step:
        terminal.say(
            f"nothing is left to do: {config.out_dir} stands at step {state.step} of {last_step}"
        )
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

            # The model's randomness (dropout) is a function of (seed, step, rank): no RNG state to
            # save or disturb.
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
                state.skipped, state.skipped_in_a_row = (
                    state.skipped + 1,
                    state.skipped_in_a_row + 1,
                )
                terminal.say(
                    f"step {state.step}: loss or gradient not finite, step skipped ({state.skipped} so far)"
                )
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
                scales = model.scales(
                    batches[0].to(engine.device)
                )  # far apart, the language model reads noise
                terminal.say(", ".join(f"{name} {value:.4g}" for name, value in scales.items()))
                run.tracker.metrics(
                    {f"train/{name}": value for name, value in scales.items()}, state.step
                )

            clock.step(images, targets)
            ends = state.step == last_step
            numbers = {
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": math.nan if norm is None else norm,
            }
            numbers |= {
                "epoch": stream.epoch,
                "skipped_steps": state.skipped,
                "quarantined_samples": quarantined,
            }
            numbers |= {"truncated_texts": truncated, "loss_scale": engine.loss_scale}
            numbers |= {"memory_mb": memory_mb(engine.device), **clock.rates()}
            terminal.advance(state.step, numbers)
            if state.step % train.log_every == 0 or ends or stop:
                run.tracker.metrics(
                    {f"train/{name}": value for name, value in numbers.items()}, state.step
                )
                clock.reset()
            if ends or stop:
                check_frozen(model, frozen)
            if (
                ends or stop or due(train.save_every)
            ):  # before the evaluation: whatever befalls that, this step is kept
                save(run)
            if stop:  # who stops a run may give it seconds
                return stop_asked() or signal.SIGTERM
            if (
                ends or due(train.evaluate_every) or due(None)
            ):  # at the end of every epoch in any case
                evaluate(run)
            elif train.image_use_every and config.data.dev and due(train.image_use_every):
                small = small or (small_set(model, config) if engine.is_main else None)
                look(run, small)
            if ends:
                break
            clock.restart()
    return 0


def totals(batches: Sequence[Batch]) -> tuple[float, int, int]:
    """The weight, images and targets of this rank's share."""
    return (
        sum(float(b.weight) for b in batches),
        sum(b.images for b in batches),
        sum(len(b.labels_TL) for b in batches),
    )


def filler_of(collate: Collator, model: VisionLanguageModel) -> Batch:
    """The batch of weight 0 for a rank that has none of its own, so that all ranks stay in step."""
    if model.vision is None:
        return collate.filler((model.config.encoder["tokens"], model.config.encoder["width"]), True)
    return collate.filler((model.vision.image_size, model.vision.image_size, 3), False)


def steps_left(loader: Loader, stream: StreamState, epochs: int) -> int:
    """Optimizer steps from `stream` to the end of the last epoch; also where `global_batch` or
    `epochs` was changed.
    """
    rest = loader.samples - stream.position
    in_epoch = (
        rest // loader.global_batch
        if loader.last_batch == "drop"
        else -(-rest // loader.global_batch)
    )
    return max(0, in_epoch + (epochs - stream.epoch - 1) * loader.steps_per_epoch)


def too_many_skipped(run: Run, batches: Sequence[Batch]) -> str:
    """Why the run cannot go on: what was not finite first in this rank's share of the last step."""
    engine, good = run.engine, checkpoints.newest(run.config.out_dir)
    with engine.whole():
        seen = (
            first_nonfinite(run.model, batch.to(engine.device), engine.loss_scale)
            for batch in batches
        )
        first = next(filter(None, seen), "nothing on this rank")
        engine.wait()
    return (
        f"{run.state.skipped_in_a_row} steps in a row had a loss or gradient that is not finite, the first of the last "
        f"one: {first} (loss scale {engine.loss_scale:g}); lower train.learning_rate, or ask for train.precision=fp32; "
        f"the last good checkpoint is {good.path if good else 'none: none was written yet'}"
    )
