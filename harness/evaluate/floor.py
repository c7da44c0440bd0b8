"""What the training sets tell about a score: the floor under it, and which of its images were
trained on.

Training records -> Majority, the best anyone can do who knows the training texts and never looks at
an image; predictions -> its accuracy on their questions. Training sets -> the names of their
images.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain

import numpy as np

from harness.config.schema import Config
from harness.evaluate import vqa
from harness.evaluate.predict import Prediction
from shards.files import ShardError, is_remote
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record

_MAJORITY_IMAGES = 20_000  # training images whose texts make the majority answers


@dataclass(frozen=True)
class Majority:
    """The best anyone can do who knows the training texts by heart and never looks at an image."""

    answer_of: Mapping[str, str]  # question -> its most common answer
    overall: str  # for a question that was never seen

    @classmethod
    def of(cls, records: Iterable[Record]) -> Majority | None:
        """From the training records; None if they hold no question. An image's own answer is its
        most common one.
        """
        answers: dict[str, list[str]] = defaultdict(list)
        for record in records:
            for text in record.texts:
                if text.task == "vqa":
                    answers[vqa.same_question(text.prompt)].append(vqa.most_common(text.targets))
        if not answers:
            return None
        return cls(
            {question: vqa.most_common(given) for question, given in answers.items()},
            vqa.most_common(chain.from_iterable(answers.values())),
        )

    def accuracy(self, predictions: Sequence[Prediction]) -> float:
        """Percent, on the questions of these predictions."""
        answers = (
            self.answer_of.get(vqa.same_question(p.question), self.overall) for p in predictions
        )
        return vqa.percent(
            [vqa.accuracy(a, p.references) for a, p in zip(answers, predictions, strict=True)]
        )


def training_sets(config: Config) -> Iterator[Manifest]:
    """Yields the local training sets; one that was moved since is left out: what it would tell is
    unknown.
    """
    for dataset in config.data.train:
        if not is_remote(dataset.path):
            with suppress(ShardError):
                yield Manifest.open(dataset.path)


def training_records(config: Config) -> Iterator[Record]:
    """Yields records of the local training sets, at most `_MAJORITY_IMAGES` of each, evenly
    spaced.
    """
    for manifest in training_sets(config):
        reader = Reader(manifest)
        for index in np.unique(np.linspace(0, manifest.samples - 1, _MAJORITY_IMAGES).astype(int)):
            with suppress(
                ShardError
            ):  # named by the training run that read it, and by `harness shards verify`
                yield reader.read(int(index)).known


def epochs_trained(config: Config, position: Mapping[str, int]) -> float | None:
    """Returns how often a run at this `position` of its stream ({"epoch", "position"}) saw its
    training set; None: unknown.
    """
    sets = list(training_sets(config))
    if not sets or len(sets) < len(config.data.train):
        return None
    images = config.data.train_images or sum(manifest.samples for manifest in sets)
    return position["epoch"] + position["position"] / images


def trained_on(config: Config, evaluated: Sequence[Manifest]) -> frozenset[tuple[str, str, str]]:
    """Returns (dataset, split, key) of the training images, as far as one of the evaluated sets
    could hold them too.
    """
    names = {(manifest.dataset, manifest.split) for manifest in evaluated}
    return frozenset(
        (manifest.dataset, manifest.split, key.decode())
        for manifest in training_sets(config)
        if (manifest.dataset, manifest.split) in names
        for key in manifest.sidecar["key"].tolist()
    )
