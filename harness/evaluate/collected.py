"""What one pass over the sets collects: answers, losses, and the evidence of the gates.

Batches -> predictions and losses by task, a Gate for each set and task, and the mean of each
image's patches. Legend: I images, C contexts, P patches, D width.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from harness.config.schema import Config
from harness.evaluate.image_use.bank import Bank
from harness.evaluate.image_use.gate import Gate, sums_per_context
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import Stratum, answers, by_stratum, select
from harness.evaluate.results import Evaluation, TaskResult
from harness.evaluate.training_pictures import TrainingPictures, training_pictures
from harness.model.batch import Batch
from shards.manifest import Manifest
from shards.read import Sample
from shards.record import Record

Picture = tuple[str, str, str]  # dataset, split, key
_TEXTS_AN_IMAGE = 4  # that the gate takes at most


@dataclass
class Collected:
    """Predictions and losses of all texts, and the gates' evidence on a part of them."""

    model: Any
    config: Config
    gate_texts: int  # of each set and task
    trained_on: Container[Picture]
    epochs: float | None
    manifests: Sequence[Manifest] = ()
    decode: Callable[[Sample], Any] | None = None  # reads a picture again, as the loaders did
    controls: dict[str, Any] | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    gates: dict[Stratum, Gate] = field(default_factory=dict)
    place: dict[Picture, tuple[int, int]] = field(default_factory=dict)
    pooled: dict[Picture, np.ndarray] = field(default_factory=dict)  # the mean patch of each image
    bank: Bank = field(init=False)

    def __post_init__(self) -> None:
        self.bank = Bank(self.model)

    def note_places(self, number: int, samples: Sequence[Sample]) -> None:
        """Counts images of set `number`, and remembers where in it each stands: predictions are
        written in that order.
        """
        self.evaluation.images += len(samples)
        for sample in samples:
            record = sample.known
            place = (number, sample.index)
            self.place[record.dataset, record.split, record.key] = place

    def add(
        self, batch: Batch, in_gate: bool, training_batch: Callable[[], Batch | None] | None
    ) -> None:
        """Answers and losses of a batch, by set and task; with `in_gate` also for the gate."""
        batch = encoded(self.model, batch)
        tokens = self.model.bridge_tokens(batch)
        self._pool(batch)
        for stratum, part, rows in by_stratum(batch):
            decoding = getattr(self.config.generate, stratum.task)
            part_tokens = tokens.with_rows(tokens.token_row_of_C[rows.to(batch.image_of_C.device)])
            sums = sums_per_context(self.model.loss(part, part_tokens), part)
            loss_C = sums.nats_C / np.where(sums.weight_C > 0, sums.weight_C, np.nan)
            said = [
                replace(prediction, loss=float(loss))
                for prediction, loss in zip(
                    answers(self.model, part, decoding, part_tokens), loss_C, strict=True
                )
            ]
            result = self.evaluation.tasks.setdefault(stratum.task, TaskResult(stratum.task))
            result.predictions += said
            result.nats += sums.nats_C.sum()
            result.weight += sums.weight_C.sum()
            if in_gate and self.texts_in_gate(stratum) < most_texts(stratum.task, self.gate_texts):
                chosen = for_gate(part)
                self._gate(stratum, training_batch).add(
                    select(part, chosen),
                    tokens_of(part_tokens, chosen),
                    sums.nats_C[chosen],
                    sums.weight_C[chosen],
                    [said[c] for c in chosen],
                )

    @cached_property
    def training(self) -> TrainingPictures | str:
        """Training pictures, none of them judged, read once for all floors; a sentence where there
        are none.
        """
        if not self.pooled:
            return "the model has no features of its own"
        return training_pictures(self.config, self.model, self.pooled.keys())

    def by_set(self, pictures: Iterable[Picture]) -> dict[int, dict[Picture, int]]:
        """Returns where each picture stands in its set, by the number of the set."""
        found: dict[int, dict[Picture, int]] = defaultdict(dict)
        for picture in pictures:
            number, index = self.place[picture]
            found[number][picture] = index
        return found

    def texts_in_gate(self, stratum: Stratum) -> int:
        return self.gates[stratum].texts if stratum in self.gates else 0

    def _gate(self, stratum: Stratum, training_batch: Callable[[], Batch | None] | None) -> Gate:
        if stratum not in self.gates:
            self.gates[stratum] = Gate(
                self.model,
                stratum.task,
                getattr(self.config.generate, stratum.task),
                self.config.evaluation,
                self.controls or {},
                stratum.set,
                self.bank,
                trained_on=self.trained_on,
                epochs=self.epochs,
                training_batch=training_batch,
            )
        return self.gates[stratum]

    def _pool(self, batch: Batch) -> None:
        """Keeps the mean of each image's patches."""
        if batch.features_IPD is None:
            return
        mean_ID = batch.features_IPD.float().mean(dim=1).cpu().numpy()
        for context, image in zip(batch.contexts, batch.image_of_C.tolist(), strict=True):
            record = context.record
            self.pooled[record.dataset, record.split, record.key] = mean_ID[image]


def most_texts(task: str, gate_texts: int) -> int:
    """Returns how many texts of a task the gate takes: of captions, which are longer and come one
    an image, as many as it takes images with questions.
    """
    return gate_texts if TASKS[task].has_right else -(-gate_texts // _TEXTS_AN_IMAGE)


def gate_tasks(record: Record) -> list[str]:
    """Returns the task of each text of an image that the gate takes."""
    counts = Counter(text.task for text in record.texts)
    return [task for task, texts in counts.items() for _ in range(min(texts, _TEXTS_AN_IMAGE))]


def for_gate(batch: Batch) -> list[int]:
    """Returns the contexts that the gate takes: of each image a few, drawn by their ids, so that
    its texts come from many images.
    """
    by_image: dict[int, list[int]] = defaultdict(list)
    for context, image in enumerate(batch.image_of_C.tolist()):
        by_image[image].append(context)

    def drawn(context: int) -> int:
        return zlib.crc32(batch.contexts[context].text.id.encode())

    return sorted(
        context
        for contexts in by_image.values()
        for context in sorted(contexts, key=drawn)[:_TEXTS_AN_IMAGE]
    )


def tokens_of(tokens: Any, contexts: Sequence[int]) -> Any:
    """Returns the image tokens of some contexts of a batch."""
    return tokens.with_rows(tokens.token_row_of_C[list(contexts)])


def encoded(model: Any, batch: Batch) -> Batch:
    """Returns the batch with the patches of its images in place of pixels, where the model has an
    encoder of its own: each picture is encoded once, whatever is asked of it.
    """
    if batch.pixels_IHW3 is None or not hasattr(model, "patch_tokens"):
        return batch
    return replace(batch, pixels_IHW3=None, features_IPD=model.patch_tokens(batch))
