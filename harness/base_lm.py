"""Tokenizer and text-only training of a small T5 or GPT-2: the offline base language model, and the
text-only floor.

Sets of shards in, a folder in the hub's own format out. The model reads prompts and writes answers
and never sees an image, so its score is what the words alone give: the honest floor for every model
built on it.
"""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from harness.config.schema import Config, LanguageModelConfig
from harness.data.collate import Collator, drawn, most_common
from harness.data.prompts import prompt, template
from harness.evaluate.predict import select
from harness.model.batch import Batch, Context
from harness.model.bridge import BridgeOutput
from harness.model.pretrained import quiet_transformers
from harness.model.vlm import LANGUAGES
from harness.train.schedule import learning_rate
from shards.loader import Loader
from shards.read import Sample


def train_tokenizer(
    texts: Sequence[str], folder: Path, vocabulary: int = 4000
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer with T5's special tokens (pad 0, EOS 1, unknown 2; `$A </s>`), saved as
    `AutoTokenizer` reads it.

    BPE and not T5's Unigram: of a few hundred distinct words Unigram keeps no whole one, and
    prompts are twice as long.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\n", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=list(string.ascii_letters + string.digits + string.punctuation),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=512,
    )
    fast.save_pretrained(folder)
    return fast


def train_byte_tokenizer(
    texts: Sequence[str], folder: Path, vocabulary: int = 4000
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2's: <|endoftext|> is BOS and EOS, nothing pads, no text
    gets a token added.
    """
    tokenizer, end = Tokenizer(models.BPE()), "<|endoftext|>"
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[end], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=end,
        eos_token=end,
        unk_token=end,
        model_max_length=_POSITIONS,
    )
    fast.save_pretrained(folder)
    return fast


def pairs_of(sets: Sequence[str], config: Config) -> dict[Context, Counter[str]]:
    """Every distinct prompt of sets of shards (in its first record), and how often each target
    follows it.

    Without an image, texts that are equal are the same example: 34,761 questions of easy-VQA are
    107 prompts.
    """
    loader = Loader(sets, global_batch=256, shuffle=False, decode=no_image)
    contexts: dict[tuple[str, str], Context] = {}
    pairs: dict[Context, Counter[str]] = {}
    for _, samples in loader.iterate(epochs=1):
        for record in (sample.record for sample in samples if sample.record):
            for text in record.texts:
                words = prompt(text.task, getattr(config.prompts, text.task), text.prompt)
                context = contexts.setdefault((text.task, words), Context(record, text, words))
                # As in training with images: of a question the most common answer, of a caption
                # every one.
                targets = text.targets if text.task == "caption" else [most_common(text.targets)]
                pairs.setdefault(context, Counter()).update(targets)
    return pairs


def no_image(sample: Sample) -> np.ndarray:
    """In place of an image's pixels: the text-only model never gets to see any."""
    return _NOTHING


_NOTHING = np.zeros((1, 1, 3), np.uint8)
_POSITIONS = 512


def without_images(batch: Batch, width: int) -> BridgeOutput:
    return BridgeOutput(
        torch.zeros(1, 0, width), torch.zeros(len(batch.prompt_ids_CL), dtype=torch.long)
    )


def make(
    sets: Sequence[str],
    out: Path,
    config: Config,
    *,
    kind: Literal["t5", "gpt2"] = "t5",
    d_model: int = 128,
    layers: int = 2,
    heads: int = 4,
    d_ff: int = 512,
    vocabulary: int = 4000,
    steps: int = 200,
    prompts_a_step: int = 48,
    peak: float = 5e-4,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> Path:
    """Trains tokenizer and model on the texts of `sets` alone and saves both in `out`. The seed is
    `config.seed`.

    The `peak` learning rate is low on purpose: a model made with a higher one gives the same
    answers from the words, and learns to use image tokens far more slowly later (docs/log.md).
    """
    out.mkdir(parents=True, exist_ok=True)
    pairs = pairs_of(sets, config)
    # The template of a task that these sets do not have must have its words too.
    words = {template("caption", config.prompts.caption), template("vqa", config.prompts.vqa)}
    texts = [
        *words,
        *(c.prompt for c in pairs),
        *dict.fromkeys(t for targets in pairs.values() for t in targets),
    ]
    tokenizer = {"t5": train_tokenizer, "gpt2": train_byte_tokenizer}[kind](texts, out, vocabulary)
    torch.manual_seed(config.seed)
    new = {"t5": _new_t5, "gpt2": _new_gpt2}[kind](
        _round_up(len(tokenizer), 64), d_model, layers, heads, d_ff
    )
    with quiet_transformers():
        new.save_pretrained(out)
    language = LANGUAGES[kind](LanguageModelConfig(kind=kind, id=str(out), tuning="full"))
    _train(language, pairs, config, steps, prompts_a_step, peak, progress)
    with quiet_transformers():
        language.lm.save_pretrained(out)
    return out


def _new_t5(vocabulary: int, d_model: int, layers: int, heads: int, d_ff: int) -> PreTrainedModel:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=vocabulary,
            d_model=d_model,
            d_kv=d_model // heads,
            d_ff=d_ff,
            num_layers=layers,
            num_decoder_layers=layers,
            num_heads=heads,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
            tie_word_embeddings=True,
        )
    )


