"""What every language model is to the other rooms: loss and generation over a grouped batch.

Image tokens and a batch in; the weighted loss of its targets, or one answer per context, out.
Legend: C contexts, T targets, L target tokens, K kept (weighted) tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from harness.config.schema import DecodingConfig, LanguageModelConfig
from harness.model.batch import Batch
from harness.model.bridge import BridgeOutput
from harness.model.language import quantise
from harness.model.language.lora import fuse_lora
from harness.model.language.loss import Generated, LossOutput, partitioned, weighted_loss
from harness.model.products import use_products


class LanguageModel(nn.Module, ABC):
    """A frozen base by hub id or folder, in 4 bits or not, with LoRA or not."""

    architecture: type[PreTrainedModel]
    lm: Any  # the base, or peft's model around it
    bos_in_training = True  # False is a known mistake

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config = config
        base, self._tokenizer = quantise.load(
            config, self.architecture, self._fields(), dtype=dtype, compute_dtype=compute_dtype
        )
        self._prepare(base)
        self.lm = quantise.tune(base, config)
        fuse_lora(self.lm)
        use_products(self.lm)

    @abstractmethod
    def _fields(self) -> dict[str, Any]:
        """Returns the fields of the base's config.json that ours decides."""

    @abstractmethod
    def _prepare(self, base: Any) -> None:
        """Checks the loaded base, and sets what its files do not hold. Raises ConfigError."""

    @abstractmethod
    def _decoder(self, image: BridgeOutput, batch: Batch) -> Callable[[Batch], torch.Tensor]:
        """Reads what stands before the targets of the batch, once per context. The function that
        is returned gives hidden_TLD, from which each label is told, of any part of its targets.
        Raises ConfigError for rows longer than the model's positions.
        """

    @abstractmethod
    def generation_inputs(self, image: BridgeOutput, batch: Batch) -> dict[str, Any]:
        """Returns what `base.generate` of transformers goes on from: all that stands before the
        answers, one per context.
        """

    @abstractmethod
    def generate(self, image: BridgeOutput, batch: Batch, decoding: DecodingConfig) -> Generated:
        """Returns one answer per context (greedy or beam search). Raises ConfigError as `loss`."""

    @property
    def base(self) -> Any:
        """The model of transformers, whatever is wrapped around it."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    @property
    def begins(self) -> int | None:
        """The token id after the prompt from which a decoder answers; T5's starts on its own."""
        return None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        assert self._tokenizer is not None, "a model without weights has no tokenizer either"
        return self._tokenizer

    @property
    def width(self) -> int:
        return self.base.config.hidden_size

    @property
    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings that image tokens stand among, the scale that
        the model is used to; 1 where image tokens are attended to.
        """
        weight = self.base.get_input_embeddings().weight
        if weight.is_meta or self.config.cross_attention:
            return 1.0
        return weight.detach().float().pow(2).mean().sqrt().item()

    def loss(self, image: BridgeOutput, batch: Batch, label_smoothing: float = 0.0) -> LossOutput:
        """Returns the cross entropy of `labels_TL`, weighted by `weight_TL`; logits are made only
        where a weight is not 0. Raises ConfigError for rows longer than the model's positions.
        """
        decode = self._decoder(image, batch)
        return weighted_loss(
            decode,
            batch,
            self._logits,
            label_smoothing,
            whole=partitioned(self),
            trains_head=any(p.requires_grad for p in self.base.lm_head.parameters()),
        )

    def logits(self, image: BridgeOutput, batch: Batch) -> torch.Tensor:
        """Returns logits_TLV, from which each label is told. Raises ConfigError as `loss`."""
        return self._logits(self._decoder(image, batch)(batch))

    def _logits(self, hidden_KD: torch.Tensor) -> torch.Tensor:
        return self.base.lm_head(hidden_KD)

    def _answers(
        self, p_eos_C: torch.Tensor, decoding: DecodingConfig, silent: tuple, **inputs: Any
    ) -> Generated:
        """Generates from the `inputs`; `silent` token ids are left out of the answers."""
        sequences_CL = self.base.generate(**generate_arguments(decoding), **inputs)
        ids = [[t for t in row if t not in silent] for row in sequences_CL.tolist()]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return Generated([text.strip() for text in texts], ids, p_eos_C)


def generate_arguments(decoding: DecodingConfig) -> dict[str, Any]:
    """Returns what transformers' `generate` is told of how an answer is written."""
    return {
        "max_new_tokens": decoding.max_new_tokens,
        "min_new_tokens": decoding.min_new_tokens or None,
        "num_beams": decoding.beams,
        "length_penalty": decoding.length_penalty,
        "do_sample": False,
    }


def attending_cache(
    keys_and_values: Iterable[Sequence[torch.Tensor]], rows: torch.Tensor
) -> EncoderDecoderCache:
    """Returns a cache of no words yet, and of what these `rows` attend to by cross-attention: keys
    and values by layer.
    """
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for index, (keys, values) in enumerate(keys_and_values):
        own_keys = keys.index_select(0, rows)
        own_values = values.index_select(0, rows)
        cache.cross_attention_cache.update(own_keys, own_values, index)
        cache.is_updated[index] = True
    return cache
