"""Retrieval: how often a picture finds its captions among those of all pictures, and a caption its
picture; what a first stage is scored by, in place of answers.

Embeddings of whole sets -> recall at 1, 5 and 10 in percent, with intervals over pictures and what
chance gives. A tie counts as a miss. Legend: N pictures, T captions, Q queries, E common space.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from math import comb
from typing import Any

import numpy as np
import torch

from harness.config.schema import EvaluationConfig
from harness.data.collate import Collator
from harness.evaluate.bootstrap import per_text
from harness.evaluate.results import Evaluation
from harness.model.first_stage import refuse_no_captions, similarity
from shards.loader import Loader

TASK = "retrieval"
NOT_JUDGED = "not judged: retrieval"
RANKS = (1, 5, 10)
WAYS = ("image_to_text", "text_to_image")
NAMES = tuple(f"{way}_R{rank}" for way in WAYS for rank in RANKS)
PICTURES_AT_A_TIME = 16  # whose similarities to all captions are held, a number for each query
WHY_NOT_JUDGED = (
    "retrieval is of pictures by captions and back: without the picture there is no score, so that "
    "whether it is used is no question"
)


@dataclass
class Retrieval(Evaluation):
    """An evaluation without answers, of no task of texts."""

    figures: dict[str, Any] = field(default_factory=dict)

    def by_task(self) -> dict[str, dict[str, Any]]:
        return {TASK: self.figures}

    def metrics(self) -> dict[str, float]:
        return {name: self.figures[name] for name in NAMES}


@torch.no_grad()
def retrieval(
    model: Any,
    loaders: Sequence[Loader],
    collate: Collator,
    settings: EvaluationConfig,
    limit: int | None,
    progress: Callable[[int, int], None] | None,
) -> Retrieval:
    """Scores a first stage on the sets together, `limit` pictures of each, by the similarity of
    itc. Leaves the model in eval mode. Raises ShardError.
    """
    model.eval()
    found = Retrieval()
    images: list[torch.Tensor] = []
    texts: list[torch.Tensor] = []
    pictures: list[torch.Tensor] = []
    total = sum(min(loader.samples, limit or loader.samples) for loader in loaders)
    for loader in loaders:
        left = limit or loader.samples
        with closing(loader.iterate(epochs=1)) as batches:
            for _, read in batches:
                samples = [s for s in read if s.weight and s.record is not None][:left]
                left -= len(samples)
                if batch := collate(samples):
                    refuse_no_captions(batch)
                    made = model.embedded(batch.to(model.device))
                    images.append(made.image_IQE.cpu())
                    texts.append(made.text_TE.cpu())
                    pictures.append(batch.image_of_C[batch.context_of_T] + found.images)
                    found.images += batch.images
                if progress:
                    progress(found.images, total)
                if not left:
                    break
        found.unreadable += loader.unreadable
    parts = torch.cat(images).split(PICTURES_AT_A_TIME)
    text_TE = torch.cat(texts)
    sim_NT = torch.cat([similarity(part_NQE, text_TE) for part_NQE in parts])
    found.figures = recalls(sim_NT.numpy(), torch.cat(pictures).numpy(), settings)
    return found


def recalls(
    sim_NT: np.ndarray, picture_T: np.ndarray, settings: EvaluationConfig
) -> dict[str, Any]:
    """Returns recall at each of RANKS both ways, its interval and what chance gives, in percent;
    `picture_T`: the picture of each caption.
    """
    sim_NT = np.nan_to_num(sim_NT, nan=-np.inf)  # found by nobody, not by everybody
    pictures, texts = sim_NT.shape
    rows_N = np.arange(pictures)
    own_NT = picture_T == rows_N[:, None]
    # before the best of its own stand those of others that are as near
    best_N = np.where(own_NT, sim_NT, -np.inf).max(axis=1, keepdims=True)
    before_N = ((sim_NT >= best_N) & ~own_NT).sum(axis=1)
    before_T = (sim_NT >= sim_NT[picture_T, np.arange(texts)]).sum(axis=0) - 1
    figures: dict[str, Any] = {"images": pictures, "texts": texts}
    for way, before, row in zip(WAYS, (before_N, before_T), (rows_N, picture_T), strict=True):
        for rank in RANKS:
            hits = 100.0 * (before < rank)
            found = per_text(hits, row, settings.bootstrap, settings.confidence)
            chance = min(1.0, rank / pictures)
            if row is rows_N:
                chance = float(np.mean([_chance(int(n), texts, rank) for n in own_NT.sum(axis=1)]))
            figures |= found.flat(f"{way}_R{rank}") | {f"{way}_R{rank}_chance": 100 * chance}
    return figures | {"verdict": NOT_JUDGED, "reason": WHY_NOT_JUDGED}


def _chance(own: int, texts: int, rank: int) -> float:
    """Returns the chance that some of its own captions are among the first of a random order."""
    rank = min(rank, texts)
    return 1 - comb(texts - own, rank) / comb(texts, rank)
