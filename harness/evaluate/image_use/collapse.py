"""What in a batch made as in training teaches a model to end at once."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerBase

from harness.evaluate.image_use.evidence import COLLAPSE
from harness.model.batch import Batch


def causes_of_collapse(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, bos_in_generation_only: bool = False
) -> list[str]:
    """Returns in words what in a training batch teaches a model to end at once; [] where it is none
    of the known causes.
    """
    weight_TL = batch.weight_TL.double()
    is_eos_TL = batch.labels_TL == tokenizer.eos_token_id
    behind_TL = (
        is_eos_TL.cumsum(dim=1) - is_eos_TL.int() > 0
    )  # behind the first EOS of a row: padding
    total = float(weight_TL.sum())
    causes: list[str] = []
    if not total:
        return causes
    if (padding := float(weight_TL[behind_TL].sum()) / total) > 0:
        causes.append(
            f"{padding:.0%} of the weight of the labels lies on padding behind the first EOS, "
            "which must weigh nothing (known_mistakes.loss_on_padding)"
        )
    if starting := int((is_eos_TL[:, 0] & (weight_TL[:, 0] > 0)).sum()):
        causes.append(
            f"{starting} of {len(is_eos_TL)} targets start with EOS, so that to end at once is "
            "right"
        )
    if bos_in_generation_only:
        causes.append(
            "generation begins with a BOS token that training never showed (known_mistakes.bos)"
        )
    if (share := float(weight_TL[is_eos_TL].sum()) / total) > COLLAPSE:
        causes.append(f"EOS carries {share:.0%} of all target weight (train.eos_loss_weight)")
    return causes


def bos_in_generation_only_of(model: Any) -> bool:
    return not getattr(getattr(model, "lm", None), "bos_in_training", True)
