"""Training pictures as features, with their texts: what the neighbour floors copy from.

Local training sets -> features_ND, captions and questions, or the reason why there are none.
Legend: N training pictures, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from harness.config.schema import Config
from harness.data.images import reading
from harness.evaluate import vqa
from harness.evaluate.floor import training_sets
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

    def rows_with_captions(self) -> list[int]:
        return [row for row, captions in enumerate(self.captions_N) if captions]

    def rows_with_questions(self) -> list[int]:
        return [row for row, questions in enumerate(self.questions_N) if questions]

    def features_of(self, rows: list[int]) -> np.ndarray:
        """Returns features_ND of these rows."""
        return np.stack([self.features[row] for row in rows])


def training_pictures(
    config: Config, model: Any, judged: Container[tuple[str, str, str]]
) -> TrainingPictures | str:
    """Returns training pictures, none of them `judged`; a sentence where there are none."""
    found = TrainingPictures()
    for manifest in training_sets(config):
        if manifest.kind == "images" and getattr(model, "vision", None) is None:
            return f"{manifest.folder} holds pictures, and the model was loaded without its encoder"
        try:
            _add(manifest, config, model, judged, found)
        except ShardError as error:
            return f"{manifest.folder} cannot be read: {error}"
    return found if found.features else "no local training set has pictures other than these"


def _add(
    manifest: Manifest,
    config: Config,
    model: Any,
    judged: Container[tuple[str, str, str]],
    found: TrainingPictures,
) -> None:
    """Adds the pictures of one set. Raises ShardError."""
    most = MOST_FEATURES if manifest.kind == "features" else MOST_PICTURES
    reader = Reader(manifest)
    decode = reading(config)["decode"]
    waiting: list[np.ndarray] = []
    for index in np.unique(np.linspace(0, manifest.samples - 1, most).astype(int)):
        sample = reader.read(int(index))
        record = sample.known
        if (record.dataset, record.split, record.key) in judged:
            continue
        try:
            waiting.append(decode(sample))
        except (ShardError, ValueError):  # named by the training run that read it
            continue
        found.captions_N.append(_captions(record))
        found.questions_N.append(_questions(record))
        if len(waiting) == _AT_ONCE:
            found.features += _pooled(waiting, manifest.kind, model)
            waiting = []
    if waiting:
        found.features += _pooled(waiting, manifest.kind, model)


def _captions(record: Record) -> tuple[str, ...]:
    return tuple(t for text in record.texts if text.task == "caption" for t in text.targets)


def _questions(record: Record) -> dict[str, str]:
    return {
        text.prompt: vqa.most_common(text.targets)
        for text in record.texts
        if text.task == "vqa" and text.prompt
    }


@torch.no_grad()
def _pooled(payloads: list[np.ndarray], kind: str, model: Any) -> list[np.ndarray]:
    """Returns the mean patch of each."""
    stacked = np.stack(payloads)
    if kind == "features":
        return list(stacked.astype(np.float32).mean(axis=1))
    device = next(model.parameters()).device
    with model.precision.autocast("vision"):
        patches_IPD = model.vision(torch.from_numpy(stacked).to(device)).float()
    return list(patches_IPD.mean(dim=1).cpu().numpy())
