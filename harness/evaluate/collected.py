"""What one pass over the sets collects: answers, losses, and the evidence of the gates.

Batches -> predictions and losses by task, a Gate for each set and task, and the mean of each
image's patches. Legend: I images, C contexts, P patches, D width.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from harness.config.schema import Config
from harness.evaluate.image_use.bank import Bank
from harness.evaluate.image_use.gate import Gate, sums_per_context
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import Prediction, Stratum, answers, by_stratum, select
from harness.evaluate.results import Evaluation, TaskResult
from harness.evaluate.training_pictures import TrainingPictures, training_pictures
from harness.machine.dealing import Alone, Progress
from harness.model.batch import Batch
from shards.manifest import Manifest
from shards.read import Sample
from shards.record import Record

Picture = tuple[str, str, str]  # dataset, split, key
_TEXTS_AN_IMAGE = 4  # that the gate takes at most


class _Encoding(NamedTuple):
    """A batch as it was given, with its pictures encoded, and its image tokens."""

    given: Batch
    batch: Batch
    tokens: Any


@dataclass
class Collected:
    """Predictions and losses of all texts, and the gates' evidence on a part of them.

    Rank 0 has it all; the others have the gates' batches, of which they ask what they are dealt.
    """

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
    pools: bool = True  # the mean patch of each image
    pooled: dict[Picture, np.ndarray] = field(default_factory=dict)
    dealer: Alone = field(default_factory=Alone)
    progress: Progress | None = None  # of the gates
    bank: Bank = field(init=False)
    _encoded: _Encoding | None = None

    def __post_init__(self) -> None:
        self.bank = Bank(self.model)

    def note_places(self, number: int, index_of: Mapping[Picture, int], alone: int = 0) -> None:
        """Counts images of set `number`, but for those that are none (`alone`: records without a
        picture), and remembers where in it each stands: predictions are written in that order.
        """
        self.evaluation.images += len(index_of) - alone
        self.evaluation.without_picture += alone
        self.place |= {picture: (number, index) for picture, index in index_of.items()}

    def add(
        self, batch: Batch, in_gate: bool, training_batch: Callable[[], Batch | None] | None
    ) -> None:
        """Answers and losses of a batch, by set and task; with `in_gate` also for the gate."""
        answered = self.answered(batch)
        taken = self.keep(batch) if in_gate else {}
        self.note(answered, taken, training_batch)

    def answered(self, batch: Batch) -> dict[str, Any]:
        """Returns what the model says to a batch, JSON and arrays: rows of `Prediction`, losses
        and weights by set and task, and the mean patch of each image.
        """
        encoding = self._encoding(batch)
        strata = []
        for stratum, part, rows in by_stratum(encoding.batch):
            decoding = getattr(self.config.generate, stratum.task)
            part_tokens = tokens_of(encoding.tokens, rows.tolist())
            sums = sums_per_context(self.model.loss(part, part_tokens), part)
            said = answers(self.model, part, decoding, part_tokens)
            strata.append([*stratum, [p.row() for p in said], *sums])
        return {"strata": strata, "pooled": _pooled(encoding.batch) if self.pools else None}

    def keep(self, batch: Batch) -> dict[Stratum, list[int]]:
        """Takes a batch into the gates that still need texts, and returns which contexts of each
        set and task those are, as rows among these.
        """
        encoding = self._encoding(batch)
        taken = {}
        for stratum, part, rows in by_stratum(encoding.batch):
            chosen = for_gate(part)
            if chosen and self.texts_in_gate(stratum) < most_texts(stratum.task, self.gate_texts):
                taken[stratum] = chosen
                part_tokens = tokens_of(encoding.tokens, rows.tolist())
                self._gate(stratum).keep(
                    select(part, taken[stratum]), tokens_of(part_tokens, taken[stratum])
                )
        return taken

    def note(
        self,
        answered: Mapping[str, Any],
        taken: Mapping[Stratum, list[int]],
        training_batch: Callable[[], Batch | None] | None,
    ) -> list[Prediction]:
        """Notes what `answered` and `keep` gave of a batch, and returns the predictions."""
        noted: list[Prediction] = []
        for name, task, rows, nats_C, weight_C in answered["strata"]:
            stratum = Stratum(name, task)
            loss_C = nats_C / np.where(weight_C > 0, weight_C, np.nan)
            said = [
                replace(Prediction.of_row(row), loss=float(loss))
                for row, loss in zip(rows, loss_C, strict=True)
            ]
            result = self.evaluation.tasks.setdefault(task, TaskResult(task))
            result.predictions += said
            noted += said
            result.nats += nats_C.sum()
            result.weight += weight_C.sum()
            if stratum in taken:
                gate = self.gates[stratum]
                chosen = taken[stratum]
                gate.training_batch = gate.training_batch or training_batch
                gate.note(nats_C[chosen], weight_C[chosen], [said[c] for c in chosen])
        for picture, mean_D in zip(*(answered["pooled"] or ((), ())), strict=True):
            self.pooled[tuple(picture)] = mean_D
        return noted

    def _encoding(self, batch: Batch) -> _Encoding:
        """Returns the batch with its pictures encoded, once for all that is asked of it."""
        if self._encoded is None or self._encoded.given is not batch:
            self._encoded = None  # one at a time
            encoded_batch = encoded(self.model, batch)
            tokens = self.model.bridge_tokens(encoded_batch)
            self._encoded = _Encoding(batch, encoded_batch, tokens)
        return self._encoded

    @cached_property
    def training(self) -> TrainingPictures | str:
        """Training pictures, none of them judged, read once for all floors; a sentence where there
        are none.
        """
        if not self.pooled:
            return "the model has no features of its own"
        return training_pictures(self.config, self.model, self.pooled.keys(), self.dealer)

    def by_set(self, pictures: Iterable[Picture]) -> dict[int, dict[Picture, int]]:
        """Returns where each picture stands in its set, by the number of the set."""
        found: dict[int, dict[Picture, int]] = defaultdict(dict)
        for picture in pictures:
            number, index = self.place[picture]
            found[number][picture] = index
        return found

    def texts_in_gate(self, stratum: Stratum) -> int:
        return self.gates[stratum].texts if stratum in self.gates else 0

    def _gate(self, stratum: Stratum) -> Gate:
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
                dealer=self.dealer,
                progress=self.progress,
            )
        return self.gates[stratum]


def _pooled(batch: Batch) -> tuple[list[Picture], np.ndarray] | None:
    """Returns the pictures of a batch and mean_ID of their patches."""
    if batch.features_IPD is None:
        return None
    image_of = {
        picture_of(context.record): image
        for context, image in zip(batch.contexts, batch.image_of_C.tolist(), strict=True)
        if image >= 0
    }
    mean_ID = batch.features_IPD.float().mean(dim=1).cpu().numpy()
    return list(image_of), mean_ID[list(image_of.values())]


def picture_of(record: Record) -> Picture:
    """Names a record's picture over several sets."""
    return record.dataset, record.split, record.key


def most_texts(task: str, gate_texts: int) -> int:
    """Returns how many texts of a task the gate takes: of captions, which are longer and come one
    an image, as many as it takes images with questions.
    """
    return gate_texts if TASKS[task].has_right else -(-gate_texts // _TEXTS_AN_IMAGE)


def gate_tasks(record: Record) -> list[str]:
    """Returns the task of each text of an image that the gate takes; [] without an image."""
    counts = Counter(text.task for text in record.texts if record.has_picture)
    return [task for task, texts in counts.items() for _ in range(min(texts, _TEXTS_AN_IMAGE))]


def for_gate(batch: Batch) -> list[int]:
    """Returns the contexts that the gate takes: of each image a few, drawn by their ids, so that
    its texts come from many images. A context without an image tells nothing of their use.
    """
    by_image: dict[int, list[int]] = defaultdict(list)
    for context, image in enumerate(batch.image_of_C.tolist()):
        if image >= 0:
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
