"""Bridge: patch tokens -> language-model tokens. Q-Former, mean pooling or a linear projector, then
one projection.

A bridge row is an image; of a Q-Former that reads the question it is a context, an image with one
question. Legend: I images, N bridge rows, P patches, Q tokens a row, L prompt tokens, D width, C
contexts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import (
    Blip2QFormerConfig,
    Blip2QFormerModel,
    InstructBlipQFormerConfig,
    InstructBlipQFormerModel,
)

from harness.config.schema import BridgeConfig
from harness.errors import ConfigError
from harness.model.products import use_products

CALIBRATED_ON = 32  # images for start values, which are plenty: means and variances over patches
MAX_PROMPT = 512  # tokens that a question-aware Q-Former has positions for


@dataclass(frozen=True)
class BridgeOutput:
    """Image tokens, and which row of them each context reads: N = I, or N = C for a bridge that
    reads the question; -1: none, the context has no picture.
    """

    tokens_NQD: torch.Tensor
    token_row_of_C: torch.Tensor  # int64 in [-1, N)

    @property
    def has_picture(self) -> torch.Tensor:
        """(C,): which contexts read their image tokens; of the others these must have no effect."""
        return self.token_row_of_C >= 0

    @property
    def rows(self) -> torch.Tensor:
        """(C,): rows to index with, any at all for a context that reads none."""
        return self.token_row_of_C.clamp(min=0)

    def by_context(self, dtype: torch.dtype) -> torch.Tensor:
        """Returns tokens_CQD: each context's own row, a row to be masked where it has none."""
        return self.tokens_NQD[self.rows].to(dtype)

    def with_rows(self, row_of_C: torch.Tensor) -> BridgeOutput:
        """Returns the same tokens given to other contexts: the counterfactual of the image-use
        gate.
        """
        return replace(self, token_row_of_C=row_of_C)

    def without_tokens(self) -> BridgeOutput:
        """Returns the same contexts with no image token at all (out of distribution for a model
        trained with them).
        """
        return replace(self, tokens_NQD=self.tokens_NQD[:, :0])


class QFormer(nn.Module):
    """Learnable queries that look at the patch tokens (BLIP-2, Li et al. 2023, section 3.1).

    Question-aware ones also attend to the words of the prompt (InstructBLIP, Dai et al. 2023,
    section 2.3), which are the language model's token ids, with embeddings of the Q-Former's own:
    no second tokenizer.
    """

    qformer: Any  # of transformers

    def __init__(self, config: BridgeConfig, patch_width: int, vocabulary: int):
        super().__init__()
        self.tokens = config.query_tokens
        self.width = config.width
        self.query_tokens = nn.Parameter(
            torch.empty(1, config.query_tokens, config.width).normal_(std=0.02)
        )
        sizes: dict[str, Any] = {
            "hidden_size": config.width,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "intermediate_size": 4 * config.width,
            "cross_attention_frequency": config.cross_attention_frequency,
            "encoder_hidden_size": patch_width,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": config.dropout,
        }
        self._make(sizes, config, vocabulary)

    def _make(self, sizes: dict[str, Any], config: BridgeConfig, vocabulary: int) -> None:
        """Makes the layers."""
        if not config.question_aware:
            # The queries enter as embeddings: transformers' own word embeddings of a Q-Former are
            # not built.
            self.qformer = Blip2QFormerModel(
                Blip2QFormerConfig(**sizes, use_qformer_text_input=False)
            )
            return
        self.qformer = InstructBlipQFormerModel(
            InstructBlipQFormerConfig(
                **sizes,
                vocab_size=vocabulary,
                pad_token_id=None,
                max_position_embeddings=MAX_PROMPT,
            )
        )
        # What the last layer makes of the words reaches no output: it has no gradient to be
        # trained by.
        last = self.qformer.encoder.layer[-1]
        last.intermediate.requires_grad_(False)
        last.output.requires_grad_(False)

    def forward(self, patches_NPD: torch.Tensor, *prompts_NL: torch.Tensor) -> torch.Tensor:
        queries_NQD = self.query_tokens.expand(len(patches_NPD), -1, -1)
        words = {}
        if prompts_NL:
            ids_NL, mask_NL = prompts_NL
            if ids_NL.shape[1] > MAX_PROMPT:
                raise ConfigError(
                    f"data.max_prompt_tokens: a prompt has {ids_NL.shape[1]} tokens, a Q-Former "
                    f"reads {MAX_PROMPT}"
                )
            seen_NQ = torch.ones(queries_NQD.shape[:2], dtype=mask_NL.dtype, device=mask_NL.device)
            words = {"input_ids": ids_NL, "attention_mask": torch.cat([seen_NQ, mask_NL], dim=1)}
        states_NSD = self.qformer(
            query_embeds=queries_NQD, encoder_hidden_states=patches_NPD, **words
        ).last_hidden_state
        return states_NSD[:, : self.tokens]

    def start(self) -> dict[str, torch.Tensor]:
        """Returns its parameters by the names of a published BLIP-2's, for `start.start_from`."""
        named = {
            name.replace("embeddings.layernorm.", "layernorm."): p.data
            for name, p in self.qformer.named_parameters()
        }
        return {**named, "query_tokens": self.query_tokens.data}


