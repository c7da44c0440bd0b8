"""What every language model gives back: the weighted loss of a batch, and its answers.

Legend: C contexts, T targets, L target tokens, K kept (weighted) tokens, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from harness.model.batch import Batch, TargetRows

# of logits at a time: on a CPU so many as its cache holds
ROWS_ON_CPU = 128
ROWS = 1024
# a batch of a million images, as a plan tries it, is not cut into thousands
MOST_CHUNKS = 16


class Kept(NamedTuple):
    """Targets that were decoded together, a batch of them, and from what their kept tokens are
    told.
    """

    rows: TargetRows
    part: Batch
    hidden_KD: torch.Tensor


@dataclass(frozen=True)
class LossOutput:
    """Weighted cross entropy in nats. `sum` / `weight` is the loss; sums add up over micro-batches
    and ranks.
    """

    sum: torch.Tensor
    weight: torch.Tensor
    sum_T: torch.Tensor  # per target, detached
    weight_T: torch.Tensor


@dataclass(frozen=True)
class Generated:
    """One answer per context, and the probability the model gave to ending at once."""

    texts: list[str]
    token_ids: list[list[int]]
    p_eos_first_C: torch.Tensor


def weighted_loss(
    kept: Iterable[Kept],
    batch: Batch,
    head: Callable[[torch.Tensor], torch.Tensor],
    label_smoothing: float,
    *,
    whole: bool,
    trains_head: bool = True,
) -> LossOutput:
    """Returns the cross entropy of `labels_TL`, weighted by `weight_TL`; `head` makes logits only
    where a weight is not 0.

    `whole`: logits of all at once, as a partitioned model needs it, whose ranks must run its head
    equally often. Where the head is frozen (not `trains_head`), logits exist for a few rows at a
    time alone.
    """
    groups = []
    for rows, part, hidden_KD in kept:
        # by lists that the batch brings along: a mask would make the host wait for the device
        labels_K = part.labels_TL.flatten().index_select(0, rows.kept_K)
        weight_K = part.weight_TL.flatten().index_select(0, rows.kept_K)
        groups.append((hidden_KD, labels_K, weight_K, rows.target_of_K))
    hidden_KD, labels_K, weight_K, target_of_K = map(torch.cat, zip(*groups, strict=True))
    if whole or trains_head:
        logits_KV = head(hidden_KD).float()
        nats_K = F.cross_entropy(
            logits_KV, labels_K, reduction="none", label_smoothing=label_smoothing
        )
    else:
        nats_K = _ChunkedNats.apply(hidden_KD, labels_K, head, label_smoothing)
    weighted_K = nats_K * weight_K
    sum_T = torch.zeros(len(batch.labels_TL), device=nats_K.device)
    sum_T.index_add_(0, target_of_K, weighted_K.detach())
    # With no weight at all (a filler) K is 0, and every trainable parameter still gets its
    # gradient, of zeros.
    return LossOutput(weighted_K.sum(), batch.weight_TL.sum(), sum_T, batch.weight_TL.sum(dim=1))


class _ChunkedNats(torch.autograd.Function):
    """Cross entropy of each row, and at once its gradient by the row: what is kept for the backward
    pass is as wide as the model, not as the vocabulary.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_KD: torch.Tensor,
        labels_K: torch.Tensor,
        head: Callable[[torch.Tensor], torch.Tensor],
        label_smoothing: float,
    ) -> torch.Tensor:
        least = ROWS_ON_CPU if hidden_KD.device.type == "cpu" else ROWS
        rows = max(least, math.ceil(len(hidden_KD) / MOST_CHUNKS))
        nats, gradients = [], []
        for chunk_KD, chunk_K in zip(hidden_KD.split(rows), labels_K.split(rows), strict=True):
            with torch.enable_grad():
                own_KD = chunk_KD.detach().requires_grad_()
                logits_KV = head(own_KD)
            told = _nats(logits_KV.detach().float(), chunk_K, label_smoothing)
            nats.append(told[0])
            if ctx.needs_input_grad[0]:
                # not autograd.grad, which counters of operations do not get along with
                logits_KV.backward(told[1].to(logits_KV.dtype))
                assert own_KD.grad is not None
                gradients.append(own_KD.grad)
        if gradients:
            ctx.save_for_backward(torch.cat(gradients))
        return torch.cat(nats)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (grad_KD,) = ctx.saved_tensors
        return grad_KD * gradients[0][:, None].to(grad_KD.dtype), None, None, None


def _nats(
    logits_KV: torch.Tensor, labels_K: torch.Tensor, label_smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the smoothed cross entropy of each row (Szegedy et al. 2016, section 7), and its
    gradient by the logits.
    """
    share = label_smoothing / logits_KV.shape[1]  # of every word, the label included
    log_p_KV = logits_KV.log_softmax(dim=1)
    labels_K1 = labels_K[:, None]
    nats_K = -(1 - label_smoothing) * log_p_KV.gather(1, labels_K1)[:, 0]
    if label_smoothing:
        nats_K = nats_K - share * log_p_KV.sum(dim=1)
    # not exp of the former: that takes ten times as long where it underflows
    grad_KV = logits_KV.softmax(dim=1)
    if label_smoothing:
        grad_KV -= share
    of_label_K1 = grad_KV.gather(1, labels_K1) - (1 - label_smoothing)
    return nats_K, grad_KV.scatter_(1, labels_K1, of_label_K1)


def partitioned(model: nn.Module) -> bool:
    """Returns whether every rank holds a part of each weight (ZeRO-3) and all have to ask for them
    in the same order.
    """
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
