"""BLIP-2's first stage: the Q-Former learns from pictures and their captions, before any language
model sees it (Li et al. 2023, section 3.2).

    patches, captions -> embeddings in a common space -> itc, contrast over the whole global batch
    patches -> captions                               -> lm, written from the queries

Of the paper's three objectives matching (itm) is not there: docs/first-stage.md says what it
brought. The captions of a picture share its target alike, as in ALBEF (Li et al. 2021), and are
never each other's negatives. Contrast needs all captions at once, a micro-batch holds a few: all
embeddings are made first without a graph, their gradients follow from the whole, and each
micro-batch carries its own on (Gao et al. 2021, GradCache). Legend: I images, T captions, G and H
those of the whole global batch, N rows, P patches, Q queries, L tokens, S = Q + L, E the common
space, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoTokenizer, Blip2QFormerConfig, Blip2QFormerModel

from harness.config import schema as settings
from harness.errors import ConfigError
from harness.machine.precision import Precision
from harness.model.batch import Batch
from harness.model.bridge import MAX_PROMPT, QFormer, calibrate_norm, start_linear_layers
from harness.model.language.loss import Kept, LossOutput, weighted_loss
from harness.model.language.quantise import load_tokenizer
from harness.model.language.wording import refuse_endless
from harness.model.places import Found
from harness.model.pretrained import loading, quiet_transformers
from harness.model.products import use_products
from harness.model.start import KEY
from harness.model.vlm import VisionLanguageModel, VLMConfig

COMMON_WIDTH = 256  # of the space of itc, as in BLIP-2
TEMPERATURE = 0.07  # where the learned one begins
NO_WORD = -1  # the padding of words, whatever a tokenizer pads with
OF_OUR_OWN = 2  # token ids behind the tokenizer's: [CLS], [DEC]

Gather = Callable[[torch.Tensor], torch.Tensor]


class TextQFormer(QFormer):
    """A Q-Former with its text side: words pass the queries' self-attention, and a feed-forward of
    their own.
    """

    embeddings: Any  # a ModuleDict

    def _make(self, sizes: dict[str, Any], config: settings.BridgeConfig, vocabulary: int) -> None:
        self.qformer = Blip2QFormerModel(Blip2QFormerConfig(**sizes, use_qformer_text_input=True))
        named = {"word_embeddings": vocabulary + OF_OUR_OWN, "position_embeddings": MAX_PROMPT}
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding(rows, config.width) for name, rows in named.items()}
        )
        for embedding in self.embeddings.values():
            nn.init.normal_(embedding.weight, std=0.02)

    def words(self, ids_NL: torch.Tensor, patches_NPD: torch.Tensor | None = None) -> torch.Tensor:
        """Returns states_NLD of words, which end with NO_WORD: without patches each sees all; with
        them each sees the queries, which see no word, and the words before it.
        """
        places_L = torch.arange(ids_NL.shape[1], device=ids_NL.device)
        embedded_NSD = self.embeddings["word_embeddings"](ids_NL.clamp(min=0))
        embedded_NSD = embedded_NSD + self.embeddings["position_embeddings"](places_L)
        queries = 0 if patches_NPD is None else self.tokens
        if queries:
            queries_NQD = self.query_tokens.expand(len(ids_NL), -1, -1)
            embedded_NSD = torch.cat([queries_NQD, embedded_NSD], dim=1)
        seen_NSS = F.pad(ids_NL >= 0, (queries, 0), value=True)[:, None, :]
        seen_NSS = seen_NSS.expand(-1, embedded_NSD.shape[1], -1)
        if queries:
            earlier_SS = torch.ones_like(seen_NSS[0]).tril()
            earlier_SS[:queries, :queries] = True
            seen_NSS = seen_NSS & earlier_SS
        states_NSD = self.qformer(
            query_embeds=embedded_NSD,
            query_length=queries,
            attention_mask=seen_NSS[:, None],
            encoder_hidden_states=patches_NPD,
        ).last_hidden_state
        return states_NSD[:, queries:]

    def start(self) -> dict[str, torch.Tensor]:
        named = {f"embeddings.{name}": p.data for name, p in self.embeddings.named_parameters()}
        return super().start() | named


class FirstStageBridge(nn.Module):
    """What the second stage takes over, `patch_norm` and `body`, and the heads of the objectives,
    which it does not.
    """

    question_aware = False
    embedding_rms = 1.0
    START_VALUES = ("patch_norm.weight", "patch_norm.bias")  # what `calibrate` sets

    def __init__(
        self,
        config: settings.BridgeConfig,
        patch_width: int,
        vocabulary: int,
        objective: Sequence[str],
    ):
        super().__init__()
        self.has_learnt_norm = False  # its patch_norm comes from an earlier first stage
        self.patch_norm = nn.LayerNorm(patch_width)
        self.body = TextQFormer(config, patch_width, vocabulary)
        width = config.width
        heads: dict[str, nn.Module] = {k: nn.Linear(width, COMMON_WIDTH) for k in ("image", "text")}
        self.log_scale = nn.Parameter(torch.tensor([-math.log(TEMPERATURE)]))
        if "lm" in objective:
            heads["words"] = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.LayerNorm(width))
        self.projection = nn.ModuleDict(heads)
        start_linear_layers(self)
        use_products(self)

    def forward(self, patches_IPD: torch.Tensor) -> torch.Tensor:
        """Returns states_IQD of queries that saw no word."""
        return self.body(self.normed(patches_IPD))

    def normed(self, patches_IPD: torch.Tensor) -> torch.Tensor:
        return self.patch_norm(patches_IPD.to(self.patch_norm.weight.dtype))

    def calibrate(self, patches_NPD: torch.Tensor) -> None:
        """Sets start values from the patches of some images, before the first step of a run."""
        if not self.has_learnt_norm:
            calibrate_norm(self.patch_norm, patches_NPD)

    def embed(
        self, patches_IPD: torch.Tensor, ids_TL: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns image_IQE, of the queries, and text_TE, of [CLS] that saw no picture, all of
        length 1.
        """
        image_IQE = self.projection["image"](self(patches_IPD))
        text_TE = self.projection["text"](self.body.words(ids_TL)[:, 0])
        return F.normalize(image_IQE.float(), dim=-1), F.normalize(text_TE.float(), dim=-1)

    def word_logits(self, hidden_KD: torch.Tensor) -> torch.Tensor:
        """Returns logits_KV, by the word embeddings themselves."""
        words_VD = self.body.embeddings["word_embeddings"].weight
        return F.linear(self.projection["words"](hidden_KD), words_VD)


