"""What every language model is to the other rooms: loss and generation over a grouped batch.

Image tokens and a batch in; the weighted loss of its targets, or one answer per context, out.
Legend: C contexts, T targets, L target tokens, K kept (weighted) tokens, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
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
from harness.model.language.loss import (
    Generated,
    Kept,
    LossOutput,
    partitioned,
    weighted_loss,
)
from harness.model.language.wording import refuse_endless, refuse_unknown
from harness.model.products import use_products


class LanguageModel(nn.Module, ABC):
    """A frozen base by hub id or folder, in 4 bits or not, with LoRA or not."""

    lm: Any  # the base, or peft's model around it
    bos_in_training = True  # False is a known mistake
    has_encoder = False

    def __init__(
        self,
        config: LanguageModelConfig,
        *,
        chat: str = "auto",
        dtype: torch.dtype = torch.float32,
        compute_dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        self.config = config
        base, self._tokenizer = quantise.load(
            config, self._described, chat=chat, dtype=dtype, compute_dtype=compute_dtype
        )
        if self._tokenizer is not None:
            refuse_endless(self._tokenizer, config.id, quantise.KEY)
            known: Any = base.get_input_embeddings().num_embeddings
            refuse_unknown(self._tokenizer, known, config.id, quantise.KEY)
        self._prepare(base)
        self.lm = quantise.tune(base, config)
        fuse_lora(self.lm)
        use_products(self.lm)

    @abstractmethod
    def _described(self, found: Any) -> tuple[type[PreTrainedModel], dict[str, Any]]:
        """Returns the class of a base with this config, and the fields of it that ours decides.
        Raises ValueError for a base of another kind.
        """

    @abstractmethod
    def _prepare(self, base: Any) -> None:
        """Checks the loaded base, and sets what its files do not hold. Raises ConfigError."""

    @abstractmethod
    def _kept(self, image: BridgeOutput, batch: Batch, whole: bool) -> Iterator[Kept]:
        """Yields, for groups of targets that are all of them together, hidden_KD from which each
        kept label is told; `whole`: one group. What stands before the targets is read once per
        context. Raises ConfigError for rows longer than the model's positions.
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
        """The token id after the prompt from which a decoder answers; None: the prompt's last one,
        or a T5's, which starts on its own.
        """
        return None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        assert self._tokenizer is not None, "a model without weights has no tokenizer either"
        return self._tokenizer

    @property
    def width(self) -> int:
        """Of word embeddings, and so of image tokens."""
        return self.base.get_input_embeddings().embedding_dim

    @property
    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings that image tokens stand among, the scale that
        the model is used to; 1 where image tokens are attended to.
        """
        embed = self.base.get_input_embeddings()
        if embed.weight.is_meta or self.config.cross_attention:
            return 1.0
        some = torch.arange(min(len(embed.weight), 256), device=embed.weight.device)
        scale = _rms(embed(some)) / _rms(embed.weight[some])  # Gemma's multiply what they look up
        return _rms(embed.weight) * scale

    def loss(self, image: BridgeOutput, batch: Batch, label_smoothing: float = 0.0) -> LossOutput:
        """Returns the cross entropy of `labels_TL`, weighted by `weight_TL`; logits are made only
        where a weight is not 0. Raises ConfigError for rows longer than the model's positions.
        """
        whole = partitioned(self)
        head = self.base.get_output_embeddings()
        return weighted_loss(
            self._kept(image, batch, whole),
            batch,
            self._logits,
            label_smoothing,
            whole=whole,
            trains_head=any(p.requires_grad for p in head.parameters()),
        )

    def logits(self, image: BridgeOutput, batch: Batch) -> torch.Tensor:
        """Returns logits_TLV, from which each label is told that has a weight; zeros for the
        others. Raises ConfigError as `loss`.
        """
        kept = next(self._kept(image, batch, True))
        logits_KV = self._logits(kept.hidden_KD)
        logits_NV = logits_KV.new_zeros(batch.labels_TL.numel(), logits_KV.shape[1])
        return logits_NV.index_copy(0, kept.rows.kept_K, logits_KV).unflatten(
            0, batch.labels_TL.shape
        )

    def _logits(self, hidden_KD: torch.Tensor) -> torch.Tensor:
        return self.base.get_output_embeddings()(hidden_KD)

    def _answers(
        self, p_eos_C: torch.Tensor, decoding: DecodingConfig, silent: tuple, **inputs: Any
    ) -> Generated:
        """Generates from the `inputs`; `silent` token ids are left out of the answers."""
        sequences_CL = self.base.generate(**generate_arguments(decoding), **inputs)
        ids = [[t for t in row if t not in silent] for row in sequences_CL.tolist()]
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return Generated([text.strip() for text in texts], ids, p_eos_C)


def _rms(values: torch.Tensor) -> float:
    return values.detach().float().pow(2).mean().sqrt().item()


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
