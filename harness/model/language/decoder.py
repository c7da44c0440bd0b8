"""GPT-2, a decoder alone, as a language model of ours: loss and generation over a grouped batch.

A row is [image tokens][prompt tokens][BOS][target]. What stands before the target runs once per
context, and its keys and values serve all targets of the context. With `cross_attention` the row
holds no image tokens: every block looks at them through a layer of its own (Flamingo's way: Alayrac
et al. 2022, section 2.2). Legend: N bridge rows, Q image tokens, C contexts, T targets, S positions
before the target, L target tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, GPT2LMHeadModel

from harness.config.schema import DecodingConfig
from harness.errors import ConfigError
from harness.model.batch import Batch, padding_id
from harness.model.bridge import BridgeOutput
from harness.model.language.interface import LanguageModel, attending_cache
from harness.model.language.loss import Generated

DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


class DecoderLanguage(LanguageModel):
    """Any GPT2LMHeadModel, with cross-attention or not."""

    architecture = GPT2LMHeadModel

    def _fields(self) -> dict[str, Any]:
        dropouts = dict.fromkeys(DROPOUTS, self.config.dropout)
        return dropouts | {"add_cross_attention": self.config.cross_attention}

    def _prepare(self, base: Any) -> None:
        if self.config.cross_attention:
            for block in base.transformer.h:
                # As Flamingo's gates, which are 0 at first: training starts from the text model as
                # it was.
                nn.init.zeros_(block.crossattention.c_proj.weight)
                nn.init.zeros_(block.crossattention.c_proj.bias)
                block.crossattention.register_forward_hook(_of_pictures_alone, with_kwargs=True)

    def _prefix(
        self, image: BridgeOutput, batch: Batch, *, bos: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns embeds_CSD and mask_CS of what stands before the target, padded on the left."""
        ids_CL = batch.prompt_ids_CL
        mask_CS = batch.prompt_mask_CL
        if bos:
            ids_CL = nn.functional.pad(ids_CL, (0, 1), value=self.begins)
            mask_CS = nn.functional.pad(mask_CS, (0, 1), value=True)
        embeds_CSD = self.base.transformer.wte(ids_CL)
        if not self.config.cross_attention:
            tokens_CQD = image.by_context(embeds_CSD.dtype)
            embeds_CSD = torch.cat([tokens_CQD, embeds_CSD], dim=1)
            seen_CQ = image.has_picture[:, None].expand(-1, tokens_CQD.shape[1])
            mask_CS = torch.cat([seen_CQ, mask_CS], dim=1)
        order_CS = mask_CS.int().argsort(dim=1, stable=True)
        mask_CS = mask_CS.gather(1, order_CS)
        # An empty row has nothing to say its first word from: its last, padded position is let in.
        mask_CS[:, -1] |= ~mask_CS.any(dim=1)
        return embeds_CSD.gather(1, order_CS[..., None].expand_as(embeds_CSD)), mask_CS

    @property
    def begins(self) -> int:
        bos = self.base.config.bos_token_id
        return self.base.config.eos_token_id if bos is None else bos

    def _check_length(self, longest: int) -> None:
        most = self.base.config.n_positions
        if longest > most:
            raise ConfigError(
                f"model.lm.id: {self.config.id!r} has {most} positions, and image tokens, prompt "
                f"and target need {longest}: lower data.max_prompt_tokens, data.max_target_tokens "
                "or generate.*.max_new_tokens"
            )

    def _decoder(self, image: BridgeOutput, batch: Batch) -> Callable[[Batch], torch.Tensor]:
        embeds_CSD, mask_CS = self._prefix(image, batch, bos=self.bos_in_training)
        self._check_length(embeds_CSD.shape[1] + batch.labels_TL.shape[1])
        gpt2 = self.base.transformer
        tokens_CQD = self._attended(image)
        before = None
        # Checkpointing drops caches: then every target has its context before it.
        if not gpt2.gradient_checkpointing:
            before = gpt2(
                inputs_embeds=embeds_CSD,
                attention_mask=mask_CS,
                position_ids=_places(mask_CS),
                encoder_hidden_states=tokens_CQD,
                past_key_values=self._cache(image),
                use_cache=True,
            )

        def decode(batch: Batch) -> torch.Tensor:
            context_of_T = batch.context_of_T
            length = batch.labels_TL.shape[1]
            # No word follows the last label; one column there must be, so that all ranks run the
            # blocks as often.
            words_TLD = gpt2.wte(batch.labels_TL[:, : max(1, length - 1)])
            seen_TL = torch.ones(words_TLD.shape[:2], dtype=torch.bool, device=mask_CS.device)
            mask_TS = torch.cat([mask_CS[context_of_T], seen_TL], dim=1)
            places_TS = _places(mask_TS)
            attended = None if tokens_CQD is None else tokens_CQD[context_of_T]
            if before is None:
                out = gpt2(
                    inputs_embeds=torch.cat([embeds_CSD[context_of_T], words_TLD], dim=1),
                    attention_mask=mask_TS,
                    position_ids=places_TS,
                    encoder_hidden_states=attended,
                    use_cache=False,
                )
                return out.last_hidden_state[:, embeds_CSD.shape[1] - 1 :][:, :length]
            after_TLD = gpt2(
                inputs_embeds=words_TLD,
                attention_mask=mask_TS,
                position_ids=places_TS[:, embeds_CSD.shape[1] :],
                encoder_hidden_states=attended,
                past_key_values=_rows(before.past_key_values, context_of_T),
                use_cache=True,
            ).last_hidden_state
            first_TD = before.last_hidden_state[context_of_T, -1]
            return torch.cat([first_TD[:, None], after_TLD[:, : length - 1]], dim=1)

        return decode

    def _attended(self, image: BridgeOutput) -> torch.Tensor | None:
        """Returns what cross-attention looks at, by context, zeros for one without a picture; None
        for a prefix model, and where there is no image token.
        """
        if not self.config.cross_attention or not image.tokens_NQD.shape[1]:
            return None
        tokens_CQD = image.by_context(self.base.transformer.wte.weight.dtype)
        return tokens_CQD * image.has_picture[:, None, None]

    def _cache(self, image: BridgeOutput) -> DynamicCache | EncoderDecoderCache:
        """Returns a cache without words; keys and values of image tokens lie in it, made once per
        bridge row.
        """
        if not self.config.cross_attention:
            return DynamicCache()
        keys_and_values = []
        for block in self.base.transformer.h if image.tokens_NQD.shape[1] else ():
            attention = block.crossattention
            made = attention.c_attn(image.tokens_NQD).split(self.width, dim=2)
            keys_and_values.append(
                [part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in made]
            )
        return attending_cache(keys_and_values, image.rows)

    def generation_inputs(self, image: BridgeOutput, batch: Batch) -> dict[str, Any]:
        embeds_CSD, mask_CS = self._prefix(image, batch, bos=True)
        inputs = {
            "inputs_embeds": embeds_CSD,
            "attention_mask": mask_CS.long(),
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": padding_id(self.tokenizer),
        }
        if (tokens_CQD := self._attended(image)) is not None:
            inputs["encoder_hidden_states"] = tokens_CQD
        return inputs

    @torch.no_grad()
    def generate(self, image: BridgeOutput, batch: Batch, decoding: DecodingConfig) -> Generated:
        inputs = self.generation_inputs(image, batch)
        self._check_length(inputs["inputs_embeds"].shape[1] + decoding.max_new_tokens)
        eos = inputs["eos_token_id"]
        seen = {name: inputs[name] for name in inputs if not name.endswith("_token_id")}
        places_CS = _places(inputs["attention_mask"])
        first = self.base.transformer(**seen, position_ids=places_CS, use_cache=False)
        return self._answers(
            self._logits(first.last_hidden_state[:, -1]).float().softmax(dim=-1)[:, eos],
            decoding,
            (eos, inputs["pad_token_id"]),
            **inputs,
        )


def _of_pictures_alone(
    attention: nn.Module, given: tuple, named: dict[str, Any], output: tuple
) -> tuple:
    """Takes what cross-attention adds from rows without a picture, whose image tokens are zeros."""
    tokens_BQD = named["encoder_hidden_states"]
    has_picture_B = tokens_BQD[:, 0].any(dim=-1)
    return output[0] * has_picture_B[:, None, None], *output[1:]


def _places(mask_CS: torch.Tensor) -> torch.Tensor:
    """Returns position ids: how many positions before it are seen."""
    return (mask_CS.long().cumsum(dim=1) - 1).clamp(min=0)


def _rows(
    cache: DynamicCache | EncoderDecoderCache, rows: torch.Tensor
) -> DynamicCache | EncoderDecoderCache:
    """Returns the cache with these rows of it, in this order."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(
            _rows(cache.self_attention_cache, rows), _rows(cache.cross_attention_cache, rows)
        )
    picked = DynamicCache()
    layers: list[Any] = cache.layers  # of keys and values, one a block
    for index, layer in enumerate(layers):
        picked.update(layer.keys[rows], layer.values[rows], index)
    return picked
