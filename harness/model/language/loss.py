"""What every language model gives back: the weighted loss of a batch, and its answers.

Legend: C contexts, T targets, L target tokens, K kept (weighted) tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from harness.model.batch import Batch


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
    decode: Callable[[Batch], torch.Tensor],
    batch: Batch,
    head: Callable[[torch.Tensor], torch.Tensor],
    label_smoothing: float,
    *,
    whole: bool,
) -> LossOutput:
    """Returns the cross entropy of `labels_TL`, weighted by `weight_TL`; `head` makes logits only
    where a weight is not 0.

    `decode` gives hidden_TLD of a batch that holds some of the targets. `whole`: it is given all at
    once, as a partitioned model needs it, whose ranks must run its blocks equally often.
    """
    groups = []
    for rows, part in batch.target_groups(whole):
        # by lists that the batch brings along: a mask would make the host wait for the device
        kept_K = rows.kept_K
        groups.append(
            (
                decode(part).flatten(0, 1).index_select(0, kept_K),
                part.labels_TL.flatten().index_select(0, kept_K),
                part.weight_TL.flatten().index_select(0, kept_K),
                rows.target_of_K,
            )
        )
    hidden_KD, labels_K, weight_K, target_of_K = map(torch.cat, zip(*groups, strict=True))
    logits_KV = head(hidden_KD).float()
    nats_K = F.cross_entropy(logits_KV, labels_K, reduction="none", label_smoothing=label_smoothing)
    weighted_K = nats_K * weight_K
    sum_T = torch.zeros(len(batch.labels_TL), device=nats_K.device)
    sum_T.index_add_(0, target_of_K, weighted_K.detach())
    # With no weight at all (a filler) K is 0, and every trainable parameter still gets its
    # gradient, of zeros.
    return LossOutput(weighted_K.sum(), batch.weight_TL.sum(), sum_T, batch.weight_TL.sum(dim=1))


def partitioned(model: nn.Module) -> bool:
    """Returns whether every rank holds a part of each weight (ZeRO-3) and all have to ask for them
    in the same order.
    """
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
