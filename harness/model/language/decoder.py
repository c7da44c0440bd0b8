"""Any decoder-only model of transformers (GPT-2, OPT, Llama, Qwen, Gemma, ...) as a language model
of ours: loss and generation over a grouped batch.

A row is [image tokens][prompt tokens][target], and the targets of one context, and the contexts of
one picture, share a row (packing.py). With `cross_attention`, of GPT-2 alone, the row holds no
image tokens: every block looks at them through a layer of its own (Flamingo's way: Alayrac et al.
2022, section 2.2). Legend: R rows, Q image tokens, W text positions, C contexts, S positions, K
kept tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from harness.config.schema import DecodingConfig
from harness.errors import ConfigError
from harness.model.batch import Batch, padding_id
from harness.model.bridge import BridgeOutput
from harness.model.language.interface import LanguageModel
from harness.model.language.loss import Generated, Kept
from harness.model.language.wording import Wording
from harness.model.packing import seen_before
from harness.model.pretrained import without_weights

# How far packed logits may be from those of a row alone, in their own spread: rounding is far
# below it even in bf16, another target that is seen far above.
TOLERANCE = 0.1


class DecoderLanguage(LanguageModel):
    """Any AutoModelForCausalLM with plain attention, with cross-attention or not."""

    def _described(self, found: Any) -> tuple[type[PreTrainedModel], dict[str, Any]]:
        known: Any = AutoModelForCausalLM._model_mapping
        kind = "gpt2" if self.config.cross_attention else self.config.kind
        other = kind == "gpt2" != found.model_type
        is_decoder = type(found) in known and found.get_text_config() is found
        if other or found.is_encoder_decoder or not is_decoder:
            why = " with cross_attention, which GPT-2 alone has" if kind != self.config.kind else ""
            raise ValueError(
                f"it is of kind {found.model_type}, model.lm.kind is {self.config.kind}{why}"
            )
        self._begins: int | None = None
        fields: dict[str, Any] = {}
        if found.model_type == "gpt2":
            # as its tokenizer would say, where there is none
            self._begins = found.eos_token_id if found.bos_token_id is None else found.bos_token_id
            fields["add_cross_attention"] = self.config.cross_attention
        for name, value in found.to_dict().items():
            if "drop" in name and isinstance(value, int | float):
                fields[name] = 0.0 if name == "layerdrop" else self.config.dropout
        return known[type(found)], fields

    def _prepare(self, base: Any) -> None:
        # What an answer is like is said by our config alone: some files ask for a penalty.
        base.generation_config = GenerationConfig()
        self._pad = 0
        if self._tokenizer is not None:
            self._begins = Wording(self._tokenizer).begins
            self._pad = padding_id(self._tokenizer)
        if self.config.cross_attention:
            for block in base.transformer.h:
                # As Flamingo's gates, which are 0 at first: training starts from the text model as
                # it was.
                nn.init.zeros_(block.crossattention.c_proj.weight)
                nn.init.zeros_(block.crossattention.c_proj.bias)
                block.crossattention.register_forward_hook(_of_pictures_alone, with_kwargs=True)
        elif not without_weights():
            self._check_packing(base)

    @torch.no_grad()
    def _check_packing(self, base: Any) -> None:
        """Raises ConfigError for a model that lets packed targets see each other, as a recurrent
        one does, or makes logits otherwise than by its head: tried on two targets of two words.
        """
        self.lm = base
        ids_14 = torch.tensor([[3, 4, 5, 6]], device=base.device)
        alone_2 = [base(input_ids=ids_14[:, [0, 1, last]]).logits[0, -1].float() for last in (2, 3)]
        seen_44 = torch.ones(4, 4, dtype=torch.bool, device=base.device).tril()
        seen_44[3, 2] = False
        try:
            hidden_4D = self._read(
                base.get_input_embeddings()(ids_14),
                seen_44[None],
                torch.tensor([[0, 1, 2, 2]], device=base.device),
            )[0]
            packed_2V = self._logits(hidden_4D[2:]).float()
            furthest = (packed_2V - torch.stack(alone_2)).abs().max() / packed_2V.std()
            # GPT-Neo's window counts columns of a row, which hold other targets too.
            works = bool(furthest < TOLERANCE) and not hasattr(base.config, "window_size")
        except (RuntimeError, TypeError, ValueError, IndexError):  # it takes no such mask
            works = False
        if not works:
            raise ConfigError(
                f"model.lm.id: {self.config.id!r} is a {base.config.model_type}, whose layers do "
                "not keep the targets of one row apart or whose logits are not its head's: take a "
                "decoder with plain causal attention, as GPT-2, OPT, Llama, Qwen2, Qwen3 or Gemma"
            )

    # ---- what stands where -----------------------------------------------------------------------

    @property
    def begins(self) -> int | None:
        return self._begins

    @property
    def _begins_answers(self) -> int | None:
        """As `begins`, or the BOS of the known mistake that training never shows."""
        if self.begins is not None or self.bos_in_training:
            return self.begins
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    def _check_length(self, longest: int) -> None:
        config = self.base.config
        most = getattr(config, "max_position_embeddings", None)
        # Within the window the layers that slide see as much as the others.
        window = getattr(config, "sliding_window", None)
        limits = [limit for limit in (most, window) if limit is not None]
        if limits and longest > min(limits):
            raise ConfigError(
                f"model.lm.id: {self.config.id!r} has {min(limits)} positions, and image tokens, "
                f"prompt and target need {longest}: lower data.max_prompt_tokens, "
                "data.max_target_tokens or generate.*.max_new_tokens"
            )

    def _attended(self, tokens_BQD: torch.Tensor, has_picture_B: torch.Tensor) -> dict[str, Any]:
        """Returns what cross-attention looks at, zeros where there is no picture; {} for a prefix
        model, and where there is no image token.
        """
        if not self.config.cross_attention or not tokens_BQD.shape[1]:
            return {}
        dtype = self.base.get_input_embeddings().weight.dtype
        return {"encoder_hidden_states": tokens_BQD.to(dtype) * has_picture_B[:, None, None]}

    def _read(
        self,
        embeds_RSD: torch.Tensor,
        seen_RSS: torch.Tensor,
        places_RS: torch.Tensor,
        **attended: torch.Tensor,
    ) -> torch.Tensor:
        """Returns hidden_RSD of rows in which each position sees others as `seen_RSS` says."""
        mask_R1SS = seen_RSS[:, None]
        base = self.base
        if base.config._attn_implementation != "sdpa":  # it adds the mask to its scores
            least = torch.finfo(embeds_RSD.dtype).min
            mask_R1SS = torch.where(mask_R1SS, 0.0, least).to(embeds_RSD.dtype)
        return base.base_model(
            inputs_embeds=embeds_RSD,
            attention_mask=mask_R1SS,
            position_ids=places_RS,
            use_cache=False,
            **attended,
        ).last_hidden_state

    # ---- loss ------------------------------------------------------------------------------------

    def _kept(self, image: BridgeOutput, batch: Batch, whole: bool) -> Iterator[Kept]:
        begins = self.begins if self.bos_in_training else None
        # Image tokens that were exchanged belong to contexts: those of a picture part then.
        packed = batch.packed(begins is not None, image.token_row_of_C is batch.image_of_C)
        embed = self.base.get_input_embeddings()
        begin_1 = batch.labels_TL.new_full((1,), begins or 0)
        ids_N = torch.cat([batch.prompt_ids_CL.flatten(), batch.labels_TL.flatten(), begin_1])
        words_RWD = embed(ids_N[packed.source_RW])
        tokens_RQD = image.tokens_NQD[image.rows[packed.context_R]]
        has_picture_R = image.has_picture[packed.context_R]
        attended = self._attended(tokens_RQD, has_picture_R)
        lead_RQD = tokens_RQD.to(words_RWD.dtype)
        if self.config.cross_attention or not tokens_RQD.shape[1]:
            # a position that is seen where there is no other
            has_picture_R = torch.zeros_like(has_picture_R)
            lead_RQD = words_RWD.new_zeros(len(words_RWD), 1, words_RWD.shape[2])
        padding_1D = embed(torch.full_like(begin_1, self._pad))
        lead_RQD = lead_RQD.where(has_picture_R[:, None, None], padding_1D)
        tokens = lead_RQD.shape[1]
        self._check_length(tokens + packed.longest)
        before_RW = has_picture_R[:, None] * tokens
        if packed.bare_RW is not None:
            before_RW = torch.maximum(before_RW, packed.bare_RW.long())
        places_RQ = torch.arange(tokens, device=before_RW.device).expand(len(lead_RQD), -1)
        hidden_RSD = self._read(
            torch.cat([lead_RQD, words_RWD], dim=1),
            seen_before(packed, tokens, has_picture_R),
            torch.cat([places_RQ, packed.place_RW + before_RW], dim=1),
            **attended,
        )
        told_K = packed.row_K * hidden_RSD.shape[1] + packed.column_K + tokens
        for rows, part in batch.target_groups(True):  # one
            yield Kept(rows, part, hidden_RSD.flatten(0, 1).index_select(0, told_K))

    def _logits(self, hidden_KD: torch.Tensor) -> torch.Tensor:
        logits_KV = super()._logits(hidden_KD)
        most = getattr(self.base.config, "final_logit_softcapping", None)  # Gemma 2
        return logits_KV if most is None else most * torch.tanh(logits_KV / most)

    # ---- generation ------------------------------------------------------------------------------

    def _prefix(self, image: BridgeOutput, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns embeds_CSD and mask_CS of what stands before the answers, padded on the left."""
        ids_CL = batch.prompt_ids_CL
        mask_CS = batch.prompt_mask_CL
        if (begins := self._begins_answers) is not None:
            ids_CL = nn.functional.pad(ids_CL, (0, 1), value=begins)
            mask_CS = nn.functional.pad(mask_CS, (0, 1), value=True)
        embeds_CSD = self.base.get_input_embeddings()(ids_CL)
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

    def generation_inputs(self, image: BridgeOutput, batch: Batch) -> dict[str, Any]:
        embeds_CSD, mask_CS = self._prefix(image, batch)
        return {
            "inputs_embeds": embeds_CSD,
            "attention_mask": mask_CS.long(),
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": padding_id(self.tokenizer),
            **self._attended(image.tokens_NQD[image.rows], image.has_picture),
        }

    @torch.no_grad()
    def generate(self, image: BridgeOutput, batch: Batch, decoding: DecodingConfig) -> Generated:
        inputs = self.generation_inputs(image, batch)
        self._check_length(inputs["inputs_embeds"].shape[1] + decoding.max_new_tokens)
        eos = inputs["eos_token_id"]
        seen = {name: inputs[name] for name in inputs if not name.endswith("_token_id")}
        # how many positions before it are seen
        places_CS = (inputs["attention_mask"].cumsum(dim=1) - 1).clamp(min=0)
        first = self.base.base_model(**seen, position_ids=places_CS, use_cache=True)
        cache = first.past_key_values
        cache.crop(-1)  # `generate` reads on from the last position, and reads the others no more
        cache.batch_repeat_interleave(decoding.beams)
        return self._answers(
            self._logits(first.last_hidden_state[:, -1]).float().softmax(dim=-1)[:, eos],
            decoding,
            (eos, inputs["pad_token_id"]),
            past_key_values=cache,
            **inputs,
        )


def _of_pictures_alone(
    attention: nn.Module, given: tuple, named: dict[str, Any], output: tuple
) -> tuple:
    """Takes what cross-attention adds from rows without a picture, whose image tokens are zeros."""
    tokens_BQD = named["encoder_hidden_states"]
    has_picture_B = tokens_BQD[:, 0].any(dim=-1)
    return output[0] * has_picture_B[:, None, None], *output[1:]
