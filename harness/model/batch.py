"""The tensors of one micro-batch, in three levels that each point at the one above.

    images    I   pixels_IHW3 or features_IPD         encoder and plain Q-Former run once per image
    contexts  C   prompt_ids_CL, image_of_C           the T5 encoder runs once per (image, prompt)
    targets   T   labels_TL, weight_TL, context_of_T  the decoder runs once per target

Legend: I images, C contexts, T targets, P patches, D width, L tokens, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: a record holds dictionaries
class Context:
    """The origin of a row of the context level. The model only passes it on, and knows nothing of
    shards.
    """

    record: Any  # shards.record.Record
    text: Any  # shards.record.Text
    prompt: str  # after the template


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch. Exactly one of `pixels_IHW3` and `features_IPD` is there.

    `weight_TL` is 0 on padding (but for `known_mistakes.loss_on_padding`) and on everything
    that must not count: a filler, a sample that could not be read. Its other values carry the EOS
    weight and its set's `loss_weight`. The loss is sum(weight x cross entropy) / sum(weight).
    """

    prompt_ids_CL: torch.Tensor  # int64, padded on the right
    prompt_mask_CL: torch.Tensor  # bool
    image_of_C: torch.Tensor  # int64 in [0, I)
    labels_TL: torch.Tensor  # int64, `padding_id` on padding
    weight_TL: torch.Tensor  # float32
    context_of_T: torch.Tensor  # int64 in [0, C)
    pixels_IHW3: torch.Tensor | None = None  # uint8; normalised on the device
    features_IPD: torch.Tensor | None = None  # float16
    contexts: tuple[Context, ...] = ()  # C of them, for evaluation
    text_ids_T: tuple[str, ...] = ()
    # rows of T of like length, and the length of their longest; (): T is one group
    groups: tuple[tuple[list[int], int], ...] = ()

    @property
    def images(self) -> int:
        images_I = self.features_IPD if self.pixels_IHW3 is None else self.pixels_IHW3
        assert images_I is not None  # one of them is there
        return len(images_I)

    @property
    def weight(self) -> torch.Tensor:
        return self.weight_TL.sum()

    def target_groups(self, whole: bool) -> Iterator[tuple[torch.Tensor, Batch]]:
        """Yields each group of targets as its rows of T and a batch of them, with all images and
        contexts; `whole`: all targets as one group.
        """
        device = self.labels_TL.device
        if whole or len(self.groups) < 2:
            yield torch.arange(len(self.labels_TL), device=device), self
            return
        for rows, longest in self.groups:
            rows_T = torch.tensor(rows, device=device)
            group = replace(
                self,
                labels_TL=self.labels_TL[rows_T, :longest],
                weight_TL=self.weight_TL[rows_T, :longest],
                context_of_T=self.context_of_T[rows_T],
                text_ids_T=tuple(self.text_ids_T[row] for row in rows if self.text_ids_T),
                groups=(),
            )
            yield rows_T, group

    def to(self, device: torch.device | str) -> Batch:
        moved: dict[str, Any] = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that pads. GPT-2's tokenizer has none: EOS pads, which teaches nothing, since
    weights go by lengths and not by ids.
    """
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
