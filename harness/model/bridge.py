"""Bridge: patch tokens -> language-model tokens. Q-Former, mean pooling or a linear projector, then one projection.

Legend: I images, N bridge rows, P patches, Q tokens a row, D width, C contexts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import Blip2QFormerConfig, Blip2QFormerModel

from harness.config import Bridge as BridgeConfig


@dataclass(frozen=True)
class BridgeOutput:
    """Image tokens, and which row of them each context reads: N = I for a bridge that does not read the question."""

    tokens_NQD: torch.Tensor
    token_row_of_C: torch.Tensor  # int64 in [0, N)

    def with_rows(self, row_of_C: torch.Tensor) -> BridgeOutput:
        """The same tokens given to other contexts: the counterfactual of the image-use gate."""
        return replace(self, token_row_of_C=row_of_C)

    def without_tokens(self) -> BridgeOutput:
        """The same contexts with no image token at all (out of distribution for a model trained with them)."""
        return replace(self, tokens_NQD=self.tokens_NQD[:, :0])


class QFormer(nn.Module):
    """Learnable queries that look at the patch tokens (BLIP-2, Li et al. 2023, section 3.1)."""

    def __init__(self, config: BridgeConfig, patch_width: int):
        super().__init__()
        self.tokens, self.width = config.query_tokens, config.width
        self.query_tokens = nn.Parameter(torch.empty(1, config.query_tokens, config.width).normal_(std=0.02))
        self.qformer = Blip2QFormerModel(
            Blip2QFormerConfig(
                hidden_size=config.width,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                intermediate_size=4 * config.width,
                cross_attention_frequency=config.cross_attention_frequency,
                encoder_hidden_size=patch_width,
                hidden_dropout_prob=config.dropout,
                attention_probs_dropout_prob=config.dropout,
                # The queries enter as embeddings: transformers' own word embeddings of a Q-Former are not built.
                use_qformer_text_input=False,
            )
        )

    def forward(self, patches_IPD: torch.Tensor) -> torch.Tensor:
        queries_IQD = self.query_tokens.expand(len(patches_IPD), -1, -1)
        return self.qformer(query_embeds=queries_IQD, encoder_hidden_states=patches_IPD).last_hidden_state


class MeanPool(nn.Module):
    """One token a picture: the mean of its patches."""

    def __init__(self, config: BridgeConfig, patch_width: int):
        super().__init__()
        self.tokens, self.width = 1, patch_width

    def forward(self, patches_IPD: torch.Tensor) -> torch.Tensor:
        return patches_IPD.mean(dim=1, keepdim=True)


class Linear(nn.Module):
    """Every patch is a token; the projection is all there is to learn."""

    def __init__(self, config: BridgeConfig, patch_width: int):
        super().__init__()
        self.tokens, self.width = None, patch_width  # as many tokens as patches

    def forward(self, patches_IPD: torch.Tensor) -> torch.Tensor:
        return patches_IPD


KINDS: dict[str, type[nn.Module]] = {"qformer": QFormer, "mean_pool": MeanPool, "linear": Linear}


class Bridge(nn.Module):
    """patches_IPD -> tokens_NQD at the LM's width and scale.

    Patch tokens are layer-normed first (CLIP's inner layers and a convolution's channels differ a hundredfold in size),
    and the projected tokens are brought to the root mean square of the LM's own embeddings: image tokens far outside
    that range are one way to a loss that stands near 10.
    """

    def __init__(self, config: BridgeConfig, patch_width: int, lm_width: int, embedding_rms: float):
        super().__init__()
        self.patch_norm = nn.LayerNorm(patch_width)
        self.body = KINDS[config.kind](config, patch_width)
        self.projection = nn.Linear(self.body.width, lm_width)
        self.token_norm = nn.LayerNorm(lm_width, elementwise_affine=False)
        self.register_buffer("embedding_rms", torch.tensor(float(embedding_rms)), persistent=False)
        if not config.trainable:
            self.requires_grad_(False)

    def forward(self, patches_IPD: torch.Tensor) -> torch.Tensor:
        patches_IPD = self.patch_norm(patches_IPD.to(self.patch_norm.weight.dtype))
        return self.token_norm(self.projection(self.body(patches_IPD))) * self.embedding_rms
