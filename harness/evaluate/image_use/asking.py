"""What a model finds likely: the caption of each picture among those of the most alike ones.

A gate of captions -> nats of every caption with every picture of its group -> the recall term.
Legend: P pictures of a group and their captions, T targets, L tokens.
"""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import torch

from harness.evaluate.bootstrap import ratio
from harness.evaluate.gate_terms.recall import chance, groups_alike, recalled
from harness.evaluate.image_use.evidence import FEWEST_IMAGES, RECALL, Term
from harness.evaluate.image_use.gate import Gate
from harness.model.batch import Batch

GROUP = 100  # pictures whose captions are told apart: the right one and its 99 nearest
_TARGETS = 500  # that are scored at once


@torch.no_grad()
def recall_term(gate: Gate, scaled_IK: np.ndarray, most_images: int) -> Term:
    """Returns how much more often than by chance the model finds a picture's own caption the most
    likely one among those of its group, by nats a token minus their mean over the group's pictures
    (so that a caption that is likely for any picture is not found).

    `scaled_IK`: as for `Gate.measure`; at most `most_images` pictures.
    """
    began = time.perf_counter()
    context_I = _first_contexts(gate)[:most_images]
    if len(context_I) < FEWEST_IMAGES:
        return Term(RECALL, None, missing=f"{len(context_I)} images are fewer than {FEWEST_IMAGES}")
    known = np.isfinite(scaled_IK[: len(context_I)]).all(axis=1)
    if not known.all():
        return Term(RECALL, None, missing="statistics of some pictures are not known")
    found_I = np.zeros(len(context_I))
    chance_I = np.zeros(len(context_I))
    for rows in groups_alike(scaled_IK[: len(context_I)], GROUP):
        contexts = [context_I[row] for row in rows]
        starts = range(0, len(contexts), max(1, _TARGETS // len(contexts)))
        items = [(contexts, start) for start in starts]
        nats_PC = np.concatenate([*gate.dealt("likely", likely, items)])
        if not np.isfinite(nats_PC).all():
            return Term(RECALL, None, missing="the model gives no finite loss")
        captions = [gate.predictions[context].references[0] for context in contexts]
        found_I[rows] = recalled(nats_PC, captions)
        chance_I[rows] = chance(captions)
    above = ratio(
        100 * (found_I - chance_I),
        np.ones(len(context_I)),
        gate.config.bootstrap,
        gate.config.confidence,
    )
    return Term(
        RECALL,
        above,
        score=100 * float(found_I.mean()),
        margin=0.0,
        images=len(context_I),
        about=f"chance {100 * chance_I.mean():.1f}%",
        seconds=time.perf_counter() - began,
    )


def _first_contexts(gate: Gate) -> list[int]:
    """Returns the first caption context of each picture, in the order of the pictures."""
    first = {row: context for context, row in reversed(list(enumerate(gate.picture_rows.tolist())))}
    return [first[row] for row in sorted(first)]


def likely(gate: Gate, contexts: list[int], start: int) -> np.ndarray:
    """nats_pC a token: of the first caption of every picture, with some of the pictures, from
    `start` on.
    """
    shown = contexts[start : start + max(1, _TARGETS // len(contexts))]
    batch = _crossed(gate, shown, contexts)
    assert gate.bank is not None  # something was added
    loss = gate.model.loss(batch, gate.bank.tokens(batch, gate.bank_rows[shown]))
    nats_T = loss.sum_T.double() / loss.weight_T.double()
    return nats_T.cpu().numpy().reshape(len(shown), len(contexts))


def _captions(gate: Gate, contexts: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns labels_PL and weight_PL of the first target of each context."""
    targets = [_first_target(gate, context) for context in contexts]
    width = max(labels.shape[1] for labels, _ in targets)
    pad = _padding(targets)
    labels_PL = torch.cat([_wider(labels, width, pad) for labels, _ in targets])
    weight_PL = torch.cat([_wider(weight, width, 0) for _, weight in targets])
    return labels_PL, weight_PL


def _first_target(gate: Gate, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (labels_1L, weight_1L) of the first target of a context."""
    part = gate.context_batch(context)
    row = int((part.context_of_T == 0).nonzero()[0, 0])
    return part.labels_TL[row : row + 1], part.weight_TL[row : row + 1]


def _padding(targets: list[tuple[torch.Tensor, torch.Tensor]]) -> int:
    """Returns an id to pad with: that of a token without weight, else any of the labels."""
    for labels, weight in targets:
        if (weight == 0).any():
            return int(labels[weight == 0][0])
    return int(targets[0][0][0, -1])


def _wider(values_1L: torch.Tensor, width: int, fill: int) -> torch.Tensor:
    return torch.nn.functional.pad(values_1L, (0, width - values_1L.shape[1]), value=fill)


def _crossed(gate: Gate, shown: list[int], contexts: list[int]) -> Batch:
    """Returns a batch in which each context that is shown has every caption as a target."""
    if gate.crossed is None or gate.crossed[0] != contexts:  # a group is asked many times
        gate.crossed = (contexts, *_captions(gate, contexts))
    _, labels_PL, weight_PL = gate.crossed
    single = [gate.context_batch(context) for context in shown]
    longest = max(batch.prompt_ids_CL.shape[1] for batch in single)
    ids_CL = torch.cat([_wider(b.prompt_ids_CL, longest, 0) for b in single])
    mask_CL = torch.cat([_wider(b.prompt_mask_CL, longest, 0) for b in single])
    count = len(shown)
    return replace(
        single[0],
        prompt_ids_CL=ids_CL,
        prompt_mask_CL=mask_CL,
        image_of_C=torch.arange(count, device=ids_CL.device),
        labels_TL=labels_PL.repeat(count, 1),
        weight_TL=weight_PL.repeat(count, 1),
        context_of_T=torch.arange(count, device=ids_CL.device).repeat_interleave(len(labels_PL)),
        contexts=tuple(batch.contexts[0] for batch in single),
        text_ids_T=(),
        groups=(),
    )
