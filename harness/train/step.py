"""One optimizer step over one whole global batch, and what is logged of it.

samples of this rank -> Share of micro-batches -> loss and gradients -> weights moved -> StepResult
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from harness.data.collate import Collator, drawn
from harness.data.share import Share, ShareMaker
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from harness.report.speed import Shares
from harness.train.clock import memory_mb
from harness.train.mfu import Utilisation
from harness.train.schedule import learning_rate
from harness.train.state import Run, StepResult
from harness.train.together import SharedQuarantine, gathered
from harness.train.transfer import Transfer
from shards.files import UnreachableError
from shards.loader import Loader
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
        self.is_gpu = run.engine.device.type == "cuda"
        as_asked = Collator.of(config, run.model.tokenizer, on_gpu=self.is_gpu)
        self.collate = replace(as_asked, loss_weights=loss_weights)
        self.share = ShareMaker(self.collate, config.train.micro_batch)
        self.transfer = Transfer(run.engine.device)
        self.quarantine = SharedQuarantine(run.loader, run.engine)
        self.filler = _filler(self.collate, run.model)
        if self.is_gpu:
            self.filler = self.filler.mapped(torch.Tensor.pin_memory)
        left = steps_left(run.loader, run.state.stream, config.train.epochs)
        self.planned_steps = run.state.step + left
        self.last_step = min(self.planned_steps, config.train.max_steps or self.planned_steps)
        self.images_of_rank = math.ceil(config.train.global_batch / run.loader.world_size)

    def batches(self) -> Generator[tuple[StreamState, Share], None, None]:
        """Yields this rank's shares of the global batches that are left, collated where they are
        read, each with where the run stands after it.
        """
        run = self.run
        return run.loader.collated(
            self.share, run.state.stream, run.config.train.epochs, pin=self.is_gpu
        )

    def take(self, stream: StreamState, share: Share | UnreachableError) -> StepResult:
        """Learns from this rank's share; `stream`: where the run stands after it.

        Raises UnreachableError, on all ranks alike and before the weights move, where one has that
        in place of its share.
        """
        run = self.run
        engine = run.engine
        state = run.state
        failure = ""
        if isinstance(share, UnreachableError):
            failure = str(share)
            share = Share()
        for kind, texts in share.cut:
            self.collate.note_cut(kind, texts)
        missing = self._micro_steps(stream) - len(share.batches)
        batches = [*share.batches, *[self.filler] * missing]
        totals = engine.summed([*_totals(share.batches), failure != ""])
        for observer in run.observers:
            observer.batches_made(run, share.samples, batches)
        # Dropout is a function of (seed, step, rank): no RNG state to save or to disturb.
        torch.manual_seed(drawn(run.config.seed, state.step, f"rank {engine.rank}") >> 1)
        nats = self._gradients(batches, totals[0].clamp(min=1e-8).float())
        flags = self._flags(share, nats)
        idle_seconds = self._look_ahead()
        _, images, targets, failures, *told = engine.await_gradients(totals, flags)
        run.clock.stood_still(idle_seconds())
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

    def _micro_steps(self, after: StreamState) -> int:
        """Returns how many micro-batches this step has: as many on every rank, whatever it reads,
        since under ZeRO each is a meeting of all ranks.
        """
        largest = self.run.loader.largest_share(self.run.state.stream, after)
        most = max(self.images_of_rank, largest)
        return math.ceil(most / self.run.config.train.micro_batch)

    def _flags(self, share: Share, nats: torch.Tensor) -> torch.Tensor:
        """Returns one packed tensor that decides for all ranks alike."""
        loader = self.run.loader
        return self.run.engine.summed(
            [
                self.stop_asked() > 0,
                self.save_due(),
                len(loader.quarantined),
                self.collate.truncated.total(),
                *loader.unreadable_in(share.samples),
            ],
            nats,
            ~nats.isfinite(),
        )

    def _gradients(self, batches: Sequence[Batch], weight: torch.Tensor) -> torch.Tensor:
        """Returns this rank's share of the loss; its gradients are where the engine keeps them."""
        engine = self.run.engine
        share = torch.zeros((), dtype=torch.float64, device=engine.device)
        for index, batch in enumerate(self.transfer.arriving(batches)):
            with engine.micro_step(last=index == len(batches) - 1):
                loss = self.run.wrapped(batch).sum / weight
                engine.backward(loss)
            share += loss.detach()
        return share

    def _look_ahead(self) -> Callable[[], float]:
        """Waits for the next batch, and begins its way to the device, while a GPU computes this
        one. What is returned tells, when that is done, for how many seconds it had to wait too.
        """
        if not self.is_gpu:
            return lambda: 0.0
        computed = torch.cuda.Event(enable_timing=True)
        has_next = torch.cuda.Event(enable_timing=True)
        computed.record()
        heart = self.run.engine.heart
        heart.doing(f"reads the images of step {self.run.state.step + 2}", alone=True)
        if (share := self.run.loader.coming()) is not None:
            self.transfer.send_ahead(share.batches)
        has_next.record()
        heart.doing(f"takes step {self.run.state.step + 1}")
        return lambda: computed.elapsed_time(has_next) / 1000


def fetched(
    batches: Iterable[tuple[StreamState, Share]], run: Run
) -> Iterator[tuple[StreamState, Share | UnreachableError]]:
    """Yields the batches; if data do not answer, that as the last: the other ranks have to hear."""
    try:
        yield from batches
    except UnreachableError as error:
        yield run.loader.after(run.state.stream), error


class StepLog:
    """The figures of the steps, for terminal and tracker."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.utilisation = Utilisation(run)
        self._said_unknown = False
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
        """Tells what limits the speed, of all steps and evaluations so far; a meeting of all ranks.

        All wait, inside their steps, for the one that waits for data: so the longest waiting of
        any rank counts, and as computing what of rank 0's time it leaves.
        """
        run = self.run
        spent = dict(run.clock.spent)
        longest = max(gathered(spent["data"], run.engine))
        spent["step"] -= longest - spent["data"]
        spent["data"] = longest
        shares = Shares.of(spent)
        if shares is None or not run.engine.is_main:
            return
        mfu = self.utilisation.of(run.clock.images_per_second)
        told = shares.lines()
        if mfu is not None:
            told.append(f"MFU {mfu:.1%}")
        elif not self._said_unknown:
            told.append(self.utilisation.unknown or "no MFU: no step has had an image")
            self._said_unknown = True
        for line in told:
            run.terminal.say(line)
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
