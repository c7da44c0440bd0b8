"""What a run consists of, where it stands, what a step did, and who is told of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

from torch import nn

from harness.config.schema import Config
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from harness.report.terminal import Terminal
from harness.tracking.tracker import Tracker
from harness.train.clock import Clock
from harness.train.engine import Engine
from shards.loader import Loader
from shards.read import Sample
from shards.stream import StreamState


@dataclass
class TrainState:
    """Where the run stands; with the weights and moments, all that a resumed run needs."""

    stream: StreamState
    step: int = 0  # optimizer steps, skipped ones included
    skipped: int = 0
    skipped_in_a_row: int = 0
    # Images of this epoch that could not be read, by set.
    unreadable: list[int] = field(default_factory=list)
    # A run that began when query tokens and per-token means were decayed goes on so.
    decays_queries: bool = False

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> TrainState:
        """Returns the state that a checkpoint's state.json holds under `train`; one that does not
        say is of the time when query tokens were decayed.
        """
        stream = StreamState.from_json(saved["stream"])
        return cls(**{"decays_queries": True, **saved, "stream": stream})

    def advance(self, stream: StreamState, unreadable: Sequence[float]) -> None:
        """Moves on by a step, after which the data stands at `stream`; `unreadable`: its images
        that could not be read, by set.
        """
        earlier = self.unreadable if stream.epoch == self.stream.epoch else []
        self.unreadable = [int(a + b) for a, b in zip_longest(earlier, unreadable, fillvalue=0)]
        self.step += 1
        self.stream = stream


@dataclass(frozen=True)
class StepResult:
    """What one step did. All but `batches` is the same on every rank."""

    batches: Sequence[Batch]  # this rank's micro-batches, fillers included
    loss: float  # nats a target token, over the whole global batch
    gradient_norm: float | None  # None: the step was skipped, loss or gradient was not finite
    learning_rate: float
    images: float  # of the whole global batch, and its targets
    targets: float
    quarantined: float  # samples that could not be read, so far
    truncated: float  # texts that were cut, so far
    stops: bool  # some rank was asked to stop
    saves: bool = False  # it is time for a checkpoint
    unreadable: Sequence[float] = ()  # images of this step that could not be read, by set


class Observer:
    """A listener to a run, told of every step on its own rank; override what you want to hear.

    harness.train.run.run(config, observers=[MyObserver()])

    What it does takes time from training; under ZeRO it must not call the model on one rank alone.
    """

    def batches_made(self, run: Run, samples: Sequence[Sample], batches: Sequence[Batch]) -> None:
        """Hears of this rank's share before step `run.state.step` (0, 1, ...) learns from it."""

    def step_taken(self, run: Run, step: StepResult) -> None:
        """Hears what was done, before it is checked, logged and saved; `run.state` is one older."""


@dataclass(frozen=True)
class Run:
    """All that a run consists of, on every rank; `wrapped`: the model as the engine calls it."""

    config: Config
    engine: Engine
    model: VisionLanguageModel
    wrapped: nn.Module
    loader: Loader
    state: TrainState
    terminal: Terminal
    tracker: Tracker
    observers: Sequence[Observer] = ()
    clock: Clock = field(default_factory=Clock)

    @property
    def epochs(self) -> float:
        """How often the training set was seen."""
        return self.state.stream.epoch + self.state.stream.position / self.loader.samples

    @property
    def is_end_of_epoch(self) -> bool:
        """True after the last batch of an epoch."""
        return self.state.stream.position == self.loader.samples

    def track(self, group: str, figures: Mapping[str, float]) -> None:
        """Writes figures of this step as `group/NAME`."""
        named = {f"{group}/{name}": value for name, value in figures.items()}
        self.tracker.metrics(named, self.state.step)
