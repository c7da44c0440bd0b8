"""Flan-T5 behind the seam of language models: loss and generation over a grouped batch.

Encoder input is [image tokens][prompt tokens], once per context; the decoder runs once per target.
Legend: C contexts, T targets, S encoder positions, L target tokens, K kept (weighted) tokens, D
width.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from harness.config.schema import DecodingConfig, LanguageModelConfig
from harness.errors import ConfigError
from harness.model.batch import Batch
from harness.model.bridge import BridgeOutput
from harness.model.language import quantise
from harness.model.language.loss import Generated, LossOutput, partitioned, weighted_loss


class T5Language(nn.Module):
    """Any T5ForConditionalGeneration by hub id or folder, in 4 bits or not, with LoRA or not."""

    def __init__(
        self, config: LanguageModelConfig, *, dtype=torch.float32, compute_dtype=torch.float32
    ):
        super().__init__()
        base, self.tokenizer = quantise.load(
            config,
            T5ForConditionalGeneration,
            {"dropout_rate": config.dropout},
            dtype=dtype,
            compute_dtype=compute_dtype,
        )
        if (depth := base.config.num_layers) != base.config.num_decoder_layers:
            # it would train, and fail in transformers' cache at the first answer
            raise ConfigError(
                f"model.lm.id: {config.id!r} has {base.config.num_decoder_layers} decoder layers and {depth} encoder "
                "layers: transformers cannot generate with such a T5, use one with as many of both"
            )
        if self.tokenizer is None and not _scales_output(base.config):
            # The files of such a T5 hold two matrices; without them transformers >= 5.20 ties every
            # T5's.
            base.lm_head.weight = nn.Parameter(
                torch.empty_like(base.lm_head.weight), requires_grad=False
            )
        self.lm = quantise.tune(base, config)

    @property
    def base(self) -> T5ForConditionalGeneration:
        """The model of transformers, whatever is wrapped around it."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    t5 = base

    @property
    def width(self) -> int:
        return self.t5.config.d_model

    @property
    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings, the scale that the encoder is used to."""
        weight = self.t5.shared.weight
        return 1.0 if weight.is_meta else weight.detach().float().pow(2).mean().sqrt().item()

    def encode(self, image: BridgeOutput, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """states_CSD and mask_CS of [image tokens][prompt tokens]."""
        words_CLD = self.t5.shared(batch.prompt_ids_CL)
        tokens_CQD = image.tokens_NQD[image.token_row_of_C].to(words_CLD.dtype)
        embeds_CSD = torch.cat([tokens_CQD, words_CLD], dim=1)
        seen_CQ = torch.ones(tokens_CQD.shape[:2], dtype=torch.bool, device=tokens_CQD.device)
        mask_CS = torch.cat([seen_CQ, batch.prompt_mask_CL], dim=1)
        # An empty row (no image, no prompt) leaves the softmax undefined: its first, padded
        # position is let in.
        mask_CS[:, 0] |= ~mask_CS.any(dim=1)
        states_CSD = self.t5.encoder(
            inputs_embeds=embeds_CSD, attention_mask=mask_CS
        ).last_hidden_state
        return states_CSD, mask_CS

    def loss(self, image: BridgeOutput, batch: Batch, label_smoothing: float = 0.0) -> LossOutput:
        """Cross entropy of `labels_TL`, weighted by `weight_TL`; logits are made only where a
        weight is not 0.
        """
        states_CSD, mask_CS = self.encode(image, batch)
        # Checkpointing drops caches. Nothing else decides, so that the ranks of a partitioned model
        # ask for its weights
        # in the same order whatever their batches hold.
        attended = None if self.t5.decoder.gradient_checkpointing else self._attended(states_CSD)

        def decode(part: Batch) -> torch.Tensor:
            cache = None if attended is None else _cache(attended, part.context_of_T)
            return self.t5.decoder(
                input_ids=self.t5._shift_right(part.labels_TL),
                encoder_hidden_states=states_CSD[part.context_of_T],
                encoder_attention_mask=mask_CS[part.context_of_T],
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state

        return weighted_loss(decode, batch, self._logits, label_smoothing, whole=partitioned(self))

    def _logits(self, hidden_KD: torch.Tensor) -> torch.Tensor:
        if _scales_output(self.t5.config):
            hidden_KD = hidden_KD * self.width**-0.5
        return self.t5.lm_head(hidden_KD)

    def _attended(self, states_CSD: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values CHSD of the encoder states by layer, once per context: T5 makes them for
        every target row.
        """
        made = []
        for block in self.t5.decoder.block:
            attention = block.layer[1].EncDecAttention
            shape = (*states_CSD.shape[:2], attention.n_heads, attention.key_value_proj_dim)
            made.append(
                tuple(
                    make(states_CSD).view(shape).transpose(1, 2)
                    for make in (attention.k, attention.v)
                )
            )
        return made

    @torch.no_grad()
    def generate(self, image: BridgeOutput, batch: Batch, decoding: DecodingConfig) -> Generated:
        """Greedy or beam search, one answer per context."""
        states_CSD, mask_CS = self.encode(image, batch)
        t5 = self.t5
        start = t5.config.decoder_start_token_id
        start_C1 = torch.full(
            (len(states_CSD), 1), start, dtype=torch.long, device=states_CSD.device
        )
        first = t5(
            encoder_outputs=BaseModelOutput(last_hidden_state=states_CSD),
            attention_mask=mask_CS,
            decoder_input_ids=start_C1,
            use_cache=False,
        )
        p_eos_C = first.logits[:, 0].float().softmax(dim=-1)[:, t5.config.eos_token_id]
        sequences_CL = t5.generate(
            encoder_outputs=BaseModelOutput(last_hidden_state=states_CSD),
            attention_mask=mask_CS,
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens or None,
            num_beams=decoding.beams,
            length_penalty=decoding.length_penalty,
            do_sample=False,
        )
        ids = [
            [t for t in row if t not in (start, t5.config.eos_token_id, t5.config.pad_token_id)]
            for row in sequences_CL.tolist()
        ]
        texts = [
            text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ]
        return Generated(texts, ids, p_eos_C)


def _cache(
    attended: list[tuple[torch.Tensor, torch.Tensor]], context_of_T: torch.Tensor
) -> EncoderDecoderCache:
    """No words yet, and what the rows of these contexts attend to."""
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for index, (keys_CHSD, values_CHSD) in enumerate(attended):
        cache.cross_attention_cache.update(
            keys_CHSD[context_of_T], values_CHSD[context_of_T], index
        )
        cache.is_updated[index] = True
    return cache


def _scales_output(config) -> bool:
    """T5 v1.0 scales the decoder's output before a tied `lm_head`; the name of the switch changed
    in transformers 5.
    """
    return bool(getattr(config, "scale_decoder_outputs", config.tie_word_embeddings))
