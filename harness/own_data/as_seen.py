"""A sample as a run of a config gets it: the picture's pixels, the prompt in its template, every
target's tokens with what they count in the loss, and what was cut.

By the run's own decoder and collator, so that what is shown is what is trained on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import PreTrainedTokenizerBase

from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.images import ImageDecoder
from harness.loading import tokenizer_of
from shards.manifest import Manifest
from shards.read import Sample


@dataclass(frozen=True)
class Tokens:
    """A text as its tokens, each with its weight in the loss (None: nothing is learnt of it), and
    the words behind the limit, which the model never gets.
    """

    words: str
    tokens: tuple[tuple[str, float | None], ...]
    cut: str


@dataclass(frozen=True)
class Asked:
    """A prompt, and all that is learnt as its answer."""

    prompt: Tokens
    targets: tuple[Tokens, ...]


@dataclass(frozen=True)
class Seen:
    """One sample as the model gets it."""

    picture: Image.Image | None
    about: str  # of the picture, or of the features in its place
    asked: tuple[Asked, ...]
    left_out: int  # captions and questions that epoch 0 does not draw


class AsSeen:
    """Samples of one set -> `Seen`, by the tokenizer and the limits of a config. Raises ConfigError
    for a tokenizer that cannot be loaded.

    A set of `data.dev` or `data.test` is seen as in evaluation, any other as in training.
    """

    def __init__(self, config: Config, manifest: Manifest) -> None:
        trained = [one for one in config.data.train if _same(one.path, manifest.folder)]
        scored = [one.path for one in (*config.data.dev, *config.data.test)]
        is_scored = any(_same(path, manifest.folder) for path in scored)
        self.is_training = bool(trained) or not is_scored
        self.collate = replace(
            Collator.of(config, tokenizer_of(config), self.is_training),
            loss_weights=tuple(one.loss_weight for one in trained[:1]),
        )
        self.decode = ImageDecoder.of(config.model.vision, config.data.max_image_pixels)

    def __call__(self, sample: Sample) -> Seen:
        """Raises ImageError or ShardError for what cannot be decoded."""
        values = self.decode(sample) if sample.known.has_picture else None
        asked = self._asked(replace(sample, payload=values, set_index=0))
        there = sum(
            len(text.targets) if text.task == "caption" else 1 for text in sample.known.texts
        )
        return Seen(
            None if values is None or values.ndim < 3 else Image.fromarray(values),
            _about(values),
            asked,
            there - sum(len(one.targets) for one in asked),
        )

    def _asked(self, sample: Sample) -> tuple[Asked, ...]:
        batch = self.collate([sample])
        assert batch is not None  # every record has something to learn
        data = self.collate.data
        words_T = [
            words for _, chosen in self.collate.drawn_texts(sample.known, 0) for words in chosen
        ]
        targets: list[list[Tokens]] = [[] for _ in batch.contexts]
        for row, words in enumerate(words_T):
            weights = [float(weight) for weight in batch.weight_TL[row]]
            found = self._tokens(
                words, batch.labels_TL[row].tolist(), weights, data.max_target_tokens
            )
            targets[int(batch.context_of_T[row])].append(found)
        prompts = [
            self._tokens(
                context.prompt,
                batch.prompt_ids_CL[place][batch.prompt_mask_CL[place]].tolist(),
                None,
                data.max_prompt_tokens,
            )
            for place, context in enumerate(batch.contexts)
        ]
        return tuple(map(Asked, prompts, map(tuple, targets)))

    def _tokens(
        self, words: str, row: Sequence[int], weights: Sequence[float] | None, limit: int
    ) -> Tokens:
        """Returns the tokens of a row of the batch that was made of `words`."""
        tokenizer = self.collate.tokenizer
        whole = tokenizer([words.strip()], add_special_tokens=False, verbose=False)["input_ids"][0]
        end = 1 if weights is not None or tokenizer("")["input_ids"] else 0
        length = min(len(whole) + end, limit) if words else 0
        shown = len(row) if weights and self.collate.loss_on_padding else length
        named = [label(tokenizer, number) for number in row[:shown]]
        cut = whole[limit - end :] if len(whole) + end > limit else []
        beside: Sequence[float | None] = weights or [None] * len(named)
        return Tokens(words, tuple(zip(named, beside, strict=False)), str(tokenizer.decode(cut)))


def _about(values: np.ndarray | None) -> str:
    """Says what a model sees of a picture."""
    if values is None:
        return "no picture: it gets no image tokens"
    size = " x ".join(map(str, values.shape[:2]))
    return f"{size} pixels" if values.ndim == 3 else f"features, {size} (patches x width)"


def _same(path: str, other: str) -> bool:
    """Tells whether two names lead to one folder, or are one URL."""
    return path == other or Path(path).resolve() == Path(other).resolve()


def label(tokenizer: PreTrainedTokenizerBase, number: int) -> str:
    """Returns how a token is shown: its characters, `▁` where it begins a word."""
    piece = str(tokenizer.convert_ids_to_tokens(number))
    text = str(tokenizer.decode([number])).strip()
    return ("▁" if piece[:1] in "▁Ġ" else "") + text if text else piece
