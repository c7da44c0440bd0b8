"""What a run consists of, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from harness.config.schema import Config
from harness.model.vlm import VisionLanguageModel
from harness.report.terminal import Terminal
from harness.tracking.tracker import Tracker
from harness.train.engine import Engine
from shards.loader import Loader
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

    @property
    def is_end_of_epoch(self) -> bool:
        return self.state.stream.position == self.loader.samples

    def track(self, group: str, figures: Mapping[str, float]) -> None:
        """Writes figures of this step as `group/NAME`."""
        named = {f"{group}/{name}": value for name, value in figures.items()}
        self.tracker.metrics(named, self.state.step)