class Vocabulary(nn.Module):
    """A tokenizer in the place of a language model: that of what the Q-Former starts from, else
    the language model's, of which nothing else is read.
    """

    begins = None  # no decoder, which would answer from some token

    def __init__(self, parts: settings.ModelConfig):
        """Raises ConfigError."""
        super().__init__()
        start = parts.bridge.init_from
        if start is None:
            given = load_tokenizer(parts.lm, "none")
        else:
            with loading(KEY, start, "give a BERT with its tokenizer"), quiet_transformers():
                given = AutoTokenizer.from_pretrained(start)
        if given.eos_token_id is None:  # BERT's ends a text by [SEP]
            given.eos_token = given.sep_token
        refuse_endless(given, start or parts.lm.id, KEY if start else "model.lm.id")
        self.tokenizer: Any = given
        self.size = len(given)
        self.cls = self.size if given.cls_token_id is None else given.cls_token_id
        self.dec = self.size + 1

    def hash(self) -> str:
        """Returns the sha256 of its tokens."""
        tokens = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(str(tokens).encode()).hexdigest()


def refuse_no_captions(batch: Batch) -> None:
    """Raises ConfigError for a question, or for a text without a picture."""
    for context, image in zip(batch.contexts, batch.image_of_C.tolist(), strict=True):
        record = context.record
        if context.text.task != "caption" or image < 0:
            raise ConfigError(
                f"train.objective: a first stage knows captions of pictures alone, and {record.key}"
                f" of {record.dataset} {record.split} holds a question or no picture: take another "
                "set"
            )


class Embedded(NamedTuple):
    """A micro-batch after the first pass, which keeps no graph."""

    patches_IPD: torch.Tensor
    image_IQE: torch.Tensor
    text_TE: torch.Tensor


class Portion(NamedTuple):
    """A micro-batch's part in the loss of the whole global batch: its share of itc, the gradients
    of itc by its embeddings and (a share) by the scale, and the target tokens of all.
    """

    patches_IPD: torch.Tensor
    word_weight: torch.Tensor
    loss: torch.Tensor
    image_IQE: Any
    text_TE: Any
    log_scale: Any


