"""Training pictures as features, with their texts: what the neighbour floors copy from.

Local training sets -> features_ND, captions and questions, or the reason why there are none.
Legend: N training pictures, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from harness.config.schema import Config
from harness.data.images import reading
from harness.evaluate import vqa
from harness.evaluate.floor import training_sets
from harness.machine.dealing import Alone
from shards.files import ShardError
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record

# Pictures of each training set, evenly spaced: a feature set is only read, pictures are encoded.
MOST_FEATURES = 10_000
MOST_PICTURES = 1_000
_AT_ONCE = 32


@dataclass
class TrainingPictures:
    """Mean patches of pictures, their captions, and the most common answer to each question asked
    of them; a picture may have texts of one kind alone.
    """

    features: list[np.ndarray] = field(default_factory=list)  # N of (D,)
    captions_N: list[tuple[str, ...]] = field(default_factory=list)
    questions_N: list[dict[str, str]] = field(default_factory=list)

    def add(
        self,
        judged: Container[tuple[str, str, str]],
        features_ID: Sequence[np.ndarray] | np.ndarray,
        records: Sequence[str],
    ) -> None:
        """Takes pictures with their records as JSON, but for those that are judged."""
        for feature_D, document in zip(features_ID, records, strict=True):
            record = Record.from_json(document.encode())
            if (record.dataset, record.split, record.key) not in judged:
                self.features.append(feature_D)
                self.captions_N.append(_captions(record))
                self.questions_N.append(_questions(record))

    def rows_with_captions(self) -> list[int]:
        return [row for row, captions in enumerate(self.captions_N) if captions]

    def rows_with_questions(self) -> list[int]:
        return [row for row, questions in enumerate(self.questions_N) if questions]

    def features_of(self, rows: list[int]) -> np.ndarray:
        """Returns features_ND of these rows."""
        return np.stack([self.features[row] for row in rows])


def training_pictures(
    config: Config,
    model: Any,
    judged: Container[tuple[str, str, str]],
    dealer: Alone | None = None,
) -> TrainingPictures | str:
    """Returns training pictures, none of them `judged`; a sentence where there are none."""
    found = TrainingPictures()
    readers = TrainingReaders(config, model)
    for manifest in training_sets(config):
        if not manifest.has_pictures:
            continue
        if manifest.kind == "images" and getattr(model, "vision", None) is None:
            return f"{manifest.folder} holds pictures, and the model was loaded without its encoder"
        most = MOST_FEATURES if manifest.kind == "features" else MOST_PICTURES
        drawn = np.unique(np.linspace(0, manifest.samples - 1, most).astype(int)).tolist()
        items = [
            (manifest.folder, drawn[start : start + _AT_ONCE])
            for start in range(0, len(drawn), _AT_ONCE)
        ]
        try:
            for read in (dealer or Alone()).dealt("pictures", items, readers.pictures):
                found.add(judged, *read)
        except ShardError as error:
            return f"{manifest.folder} cannot be read: {error}"
    return found if found.features else "no local training set has pictures other than these"


class TrainingReaders:
    """Reads pictures of training sets, each of which is opened once."""

    def __init__(self, config: Config, model: Any) -> None:
        self._model = model
        self._decode = reading(config)["decode"]
        self._readers: dict[str, Reader] = {}

    @torch.no_grad()
    def pictures(
        self, folder: str, indices: Sequence[int]
    ) -> tuple[Sequence[np.ndarray] | np.ndarray, list[str]]:
        """Returns the mean patch and the record of each picture of a set that can be read. Raises
        ShardError.
        """
        if folder not in self._readers:
            self._readers[folder] = Reader(Manifest.open(folder))
        reader = self._readers[folder]
        payloads: list[np.ndarray] = []
        records: list[str] = []
        for index in indices:
            sample = reader.read(index)
            if not sample.known.has_picture:
                continue
            try:
                payloads.append(self._decode(sample))
            except (ShardError, ValueError):  # named by the training run that read it
                continue
            records.append(sample.known.to_json().decode())
        if not payloads:
            return [], []
        return _pooled(np.stack(payloads), reader.manifest.kind, self._model), records


def _captions(record: Record) -> tuple[str, ...]:
    return tuple(t for text in record.texts if text.task == "caption" for t in text.targets)


def _questions(record: Record) -> dict[str, str]:
    return {
        text.prompt: vqa.most_common(text.targets)
        for text in record.texts
        if text.task == "vqa" and text.prompt
    }


def _pooled(payloads: np.ndarray, kind: str, model: Any) -> np.ndarray:
    """Returns the mean patch of each."""
    if kind == "features":
        return payloads.astype(np.float32).mean(axis=1)
    device = next(model.parameters()).device
    with model.precision.autocast("vision"):
        patches_IPD = model.vision(torch.from_numpy(payloads).to(device)).float()
    return patches_IPD.mean(dim=1).cpu().numpy()
