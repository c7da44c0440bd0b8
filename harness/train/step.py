"""One optimizer step over one whole global batch, and what is logged of it.

samples of this rank -> micro-batches -> loss and gradients -> weights moved -> StepResult
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from harness.data.collate import Collator, drawn
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from harness.report.speed import Shares
from harness.train.clock import memory_mb
from harness.train.mfu import Utilisation
from harness.train.prepare import micro_batches
from harness.train.schedule import learning_rate
from harness.train.state import Run, StepResult
from harness.train.together import SharedQuarantine, gathered
from shards.files import UnreachableError
from shards.loader import Loader
from shards.read import Sample
from shards.stream import StreamState


class StepTaker:
    """The maker of the run's steps: each leaves `run.state` one step older."""

    def __init__(
        self, run: Run, stop_asked: Callable[[], int], save_due: Callable[[], bool]
    ) -> None:
        self.run = run
        self.stop_asked = stop_asked
        self.save_due = save_due
        config = run.config
        loss_weights = tuple(each.loss_weight for each in config.data.train)
        as_asked = Collator.of(config, run.model.tokenizer)
        self.collate = replace(as_asked, loss_weights=loss_weights)
        self.quarantine = SharedQuarantine(run.loader, run.engine)
        self.filler = _filler(self.collate, run.model)
        left = steps_left(run.loader, run.state.stream, config.train.epochs)
        self.planned_steps = run.state.step + left
        self.last_step = min(self.planned_steps, config.train.max_steps or self.planned_steps)
        self.images_of_rank = math.ceil(config.train.global_batch / run.loader.world_size)

    def take(self, stream: StreamState, samples: Sequence[Sample] | UnreachableError) -> StepResult:
        """Learns from this rank's `samples`; `stream`: where the run stands after them.

        Raises UnreachableError, on all ranks alike and before the weights move, where one has that
        in place of its samples.
        """
        run = self.run
        engine = run.engine
        state = run.state
        failure = ""
        if isinstance(samples, UnreachableError):
            failure = str(samples)
            samples = []
        with run.clock.during("data"):
            real = micro_batches(samples, self.collate, run.config.train.micro_batch)
        # As many on every rank, whatever it reads: under ZeRO each is a meeting of all ranks.
        most = max(self.images_of_rank, run.loader.largest_share(state.stream, stream))
        micro_steps = math.ceil(most / run.config.train.micro_batch)
        batches = real + [self.filler] * (micro_steps - len(real))
        totals = engine.summed([*_totals(real), failure != ""])
        for observer in run.observers:
            observer.batches_made(run, samples, batches)
        # Dropout is a function of (seed, step, rank): no RNG state to save or to disturb.
        torch.manual_seed(drawn(run.config.seed, state.step, f"rank {engine.rank}") >> 1)
        share = self._gradients(batches, totals[0].clamp(min=1e-8).float())
        # One packed tensor decides for all ranks alike.
        flags = engine.summed(
            [
                self.stop_asked() > 0,
                self.save_due(),
                len(run.loader.quarantined),
                self.collate.truncated.total(),
                *run.loader.unreadable_in(samples),
            ],
            share,
            ~share.isfinite(),
        )
        _, images, targets, failures, *told = engine.await_gradients(totals, flags)
        if failures:
            raise UnreachableError(next(filter(None, gathered(failure, engine))))
        loss, not_finite, stops, saves, quarantined, truncated, *unreadable = told
        self.quarantine.share(quarantined)
        rate = learning_rate(run.config.train, state.step, self.planned_steps)
        norm = engine.step(rate, skip=not_finite > 0)
        state.advance(stream, unreadable)
        result = StepResult(
            *(batches, loss, norm, rate, images, targets, quarantined, truncated, stops > 0),
            unreadable=unreadable,
            saves=saves > 0,
        )
        for observer in run.observers:
            observer.step_taken(run, result)
        return result

    def _gradients(self, batches: Sequence[Batch], weight: torch.Tensor) -> torch.Tensor:
        """Returns this rank's share of the loss; its gradients are where the engine keeps them."""
        engine = self.run.engine
        share = torch.zeros((), dtype=torch.float64, device=engine.device)
        for index, batch in enumerate(batches):
            with engine.micro_step(last=index == len(batches) - 1):
                loss = self.run.wrapped(batch.to(engine.device)).sum / weight
                engine.backward(loss)
            share += loss.detach()
        return share