def _new_gpt2(vocabulary: int, d_model: int, layers: int, heads: int, d_ff: int) -> PreTrainedModel:
    """With twice the layers: a decoder alone in the place of encoder and decoder."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=_POSITIONS,
            n_embd=d_model,
            n_layer=2 * layers,
            n_head=heads,
            n_inner=d_ff,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def _train(
    language: nn.Module,
    pairs,
    config: Config,
    steps: int,
    prompts_a_step: int,
    peak: float,
    progress,
) -> None:
    # A sound base, as published ones are: also a config with known mistakes makes none here.
    collate = Collator(language.tokenizer, config.data, config.prompts)
    # A prompt with very many targets (all captions have the same) is cut into units that fit into a
    # step.
    units = [
        (context, part)
        for context, targets in pairs.items()
        for part in _parts(sorted(targets.items()))
    ]
    schedule = config.train.model_copy(
        update={"learning_rate": peak, "schedule": "cosine", "warmup": 0.1}
    )
    optimizer = torch.optim.AdamW(language.parameters(), lr=peak, weight_decay=0.01)
    language.train()
    order: list[int] = []
    for step in range(steps):
        while len(order) < prompts_a_step:
            epoch = step * prompts_a_step // len(units)
            order += sorted(
                range(len(units)), key=lambda unit, e=epoch: drawn(config.seed, e, f"unit {unit}")
            )
        chosen, order = [units[index] for index in order[:prompts_a_step]], order[prompts_a_step:]
        batch = _batch(collate, chosen)
        out = language.loss(without_images(batch, language.width), batch)
        loss = out.sum / out.weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(language.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, steps)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, steps, loss.item())
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the text-only training ended with a loss of {loss.item()}")


def _batch(collate: Collator, units: Sequence[tuple[Context, Sequence[tuple[str, int]]]]) -> Batch:
    """Prompts with their targets, each target weighted by how often it follows its prompt."""
    rows = [
        (index, target, count) for index, (_, part) in enumerate(units) for target, count in part
    ]
    batch = collate.assemble(
        _NOTHING[None],
        [c for c, _ in units],
        [0] * len(units),
        [r[1] for r in rows],
        [r[0] for r in rows],
    )
    return replace(batch, weight_TL=batch.weight_TL * torch.tensor([[float(r[2])] for r in rows]))


@torch.no_grad()
def answer(
    folder: Path | str, sets: Sequence[str], config: Config, images_a_batch: int = 256
) -> dict[tuple[str, str], str]:
    """(record key, text id) -> what the text-only model says to every question or caption prompt of
    `sets`.
    """
    kind = json.loads(Path(folder, "config.json").read_text())["model_type"]
    language = LANGUAGES[kind](
        LanguageModelConfig(kind=kind, id=str(folder), tuning="frozen")
    ).eval()
    collate = Collator(language.tokenizer, config.data, config.prompts, training=False)
    loader = Loader(sets, global_batch=images_a_batch, shuffle=False, decode=no_image)
    said: dict[tuple[str, str], str] = {}
    # The model is deterministic and sees the prompt alone: each prompt is answered once.
    known: dict[str, str] = {}
    for _, samples in loader.iterate(epochs=1):
        if (batch := collate(samples)) is None:
            continue
        for task in ("caption", "vqa"):
            new = {
                c.prompt: i
                for i, c in enumerate(batch.contexts)
                if c.text.task == task and c.prompt not in known
            }
            if new:
                part = select(batch, list(new.values()))
                nothing = without_images(part, language.width)
                texts = language.generate(nothing, part, getattr(config.generate, task)).texts
                known.update(zip(new, texts, strict=True))
        for context in batch.contexts:
            said[context.record.key, context.text.id] = known[context.prompt]
    return said


def _parts(targets: list[tuple[str, int]], size: int = 8) -> list[list[tuple[str, int]]]:
    return [targets[i : i + size] for i in range(0, len(targets), size)]


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
