"""Flan-T5 as a language model of ours: loss and generation over a grouped batch.

Encoder input is [image tokens][prompt tokens], once per context; the decoder runs once per target.
Legend: C contexts, T targets, S encoder positions, L target tokens, K kept (weighted) tokens,
H heads, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, T5ForConditionalGeneration
from transformers.activations import NewGELUActivation
from transformers.modeling_outputs import BaseModelOutput

from harness.config.schema import DecodingConfig
from harness.errors import ConfigError
from harness.model.batch import Batch
from harness.model.bridge import BridgeOutput
from harness.model.language.interface import LanguageModel, attending_cache
from harness.model.language.loss import Generated, Kept
from harness.model.pretrained import without_weights


class T5Language(LanguageModel):
    """Any T5ForConditionalGeneration."""

    has_encoder = True

    def _described(self, found: Any) -> tuple[type[PreTrainedModel], dict[str, Any]]:
        if not found.is_encoder_decoder:
            raise ValueError(f"it is of kind {found.model_type}, model.lm.kind is t5")
        return T5ForConditionalGeneration, {"dropout_rate": self.config.dropout}

    def _prepare(self, base: Any) -> None:
        depth = base.config.num_layers
        if depth != base.config.num_decoder_layers:
            # it would train, and fail in transformers' cache at the first answer
            raise ConfigError(
                f"model.lm.id: {self.config.id!r} has {base.config.num_decoder_layers} decoder "
                f"layers and {depth} encoder layers: transformers cannot generate with such a T5, "
                "use one with as many of both"
            )
        for module in base.modules():
            if isinstance(getattr(module, "act", None), NewGELUActivation):
                module.act = _Gelu()
        if without_weights() and not _scales_output(base.config):
            # The files of such a T5 hold two matrices; without them transformers >= 5.20 ties every
            # T5's.
            base.lm_head.weight = nn.Parameter(
                torch.empty_like(base.lm_head.weight), requires_grad=False
            )

    t5 = LanguageModel.base

    def encode(self, image: BridgeOutput, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns states_CSD and mask_CS of [image tokens][prompt tokens]."""
        words_CLD = self.t5.shared(batch.prompt_ids_CL)
        tokens_CQD = image.by_context(words_CLD.dtype)
        embeds_CSD = torch.cat([tokens_CQD, words_CLD], dim=1)
        count = tokens_CQD.shape[1]
        seen_CQ = image.has_picture[:, None].expand(-1, count)
        mask_CS = torch.cat([seen_CQ, batch.prompt_mask_CL], dim=1)
        # An empty row (no image, no prompt) leaves the softmax undefined: its first, padded
        # position behind the image tokens is let in.
        mask_CS[:, count] |= ~mask_CS.any(dim=1)
        states_CSD = self.t5.encoder(
            inputs_embeds=embeds_CSD, attention_mask=mask_CS
        ).last_hidden_state
        return states_CSD, mask_CS

    def _kept(self, image: BridgeOutput, batch: Batch, whole: bool) -> Iterator[Kept]:
        states_CSD, mask_CS = self.encode(image, batch)
        # Checkpointing drops caches. Nothing else decides, so that the ranks of a partitioned model
        # ask for its weights in the same order whatever their batches hold.
        attended = None if self.t5.decoder.gradient_checkpointing else self._attended(states_CSD)

        for rows, part in batch.target_groups(whole):
            cache = None if attended is None else attending_cache(attended, part.context_of_T)
            hidden_TLD = self.t5.decoder(
                input_ids=self.t5._shift_right(part.labels_TL),
                encoder_hidden_states=states_CSD[part.context_of_T],
                encoder_attention_mask=mask_CS[part.context_of_T],
                past_key_values=cache,
                use_cache=cache is not None,
            ).last_hidden_state
            yield Kept(rows, part, hidden_TLD.flatten(0, 1).index_select(0, rows.kept_K))

    def _logits(self, hidden_KD: torch.Tensor) -> torch.Tensor:
        if _scales_output(self.t5.config):
            hidden_KD = hidden_KD * self.width**-0.5
        return super()._logits(hidden_KD)

    def _attended(self, states_CSD: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Returns keys and values CHSD of the encoder states by layer, once per context: T5 makes
        them for every target row.
        """
        made = []
        for block in self.t5.decoder.block:
            attention = block.layer[1].EncDecAttention
            shape = (*states_CSD.shape[:2], attention.n_heads, attention.key_value_proj_dim)
            keys_CHSD = attention.k(states_CSD).view(shape).transpose(1, 2)
            values_CHSD = attention.v(states_CSD).view(shape).transpose(1, 2)
            made.append((keys_CHSD, values_CHSD))
        return made

    def generation_inputs(self, image: BridgeOutput, batch: Batch) -> dict[str, Any]:
        states_CSD, mask_CS = self.encode(image, batch)
        encoded = BaseModelOutput(last_hidden_state=states_CSD)
        return {"encoder_outputs": encoded, "attention_mask": mask_CS}

    @torch.no_grad()
    def generate(self, image: BridgeOutput, batch: Batch, decoding: DecodingConfig) -> Generated:
        inputs = self.generation_inputs(image, batch)
        mask_CS = inputs["attention_mask"]
        config = self.t5.config
        start_C1 = torch.full(
            (len(mask_CS), 1),
            config.decoder_start_token_id,
            dtype=torch.long,
            device=mask_CS.device,
        )
        first = self.t5(**inputs, decoder_input_ids=start_C1, use_cache=False)
        return self._answers(
            first.logits[:, 0].float().softmax(dim=-1)[:, config.eos_token_id],
            decoding,
            (config.decoder_start_token_id, config.eos_token_id, config.pad_token_id),
            **inputs,
        )


class _Gelu(NewGELUActivation):
    """Flan-T5's activation as one kernel, equal within rounding. In less than fp32 it stays as it
    was: its cube, for which autocast goes to fp32 on a GPU, keeps what follows there too.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if input.dtype == torch.float32:
            return nn.functional.gelu(input, approximate="tanh")
        return super().forward(input)


def _scales_output(config: Any) -> bool:
    """Returns whether the decoder's output is scaled before a tied `lm_head`, as in T5 v1.0; the
    name of the switch changed in transformers 5.
    """
    return bool(getattr(config, "scale_decoder_outputs", config.tie_word_embeddings))
