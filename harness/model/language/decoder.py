"""GPT-2 behind the seam of language models: loss and generation over a grouped batch.

A row is [image tokens][prompt tokens][BOS][target]. What stands before the target runs once per
context, and its keys and values serve all targets of the context. With `cross_attention` the row
holds no image tokens: every block looks at them through a layer of its own (Flamingo's way: Alayrac
et al. 2022, section 2.2). Legend: N bridge rows, Q image tokens, C contexts, T targets, S positions
before the target, L target tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, GPT2LMHeadModel

from harness.config.schema import DecodingConfig, LanguageModelConfig
from harness.errors import ConfigError
from harness.model.batch import Batch, padding_id
from harness.model.bridge import BridgeOutput
from harness.model.language import quantise
from harness.model.language.loss import Generated, LossOutput, partitioned, weighted_loss

# in the names of what cross-attention adds: h.0.crossattention.c_attn.weight,
# h.0.ln_cross_attn.bias
NEW = "cross"
DROPOUTS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


class DecoderLanguage(nn.Module):
    """Any GPT2LMHeadModel by hub id or folder, in 4 bits or not, with LoRA or not, with
    cross-attention or not.
    """

    def __init__(
        self, config: LanguageModelConfig, *, dtype=torch.float32, compute_dtype=torch.float32
    ):
        super().__init__()
        self.config = config
        new = NEW if config.cross_attention else None
        fields = dict.fromkeys(DROPOUTS, config.dropout) | {
            "add_cross_attention": config.cross_attention
        }
        base, self.tokenizer = quantise.load(
            config, GPT2LMHeadModel, fields, new=new, dtype=dtype, compute_dtype=compute_dtype
        )
        if new:
            for block in base.transformer.h:
                # As Flamingo's gates, which are 0 at first: training starts from the text model as
                # it was.
                nn.init.zeros_(block.crossattention.c_proj.weight)
                nn.init.zeros_(block.crossattention.c_proj.bias)
        self.lm = quantise.tune(base, config, new)

    @property
    def base(self) -> GPT2LMHeadModel:
        """The model of transformers, whatever is wrapped around it."""
        return self.lm.get_base_model() if hasattr(self.lm, "get_base_model") else self.lm

    @property
    def width(self) -> int:
        return self.base.config.n_embd

    @property
    def embedding_rms(self) -> float:
        """Root mean square of the word embeddings that image tokens stand among; 1 where they are
        attended to.
        """
        weight = self.base.transformer.wte.weight
        if weight.is_meta or self.config.cross_attention:
            return 1.0
        return weight.detach().float().pow(2).mean().sqrt().item()

    def loss(self, image: BridgeOutput, batch: Batch, label_smoothing: float = 0.0) -> LossOutput:
        """Cross entropy of `labels_TL`, weighted by `weight_TL`; logits are made only where a
        weight is not 0.

        Raises ConfigError for rows longer than the model's positions.
        """
        embeds_CSD, mask_CS = self._prefix(image, batch, bos=self.config.bos == "always")
        self._check_length(embeds_CSD.shape[1] + batch.labels_TL.shape[1])
        decode = self._decoder(embeds_CSD, mask_CS, image)
        return weighted_loss(
            decode, batch, self.base.lm_head, label_smoothing, whole=partitioned(self)
        )

    def _prefix(
        self, image: BridgeOutput, batch: Batch, *, bos: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """embeds_CSD and mask_CS of what stands before the target, padded on the left."""
        ids_CL, mask_CS = batch.prompt_ids_CL, batch.prompt_mask_CL
        if bos:
            ids_CL = nn.functional.pad(ids_CL, (0, 1), value=self._bos)
            mask_CS = nn.functional.pad(mask_CS, (0, 1), value=True)
        embeds_CSD = self.base.transformer.wte(ids_CL)
        if not self.config.cross_attention:
            tokens_CQD = image.tokens_NQD[image.token_row_of_C].to(embeds_CSD.dtype)
            embeds_CSD = torch.cat([tokens_CQD, embeds_CSD], dim=1)
            mask_CS = nn.functional.pad(mask_CS, (tokens_CQD.shape[1], 0), value=True)
        order_CS = mask_CS.int().argsort(dim=1, stable=True)
        mask_CS = mask_CS.gather(1, order_CS)
        # An empty row has nothing to say its first word from: its last, padded position is let in.
        mask_CS[:, -1] |= ~mask_CS.any(dim=1)
        return embeds_CSD.gather(1, order_CS[..., None].expand_as(embeds_CSD)), mask_CS

    @property
    def _bos(self) -> int:
        bos = self.base.config.bos_token_id
        return self.base.config.eos_token_id if bos is None else bos

    def _check_length(self, longest: int) -> None:
        if longest > (most := self.base.config.n_positions):
            raise ConfigError(
                f"model.lm.id: {self.config.id!r} has {most} positions, and image tokens, prompt and target need "
                f"{longest}: lower data.max_prompt_tokens, data.max_target_tokens or generate.*.max_new_tokens"
            )

    def _decoder(
        self, embeds_CSD: torch.Tensor, mask_CS: torch.Tensor, image: BridgeOutput
    ) -> Callable[[Batch], torch.Tensor]:
        """Reads what stands before the targets; gives hidden_TLD, of the position before each
        label, for a batch.
        """
        gpt2, tokens_CQD = self.base.transformer, self._attended(image)
        before = None
        if (
            not gpt2.gradient_checkpointing
        ):  # which drops caches: then every target has its context before it
            before = gpt2(
                inputs_embeds=embeds_CSD,
                attention_mask=mask_CS,
                position_ids=_places(mask_CS),
                encoder_hidden_states=tokens_CQD,
                past_key_values=self._cache(image),
                use_cache=True,
            )

        def decode(batch: Batch) -> torch.Tensor:
            context_of_T, length = batch.context_of_T, batch.labels_TL.shape[1]
            # The last label is read by nobody; one column there must be, so that all ranks run the
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
        """What cross-attention looks at, by context; None for a prefix model, and where there is no
        image.
        """
        if not self.config.cross_attention or not image.tokens_NQD.shape[1]:
            return None
        return image.tokens_NQD[image.token_row_of_C].to(self.base.transformer.wte.weight.dtype)

    def _cache(self, image: BridgeOutput) -> DynamicCache | EncoderDecoderCache:
        """An empty cache of words; keys and values of image tokens lie in it, made once per bridge
        row.
        """
        if not self.config.cross_attention:
            return DynamicCache()
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        if image.tokens_NQD.shape[1]:
            for index, block in enumerate(self.base.transformer.h):
                attention = block.crossattention
                keys_and_values = attention.c_attn(image.tokens_NQD).split(self.width, dim=2)
                keys, values = (
                    part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)[
                        image.token_row_of_C
                    ]
                    for part in keys_and_values
                )
                cache.cross_attention_cache.update(keys, values, index)
                cache.is_updated[index] = True
        return cache

    @torch.no_grad()
    def generate(self, image: BridgeOutput, batch: Batch, decoding: DecodingConfig) -> Generated:
        """Greedy or beam search, one answer per context. Raises ConfigError as `loss` does."""
        embeds_CSD, mask_CS = self._prefix(image, batch, bos=True)
        self._check_length(embeds_CSD.shape[1] + decoding.max_new_tokens)
        eos, pad = self.tokenizer.eos_token_id, padding_id(self.tokenizer)
        attended = (
            {}
            if (tokens_CQD := self._attended(image)) is None
            else {"encoder_hidden_states": tokens_CQD}
        )
        first = self.base.transformer(
            inputs_embeds=embeds_CSD,
            attention_mask=mask_CS,
            position_ids=_places(mask_CS),
            use_cache=False,
            **attended,
        )
        p_eos_C = self.base.lm_head(first.last_hidden_state[:, -1]).float().softmax(dim=-1)[:, eos]
        sequences_CL = self.base.generate(
            inputs_embeds=embeds_CSD,
            attention_mask=mask_CS.long(),
            max_new_tokens=decoding.max_new_tokens,
            min_new_tokens=decoding.min_new_tokens or None,
            num_beams=decoding.beams,
            length_penalty=decoding.length_penalty,
            do_sample=False,
            eos_token_id=eos,
            pad_token_id=pad,
            **attended,
        )
        ids = [[t for t in row if t not in (eos, pad)] for row in sequences_CL.tolist()]
        texts = [
            text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ]
        return Generated(texts, ids, p_eos_C)


def _places(mask_CS: torch.Tensor) -> torch.Tensor:
    """Position ids: how many positions before it are seen."""
    return (mask_CS.long().cumsum(dim=1) - 1).clamp(min=0)


def _rows(
    cache: DynamicCache | EncoderDecoderCache, rows: torch.Tensor
) -> DynamicCache | EncoderDecoderCache:
    """The cache with these rows of it, in this order."""
    if isinstance(cache, EncoderDecoderCache):
        return EncoderDecoderCache(
            _rows(cache.self_attention_cache, rows), _rows(cache.cross_attention_cache, rows)
        )
    picked = DynamicCache()
    for index, layer in enumerate(cache.layers):
        picked.update(layer.keys[rows], layer.values[rows], index)
    return picked
