"""What every language model gives back: the weighted loss of a batch, and its answers.

Legend: C contexts, T targets, L target tokens, K kept (weighted) tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

from harness.batch import Batch


@dataclass(frozen=True)
class LossOutput:
    """Weighted cross entropy in nats. `sum` / `weight` is the loss; sums add up over micro-batches and ranks."""

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
    hidden_TLD: torch.Tensor, batch: Batch, head: Callable[[torch.Tensor], torch.Tensor], label_smoothing: float
) -> LossOutput:
    """Cross entropy of `labels_TL`, weighted by `weight_TL`; `head` makes logits only where a weight is not 0."""
    kept_TL = batch.weight_TL != 0
    logits_KV = head(hidden_TLD[kept_TL]).float()
    nats_K = F.cross_entropy(logits_KV, batch.labels_TL[kept_TL], reduction="none", label_smoothing=label_smoothing)
    weighted_K = nats_K * batch.weight_TL[kept_TL]
    target_of_K = kept_TL.nonzero()[:, 0]
    sum_T = torch.zeros(len(kept_TL), device=nats_K.device).index_add_(0, target_of_K, weighted_K.detach())
    # With no weight at all (a filler) K is 0, and every trainable parameter still gets its gradient, of zeros.
    return LossOutput(weighted_K.sum(), batch.weight_TL.sum(), sum_T, batch.weight_TL.sum(dim=1))
