"""Training pictures with captions, as features: what the neighbour floor copies from.

Local training sets -> features_ND and captions, or the reason why there are none. Legend: N
training pictures, P patches, D width.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any, NamedTuple

import numpy as np
import torch

from harness.config.schema import Config
from harness.data.images import reading
from harness.evaluate.floor import training_sets
from shards.files import ShardError
from shards.manifest import Manifest
from shards.read import Reader

# Pictures of each training set, evenly spaced: a feature set is only read, pictures are encoded.
MOST_FEATURES = 10_000
MOST_PICTURES = 1_000
_AT_ONCE = 32


class TrainingPictures(NamedTuple):
    """Mean patches of pictures, and their captions."""

    features_ND: np.ndarray
    captions_N: list[tuple[str, ...]]


def training_pictures(
    config: Config, model: Any, judged: Container[tuple[str, str, str]]
) -> TrainingPictures | str:
    """Returns training pictures with captions, none of them `judged`; a sentence where there are
    none.
    """
    features: list[np.ndarray] = []
    captions: list[tuple[str, ...]] = []
    for manifest in training_sets(config):
        try:
            _add(manifest, config, model, judged, features, captions)
        except ShardError as error:
            return f"{manifest.folder} cannot be read: {error}"
    if not captions:
        return "no local training set holds captions"
    return TrainingPictures(np.stack(features), captions)


def _add(
    manifest: Manifest,
    config: Config,
    model: Any,
    judged: Container[tuple[str, str, str]],
    features: list[np.ndarray],
    captions: list[tuple[str, ...]],
) -> None:
    """Adds the pictures of one set. Raises ShardError."""
    most = MOST_FEATURES if manifest.kind == "features" else MOST_PICTURES
    reader = Reader(manifest)
    decode = reading(config)["decode"]
    waiting: list[np.ndarray] = []
    for index in np.unique(np.linspace(0, manifest.samples - 1, most).astype(int)):
        sample = reader.read(int(index))
        record = sample.known
        own = tuple(t for text in record.texts if text.task == "caption" for t in text.targets)
        if not own or (record.dataset, record.split, record.key) in judged:
            continue
        try:
            waiting.append(decode(sample))
        except (ShardError, ValueError):  # named by the training run that read it
            continue
        captions.append(own)
        if len(waiting) == _AT_ONCE:
            features += _pooled(waiting, manifest.kind, model)
            waiting = []
    if waiting:
        features += _pooled(waiting, manifest.kind, model)


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
