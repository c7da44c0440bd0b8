"""The tensors of one micro-batch, in three levels that each point at the one above.

    images    I   pixels_IHW3 or features_IPD         encoder and plain Q-Former run once per image
    contexts  C   prompt_ids_CL, image_of_C           the T5 encoder runs once per (image, prompt)
    targets   T   labels_TL, weight_TL, context_of_T  the decoder runs once per target

A context without a picture points at none: -1 in image_of_C. Legend: I images, C contexts, T
targets, P patches, D width, L tokens, H W pixels.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from harness.model.packing import Lengths, Packed, pack


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: a record holds dictionaries
class Context:
    """The origin of a row of the context level. The model only passes it on, and knows nothing of
    shards.
    """

    record: Any  # shards.record.Record
    text: Any  # shards.record.Text
    prompt: str  # after the template


class TargetRows(NamedTuple):
    """Targets that are decoded together, and which of their tokens count, as lists to index with: a
    mask in their place would make the host wait for a GPU to count it.
    """

    rows_T: torch.Tensor  # int64 in [0, T)
    longest: int  # their labels are cut to this length
    kept_K: torch.Tensor  # int64, the tokens with a weight in labels_TL[rows_T, :longest], flat
    target_of_K: torch.Tensor  # int64 in [0, T), the target that each of them belongs to

    def mapped(self, change: Callable[[Any], Any]) -> TargetRows:
        return TargetRows(
            change(self.rows_T), self.longest, change(self.kept_K), change(self.target_of_K)
        )


class TargetIndex(NamedTuple):
    """The rows of a batch: all targets as one group, then each of its groups, where there are two
    or more; and as a decoder alone packs them. It holds for the very tensors that it was made from.
    """

    made_from: tuple[torch.Tensor, ...]  # those of MADE_FROM
    rows: tuple[TargetRows, ...]
    # contexts of an image in one row; and each in its own, where that is not the same; () where
    # nothing packs them
    packed: tuple[Packed, ...]


MADE_FROM = ("weight_TL", "prompt_mask_CL", "image_of_C", "context_of_T")


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch. One of `pixels_IHW3` and `features_IPD` is there, or neither
    where no context has a picture.

    `weight_TL` is 0 on padding (but for `known_mistakes.loss_on_padding`) and on everything
    that must not count: a filler, a sample that could not be read. Its other values carry the EOS
    weight and its set's `loss_weight`. The loss is sum(weight x cross entropy) / sum(weight).
    """

    prompt_ids_CL: torch.Tensor  # int64, padded on the right
    prompt_mask_CL: torch.Tensor  # bool
    image_of_C: torch.Tensor  # int64 in [-1, I)
    labels_TL: torch.Tensor  # int64, `padding_id` on padding
    weight_TL: torch.Tensor  # float32
    context_of_T: torch.Tensor  # int64 in [0, C)
    pixels_IHW3: torch.Tensor | None = None  # uint8; normalised on the device
    features_IPD: torch.Tensor | None = None  # float16
    contexts: tuple[Context, ...] = ()  # C of them, for evaluation
    text_ids_T: tuple[str, ...] = ()
    packs: bool = False  # it is for a decoder, whose targets share rows
    begins: bool = False  # in training a token stands between a prompt and its answers
    # rows of T of like length, and the length of their longest; (): T is one group
    groups: tuple[tuple[list[int], int], ...] = ()
    index: TargetIndex | None = None  # made by `indexed`, which `to` calls

    @property
    def images(self) -> int:
        images_I = self.features_IPD if self.pixels_IHW3 is None else self.pixels_IHW3
        return 0 if images_I is None else len(images_I)

    @property
    def weight(self) -> torch.Tensor:
        return self.weight_TL.sum()

    def indexed(self) -> Batch:
        """Returns the batch with the index lists of its targets; the host waits for its weights
        where they are not in main memory.
        """
        made_from = tuple(getattr(self, name) for name in MADE_FROM)
        if self.index and all(map(operator.is_, self.index.made_from, made_from)):
            return self
        counts_TL = self.weight_TL.cpu() != 0
        length = counts_TL.shape[1]
        groups = self.groups if len(self.groups) > 1 else ()
        moved = partial(torch.Tensor.to, device=self.weight_TL.device, non_blocking=True)
        made = []
        for rows, longest in ((range(len(counts_TL)), length), *groups):
            rows_T = torch.tensor(rows, dtype=torch.long)
            kept_K = counts_TL[rows_T, :longest].flatten().nonzero()[:, 0]
            target_of_K = rows_T[kept_K.div(max(longest, 1), rounding_mode="floor")]
            made.append(TargetRows(rows_T, longest, kept_K, target_of_K).mapped(moved))
        ways = self._ways() if self.packs else ()
        packed = [self._packed(self.begins, by_image) for by_image in ways]
        return replace(self, index=TargetIndex(made_from, tuple(made), tuple(packed)))

    def packed(self, begins: bool, by_image: bool) -> Packed:
        """Returns where the tokens of packed targets stand. `by_image`: contexts of an image share
        a row. The host waits where `begins` is not as in training, or the batch does not pack.
        """
        if begins != self.begins or not self.packs:
            return self._packed(begins, by_image)
        index = self.indexed().index
        assert index is not None  # `indexed` has made it
        return index.packed[0 if by_image else -1]

    def _ways(self) -> tuple[bool, ...]:
        """Returns whether contexts share a row by their images: yes; and no, where that differs."""
        images = [image for image in self.image_of_C.tolist() if image >= 0]
        return (True,) if len(images) == len(set(images)) else (True, False)

    def _packed(self, begins: bool, by_image: bool) -> Packed:
        image_C = self.image_of_C.cpu().numpy()
        own_C = np.arange(len(image_C)) + len(image_C) + self.images
        lengths = Lengths(
            self.prompt_mask_CL.sum(dim=1).cpu().numpy(),
            self.prompt_mask_CL.shape[1],
            (self.weight_TL != 0).cpu().numpy(),
            self.context_of_T.cpu().numpy(),
        )
        rows_C = np.where((image_C >= 0) & by_image, image_C, own_C)
        device = self.image_of_C.device
        return pack(lengths, rows_C, begins).mapped(
            partial(torch.Tensor.to, device=device, non_blocking=True)
        )

    def target_groups(self, whole: bool) -> Iterator[tuple[TargetRows, Batch]]:
        """Yields each group of targets as its rows and a batch of them, with all images and
        contexts; `whole`: all targets as one group.
        """
        index = self.indexed().index
        assert index is not None  # `indexed` has made it
        if whole or len(index.rows) == 1:
            yield index.rows[0], self
            return
        for (rows, _), made in zip(self.groups, index.rows[1:], strict=True):
            group = replace(
                self,
                labels_TL=self.labels_TL[made.rows_T, : made.longest],
                weight_TL=self.weight_TL[made.rows_T, : made.longest],
                context_of_T=self.context_of_T[made.rows_T],
                text_ids_T=tuple(self.text_ids_T[row] for row in rows if self.text_ids_T),
                groups=(),
                index=None,
            )
            yield made, group

    def mapped(self, change: Callable[[Any], Any]) -> Batch:
        """Returns the batch with what `change` makes of each of its tensors, those of its index
        included, which is made before.
        """
        batch = self.indexed()
        assert batch.index is not None  # `indexed` has made it
        made: dict[str, Any] = {
            f.name: change(value)
            for f in fields(batch)
            if isinstance(value := getattr(batch, f.name), torch.Tensor | np.ndarray)
        }
        index = TargetIndex(
            tuple(made[name] for name in MADE_FROM),
            tuple(each.mapped(change) for each in batch.index.rows),
            tuple(each.mapped(change) for each in batch.index.packed),
        )
        return replace(batch, **made, index=index)

    def to(self, device: torch.device | str) -> Batch:
        return self.mapped(partial(torch.Tensor.to, device=device, non_blocking=True))


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that pads. GPT-2's tokenizer has none: EOS pads, which teaches nothing, since
    weights go by lengths and not by ids.
    """
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