def fetched(
    batches: Iterable[tuple[StreamState, list[Sample]]], state: StreamState
) -> Iterator[tuple[StreamState, list[Sample] | UnreachableError]]:
    """Yields the batches; if data do not answer, that as the last: the other ranks have to hear."""
    try:
        yield from batches
    except UnreachableError as error:
        yield state, error


class StepLog:
    """The figures of the steps, for terminal and tracker."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.utilisation = Utilisation(run)
        self._compiled = 0  # graphs, and the seconds of all steps, when the last one was told
        self._seconds = 0.0

    def write(self, step: StepResult, at_once: bool) -> None:
        """Tells terminal and tracker; the latter after `log_every` steps, or `at_once`."""
        run = self.run
        is_warm_up = self._leaves_out_a_warm_up()
        if not is_warm_up:
            run.clock.count(step.images, step.targets)
        rates = run.clock.rates()
        with run.clock.during("rest"):
            self.utilisation.count(step.batches)
        mfu = self.utilisation.of(rates["images_per_second"])
        figures = {
            "loss": step.loss,
            "learning_rate": step.learning_rate,
            "grad_norm": math.nan if step.gradient_norm is None else step.gradient_norm,
            "epoch": run.state.stream.epoch,
            "skipped_steps": run.state.skipped,
            "quarantined_samples": step.quarantined,
            "truncated_texts": step.truncated,
            "loss_scale": run.engine.loss_scale,
            "memory_mb": memory_mb(run.engine.device),
            **rates,
            **({} if mfu is None else {"mfu": mfu}),
        }
        run.terminal.advance(run.state.step, figures)
        if at_once or run.state.step % run.config.train.log_every == 0:
            run.track("train", figures if not is_warm_up else _without(rates, figures))
            run.clock.reset()

    def _leaves_out_a_warm_up(self) -> bool:
        """Tells whether this step has compiled something: then its time is none of the rates'."""
        run = self.run
        seconds = run.clock.spent["step"]
        took = seconds - self._seconds
        self._seconds = seconds
        if not run.model.compilations or run.model.compilations.count == self._compiled:
            return False
        new = run.model.compilations.count - self._compiled
        self._compiled = run.model.compilations.count
        run.clock.leave_out(took)
        self._seconds = run.clock.spent["step"]
        run.terminal.say(
            f"step {run.state.step}: {new} graph{'s' * (new > 1)} compiled, a warm-up of "
            f"{took:.1f} s that the rates leave out"
        )
        return True

    def tell_speed(self) -> None:
        """Tells what limits the speed, of all steps and evaluations so far."""
        run = self.run
        shares = Shares.of(run.clock.spent)
        if shares is None or not run.engine.is_main:
            return
        mfu = self.utilisation.of(run.clock.images_per_second)
        told = self.utilisation.unknown if mfu is None else f"MFU {mfu:.1%}"
        run.terminal.say(f"{shares.line()}; {told}")
        run.track("train", shares.figures())
        run.tracker.tags({"speed": shares.bound})


def _without(rates: Mapping[str, float], figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name not in (*rates, "mfu")}


def steps_left(loader: Loader, stream: StreamState, epochs: int) -> int:
    """Returns the optimizer steps from `stream` to the end of the last epoch.

    True also where `global_batch` or `epochs` was changed since the earlier steps.
    """
    rest = loader.samples - stream.position
    in_epoch = rest // loader.global_batch
    if loader.last_batch != "drop" and rest % loader.global_batch:
        in_epoch += 1
    return max(0, in_epoch + (epochs - stream.epoch - 1) * loader.steps_per_epoch)


def _totals(batches: Sequence[Batch]) -> tuple[float, int, int]:
    """Returns the weight, images and targets of this rank's share."""
    return (
        sum(float(batch.weight) for batch in batches),
        sum(batch.images for batch in batches),
        sum(len(batch.labels_TL) for batch in batches),
    )


def _filler(collate: Collator, model: VisionLanguageModel) -> Batch:
    """Returns the batch of weight 0 for a rank that has none of its own: all stay in step."""
    if model.vision is None:
        encoder = model.config.encoder
        return collate.filler((encoder["tokens"], encoder["width"]), is_features=True)
    side = model.vision.image_size
    return collate.filler((side, side, 3), is_features=False)
