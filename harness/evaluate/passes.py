"""What any rank does in an evaluation: reads whole batches, and runs the model on what it is dealt.

Batch number n of a set goes to rank n modulo their number, whole, so that a model is given the same
tensors whatever their number. The gates' batches are read and encoded by every rank, so that each
can ask any of them again with any picture; answers and losses are sent to rank 0 (dealing.py),
which alone scores and judges.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from harness.evaluate.collected import Collected, Picture, gate_tasks, picture_of
from harness.evaluate.image_use.asking import likely
from harness.evaluate.image_use.gate import Gate
from harness.evaluate.predict import Stratum
from harness.evaluate.space import Source, seen_otherwise
from harness.evaluate.training_pictures import TrainingReaders
from harness.machine.dealing import Work
from harness.model.batch import Batch
from shards.loader import Loader
from shards.manifest import Manifest
from shards.read import Sample

Collate = Callable[[Sequence[Sample]], Batch | None]
# (picture, index in the set, why it could not be read, tasks of its texts that the gate takes:
# [] where there is no picture)
Note = tuple[Picture | None, int, str | None, list[str]]


@dataclass
class _Held:
    """A batch that is at hand, and where it stands: the number of its set, and its own."""

    place: tuple[int, int]
    samples: list[Sample]
    batch: Batch | None = None


@dataclass
class Passes:
    """The readers of one rank, and its part of what is collected."""

    collected: Collected
    loaders: Sequence[Loader]
    collate: Collate
    as_trained: Collate | None  # makes a batch as in training
    controls_of: Callable[[Any, Batch, Manifest], dict[str, Any]]
    _reading: dict[int, Generator[list[Sample], None, None]] = field(default_factory=dict)
    _own: _Held | None = None  # the batch that was read last
    _other: _Held | None = None  # of another rank, read again

    def work(self) -> Work:
        """Returns all that another rank may be dealt."""
        source = Source(self.collected)
        return {
            "read": self.read,
            "answered": self.answered,
            "keep": lambda *item: self.keep(*item) and None,
            "asked": self._of_gate(Gate.asked),
            "controlled": self._of_gate(Gate.controlled),
            "likely": self._of_gate(likely),
            "seen_otherwise": self._of_gate(
                lambda gate, *item: seen_otherwise(gate, source, *item)
            ),
            "pictures": TrainingReaders(self.collected.config, self.collected.model).pictures,
        }

    def close(self) -> None:
        """Ends the workers."""
        for batches in self._reading.values():
            batches.close()

    def read(self, number: int, place: int) -> list[Note]:
        """Reads a batch of a set and returns what it holds. Raises ShardError."""
        if number not in self._reading:
            self.close()
            loader = self.loaders[number]
            own = range(place, loader.steps_per_epoch, self.collected.dealer.world_size)
            self._reading[number] = loader.whole_batches(own)
        self._own = _Held((number, place), next(self._reading[number]))
        self._other = None
        return [_note(sample) for sample in self._own.samples]

    def answered(self, number: int, place: int, most: int) -> dict[str, Any] | None:
        """Returns answers and losses to the first images of a batch; None without a text."""
        batch = self._made(number, place, most)
        return None if batch is None else self.collected.answered(batch)

    def keep(self, number: int, place: int, most: int) -> dict[Stratum, list[int]] | None:
        """Takes the first images of a batch into the gates that need texts, on every rank."""
        batch = self._made(number, place, most)
        if batch is None:
            return None
        collected = self.collected
        for sample in self.samples(number, place, most):  # whose pictures may be read again
            collected.place[picture_of(sample.known)] = (number, sample.index)
        if collected.controls is None:
            collected.controls = self.controls_of(
                collected.model, batch, self.loaders[number].manifests[0]
            )
        return collected.keep(batch)

    def samples(self, number: int, place: int, most: int) -> list[Sample]:
        """Returns the first images of a batch that could be read, whoever has read them."""
        held = self._held(number, place)
        return [s for s in held.samples if s.weight and s.record is not None][:most]

    def training_batch(self, samples: Sequence[Sample]) -> Callable[[], Batch | None] | None:
        """Returns what makes a batch as in training of them."""
        return partial(self.as_trained, samples) if self.as_trained else None

    def _held(self, number: int, place: int) -> _Held:
        for held in (self._own, self._other):
            if held is not None and held.place == (number, place):
                return held
        self._other = _Held((number, place), self.loaders[number].batch(place))
        return self._other

    def _made(self, number: int, place: int, most: int) -> Batch | None:
        held = self._held(number, place)
        samples = self.samples(number, place, most)
        if held.batch is None and samples:
            batch = self.collate(samples)
            device = next(self.collected.model.parameters()).device
            held.batch = None if batch is None else batch.to(device)
        return held.batch

    def _of_gate(self, do: Callable[..., Any]) -> Callable[..., Any]:
        """Returns what does a piece of work of one of the gates."""

        def done(set_name: str, task: str, *item: Any) -> Any:
            return do(self.collected.gates[Stratum(set_name, task)], *item)

        return done


def _note(sample: Sample) -> Note:
    record = sample.record
    if record is None or not sample.weight:
        return None, sample.index, sample.error, []
    return picture_of(record), sample.index, None, gate_tasks(record)