class FirstStageModel(VisionLanguageModel):
    """A vision tower, where there are no features, and the Q-Former with its text side."""

    bridge: Any
    lm: Any
    is_first_stage = True

    @classmethod
    def _base_hash(cls, parts: settings.ModelConfig) -> str:
        return Vocabulary(parts).hash()

    @classmethod
    def _find_base(cls, saved: VLMConfig, folder: Path, given: str | Path | None) -> Found:
        """The tokenizer is saved with the model."""
        saved.model["bridge"]["init_from"] = None
        saved.model["lm"]["gguf_file"] = None
        return Found(str(folder), saved.lm_hash, None)

    @classmethod
    def _trained_parts(
        cls, own: VLMConfig, parts: settings.ModelConfig, precision: Precision
    ) -> tuple[Any, Any]:
        lm = Vocabulary(parts)
        width = own.encoder["width"]
        return FirstStageBridge(parts.bridge, width, lm.size, own.objective), lm

    def _words(self, first: int, batch: Batch) -> torch.Tensor:
        """Returns the words of the captions, their end included, behind a token of our own."""
        ids_TL = batch.labels_TL.masked_fill(batch.weight_TL == 0, NO_WORD)
        return F.pad(ids_TL, (1, 0), value=first)

    @torch.no_grad()
    def embedded(self, batch: Batch) -> Embedded:
        """Makes the first pass."""
        patches_IPD = self.patch_tokens(batch)
        with self.precision.autocast("bridge"):
            made = self.bridge.embed(patches_IPD, self._words(self.lm.cls, batch))
        return Embedded(patches_IPD, *made)

    def forward(self, batch: Batch, portion: Portion | None = None) -> LossOutput:
        """Returns the batch's part in the loss of the whole global batch, or its loss as a global
        batch of its own; `sum_T` holds the parts of the objectives, in their order.
        """
        image_T = batch.image_of_C[batch.context_of_T]
        if portion is None:
            alone_I = torch.arange(batch.images, device=image_T.device)
            weight = batch.weight.clamp(min=1e-8)
            portion = self.portions([self.embedded(batch)], [alone_I], [image_T], weight)[0]
        with self.precision.autocast("bridge"):
            words_TL = self._words(self.lm.cls, batch)
            made = self.bridge.embed(portion.patches_IPD, words_TL)
            carried = (made[0] * portion.image_IQE).sum() + (made[1] * portion.text_TE).sum()
            carried = carried + (self.bridge.log_scale * portion.log_scale).sum()
            # the share's value, and its gradients
            told = [carried - carried.detach() + portion.loss]
            if "lm" in self.config.objective:
                told.append(self._captioning(portion, batch) / portion.word_weight)
        parts = torch.stack(told)
        return LossOutput(parts.sum(), parts.new_ones(()), parts.detach(), parts.new_ones(()))

    def _captioning(self, portion: Portion, batch: Batch) -> torch.Tensor:
        patches_IPD = self.bridge.normed(portion.patches_IPD)

        kept = []
        for rows, part in batch.target_groups(whole=False):
            patches_TPD = patches_IPD[part.image_of_C[part.context_of_T]]
            states_TLD = self.bridge.body.words(self._words(self.lm.dec, part)[:, :-1], patches_TPD)
            kept.append(Kept(rows, part, states_TLD.flatten(0, 1).index_select(0, rows.kept_K)))
        smoothing = self.label_smoothing if self.training else 0.0
        return weighted_loss(kept, batch, self.bridge.word_logits, smoothing, whole=False).sum

    def portions(
        self,
        embedded: Sequence[Embedded],
        pictures_I: Sequence[torch.Tensor],
        pictures_T: Sequence[torch.Tensor],
        word_weight: torch.Tensor,
        *,
        gather: Gather = lambda rows: rows,
        ranks: int = 1,
    ) -> list[Portion]:
        """Returns each micro-batch's part in the loss of the whole global batch.

        Pictures have numbers, the same on every rank: those of the images and of each caption; a
        filler has none. `gather` returns the rows of all ranks, those of this one with their graph.
        """
        scale: Any = self.bridge.log_scale.detach().clone().requires_grad_()
        images = [each.image_IQE for each in embedded]
        texts = [each.text_TE for each in embedded]
        smoothing = self.label_smoothing if self.training else 0.0
        with torch.enable_grad():
            for leaf in (*images, *texts):
                leaf.requires_grad_()
            own = (
                [each[: len(numbers)] for each, numbers in zip(images, pictures_I, strict=True)],
                [each[: len(numbers)] for each, numbers in zip(texts, pictures_T, strict=True)],
            )
            rows = [gather(torch.cat(list(part))) for part in (*own, pictures_I, pictures_T)]
            loss = contrast(rows, scale, smoothing)
        loss.backward()
        shares = ranks * len(embedded)
        loss = loss.detach() / shares
        of_scale = scale.grad / shares
        return [
            Portion(patches_IPD, word_weight, loss, image.grad, text.grad, of_scale)
            for patches_IPD, image, text in embedded
        ]

    def save_pretrained(  # type: ignore[override]  # as the base's own
        self, save_directory: str | Path, state: Mapping[str, torch.Tensor] | None = None, **_: Any
    ) -> None:
        """Writes config.json, the trained weights and the tokenizer."""
        super().save_pretrained(save_directory, state)
        self.tokenizer.save_pretrained(save_directory)


def contrast(
    rows: Sequence[torch.Tensor], log_scale: torch.Tensor, label_smoothing: float = 0.0
) -> torch.Tensor:
    """Returns itc in nats, of image_GQE, text_HE and the numbers of their pictures: the mean of two
    cross entropies, of the captions of each picture and of the pictures of each caption, told by
    the cosine of the caption and the query that is nearest to it.
    """
    image_GQE, text_HE, picture_G, picture_H = rows
    sim_GH = log_scale.exp() * similarity(image_GQE, text_HE)
    own_GH = (picture_G[:, None] == picture_H).float()
    of_images = own_GH / own_GH.sum(dim=1, keepdim=True)
    of_texts = (own_GH / own_GH.sum(dim=0)).T
    nats = F.cross_entropy(sim_GH, of_images, label_smoothing=label_smoothing)
    return (nats + F.cross_entropy(sim_GH.T, of_texts, label_smoothing=label_smoothing)) / 2


def similarity(image_IQE: torch.Tensor, text_TE: torch.Tensor) -> torch.Tensor:
    """Returns cosine_IT, of each caption and the query that is nearest to it."""
    return torch.einsum("iqe,te->iqt", image_IQE, text_TE).amax(dim=1)