class MeanPool(nn.Module):
    """One token a picture: the mean of its patches."""

    def __init__(self, config: BridgeConfig, patch_width: int, vocabulary: int):
        super().__init__()
        self.tokens = 1
        self.width = patch_width

    def forward(self, patches_IPD: torch.Tensor) -> torch.Tensor:
        return patches_IPD.mean(dim=1, keepdim=True)


class Linear(nn.Module):
    """Every patch as a token; the projection is all there is to learn."""

    def __init__(self, config: BridgeConfig, patch_width: int, vocabulary: int):
        super().__init__()
        self.tokens = None  # as many as patches
        self.width = patch_width

    def forward(self, patches_IPD: torch.Tensor) -> torch.Tensor:
        return patches_IPD


KINDS: dict[str, type[nn.Module]] = {"qformer": QFormer, "mean_pool": MeanPool, "linear": Linear}


def start_linear_layers(body: nn.Module) -> None:
    """Draws linear layers with the variance kept from layer to layer: BERT's fixed 0.02 starves a
    narrow Q-Former of the image.
    """
    for module in body.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)


@torch.no_grad()
def calibrate_norm(patch_norm: nn.LayerNorm, patches_NPD: torch.Tensor) -> None:
    """Gives each patch channel mean 0 and variance 1 over these images."""
    normed_NPD = nn.functional.layer_norm(patches_NPD.float(), patches_NPD.shape[-1:])
    normed_ND = normed_NPD.flatten(0, 1)
    std_D = normed_ND.std(dim=0)
    # quiet channels, mostly noise, are not blown up
    std_D = std_D.clamp(min=std_D.median().clamp(min=1e-6))
    patch_norm.weight.copy_(1 / std_D)
    patch_norm.bias.copy_(-normed_ND.mean(dim=0) / std_D)


class Projection(nn.Module):
    """A linear map to the width of the language model, about a mean that each token has of its own,
    at the embeddings' scale.
    """

    def __init__(self, width: int, tokens: int, lm_width: int, embedding_rms: float):
        super().__init__()
        self.linear = nn.Linear(width, lm_width)
        self.mean_QD = nn.Parameter(torch.zeros(tokens, lm_width))
        self.gain_D = nn.Parameter(torch.full((lm_width,), embedding_rms))

    def forward(self, tokens_NQD: torch.Tensor) -> torch.Tensor:
        return (self.linear(tokens_NQD) - self.mean_QD) * self.gain_D


class Bridge(nn.Module):
    """The way from patches_NPD to tokens_NQD at the LM's width and scale.

    What all pictures have in common (a few channels of CLIP's inner layers and of a convolution are
    a hundred times larger than the rest, and a query says much the same of every picture at its
    random start) drowns what tells them apart. `calibrate` takes it out by the start values of
    affine parameters that are there anyway, from data, as in Salimans & Kingma 2016 (weight
    normalisation), section 3: each patch channel, and each token, starts centred.
    """

    body: Any  # of KINDS
    # what `calibrate` sets
    START_VALUES = (
        *("patch_norm.weight", "patch_norm.bias"),
        *("projection.mean_QD", "projection.gain_D"),
    )

    def __init__(
        self,
        config: BridgeConfig,
        patch_width: int,
        lm_width: int,
        patches: int,
        embedding_rms: float,
        vocabulary: int = 0,
    ):
        """Takes as `vocabulary` how many token ids there are, for a Q-Former that reads the
        question.
        """
        super().__init__()
        self.question_aware = config.question_aware
        self.patch_norm = nn.LayerNorm(patch_width)
        self.body = KINDS[config.kind](config, patch_width, vocabulary)
        start_linear_layers(self.body)
        self.has_learnt_norm = False  # its patch_norm comes from a first stage
        self.projection = Projection(
            self.body.width, self.body.tokens or patches, lm_width, float(embedding_rms)
        )
        self.embedding_rms = float(embedding_rms)
        use_products(self)
        if config.trainable is not True:
            self.requires_grad_(False)
        if config.trainable == "projection":
            self.projection.requires_grad_(True)

    def forward(self, patches_NPD: torch.Tensor, *prompts_NL: torch.Tensor) -> torch.Tensor:
        """Maps patches to tokens; `prompts_NL` are ids and mask of each row's prompt, for a
        question-aware Q-Former alone.
        """
        normed_NPD = self.patch_norm(patches_NPD.to(self.patch_norm.weight.dtype))
        return self.projection(self.body(normed_NPD, *prompts_NL))

    @torch.no_grad()
    def calibrate(self, patches_NPD: torch.Tensor, *prompts_NL: torch.Tensor) -> None:
        """Sets start values from the patches of some images (32 are plenty), before the first step
        of a new run.

        Then, over these images, each patch channel has mean 0 and variance 1, each token has mean
        0, and the tokens' root mean square is that of the LM's embeddings: image tokens far outside
        it are one way to a loss near 10.
        """
        if not self.has_learnt_norm:
            calibrate_norm(self.patch_norm, patches_NPD)
        tokens_NQD = self.projection.linear(
            self.body(self.patch_norm(patches_NPD.float()), *prompts_NL)
        )
        # One image has no spread about its own mean: the tokens are then scaled and not centred.
        mean_QD = tokens_NQD.mean(dim=0) if len(tokens_NQD) > 1 else torch.zeros_like(tokens_NQD[0])
        self.projection.mean_QD.copy_(mean_QD)
        self.projection.gain_D.fill_(
            self.embedding_rms / (tokens_NQD - mean_QD).pow(2).mean().sqrt().clamp(min=1e-6)
        )
