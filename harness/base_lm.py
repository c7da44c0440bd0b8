"""Tokenizer and text-only training of a small T5 or GPT-2: the offline base model, and the floor.

Sets of shards in, a folder in the hub's own format out. The model reads prompts and writes answers
and never sees an image, so its score is what the words alone give: the honest floor for every model
built on it.
"""

from __future__ import annotations

import json
import math
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
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
    """Returns a BPE tokenizer with T5's special tokens, saved as `AutoTokenizer` reads it.

    They are pad 0, EOS 1, unknown 2; a text is `$A </s>`. BPE and not T5's Unigram: of a few
    hundred distinct words Unigram keeps no whole one, and prompts are twice as long.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Replace("\n", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    alphabet = list(string.ascii_letters + string.digits + string.punctuation)
    named = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return _trained(tokenizer, texts, folder, vocabulary, alphabet, named)


def train_byte_tokenizer(
    texts: Sequence[str], folder: Path, vocabulary: int = 4000
) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer as GPT-2's, saved as `AutoTokenizer` reads it.

    <|endoftext|> is BOS and EOS, nothing pads, no text gets a token added.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    named = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    return _trained(tokenizer, texts, folder, vocabulary, alphabet, named)


def _trained(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    folder: Path,
    vocabulary: int,
    alphabet: list[str],
    special: dict[str, str],
) -> PreTrainedTokenizerFast:
    """Learns the merges and saves the tokenizer; special tokens come first, in their order."""
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=_POSITIONS, **special
    )
    fast.save_pretrained(folder)
    return fast


def pairs_of(sets: Sequence[str], config: Config) -> dict[Context, Counter[str]]:
    """Returns every distinct prompt (in its first record), and how often each target follows it.

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
    """Returns what stands in place of pixels: the text-only model never gets to see any."""
    return _NOTHING


_NOTHING = np.zeros((1, 1, 3), np.uint8)
_POSITIONS = 512
Unit = tuple[Context, Sequence[tuple[str, int]]]  # a prompt, targets with their counts


def without_images(batch: Batch, width: int) -> BridgeOutput:
    """Returns no image tokens for every context."""
    rows_C = torch.zeros(len(batch.prompt_ids_CL), dtype=torch.long)
    return BridgeOutput(torch.zeros(1, 0, width), rows_C)


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
    targets = dict.fromkeys(target for counts in pairs.values() for target in counts)
    texts = [*words, *(context.prompt for context in pairs), *targets]
    train = train_tokenizer if kind == "t5" else train_byte_tokenizer
    rows = -(-len(train(texts, out, vocabulary)) // 64) * 64  # a multiple of 64
    torch.manual_seed(config.seed)
    new = _new_model(kind, rows, d_model, layers, heads, d_ff)
    with quiet_transformers():
        new.save_pretrained(out)
    _train(kind, out, pairs, config, steps, prompts_a_step, peak, progress)
    return out


def _new_model(
    kind: Literal["t5", "gpt2"], vocabulary: int, d_model: int, layers: int, heads: int, d_ff: int
) -> PreTrainedModel:
    """Returns a model of random weights.

    A GPT-2 has twice the layers: a decoder alone stands in the place of encoder and decoder.
    """
    if kind == "gpt2":
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
    return T5ForConditionalGeneration(
        T5Config(  # type: ignore[call-arg]  # every config takes them, T5's own list has them not
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


def _train(
    kind: Literal["t5", "gpt2"],
    folder: Path,
    pairs: Mapping[Context, Counter[str]],
    config: Config,
    steps: int,
    prompts_a_step: int,
    peak: float,
    progress: Callable[[int, int, float], None],
) -> None:
    """Trains the model in a folder and saves it there."""
    language = LANGUAGES[kind](LanguageModelConfig(kind=kind, id=str(folder), tuning="full"))
    # A sound base, as published ones are: also a config with known mistakes makes none here.
    packs = kind != "t5"
    collate = Collator(language.tokenizer, config.data, config.prompts, packs=packs)
    units = _units(pairs)
    schedule = config.train.model_copy(
        update={"learning_rate": peak, "schedule": "cosine", "warmup": 0.1}
    )
    optimizer = torch.optim.AdamW(language.parameters(), lr=peak, weight_decay=0.01)
    language.train()
    order: list[int] = []
    for step in range(steps):
        while len(order) < prompts_a_step:
            epoch = step * prompts_a_step // len(units)
            draws = [drawn(config.seed, epoch, f"unit {unit}") for unit in range(len(units))]
            order += sorted(range(len(units)), key=draws.__getitem__)
        batch = _batch(collate, [units[index] for index in order[:prompts_a_step]])
        order = order[prompts_a_step:]
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
    with quiet_transformers():
        language.lm.save_pretrained(folder)


def _units(pairs: Mapping[Context, Counter[str]], size: int = 8) -> list[Unit]:
    """Returns prompts with at most `size` targets, so that they fit into a step.

    All captions have the same prompt.
    """
    units: list[Unit] = []
    for context, counts in pairs.items():
        targets = sorted(counts.items())
        units += [(context, targets[at : at + size]) for at in range(0, len(targets), size)]
    return units


def _batch(collate: Collator, units: Sequence[Unit]) -> Batch:
    """Returns prompts with their targets, each weighted by how often it follows its prompt."""
    contexts = [context for context, _ in units]
    targets = [target for _, counts in units for target, _ in counts]
    context_of_T = [index for index, (_, counts) in enumerate(units) for _ in counts]
    batch = collate.assemble(_NOTHING[None], contexts, [0] * len(units), targets, context_of_T)
    count_T1 = torch.tensor([[float(count)] for _, counts in units for _, count in counts])
    return replace(batch, weight_TL=batch.weight_TL * count_T1)


@torch.no_grad()
def answer(
    folder: Path | str, sets: Sequence[str], config: Config, images_a_batch: int = 256
) -> dict[tuple[str, str], str]:
    """Returns (record key, text id) -> what the text-only model says to every prompt of `sets`."""
    kind = json.loads(Path(folder, "config.json").read_text())["model_type"]
    own = LanguageModelConfig(kind=kind, id=str(folder), tuning="frozen")
    language = LANGUAGES[kind](own).eval()
    collate = Collator(language.tokenizer, config.data, config.prompts, training=False)
    loader = Loader(sets, global_batch=images_a_batch, shuffle=False, decode=no_image)
    answers: dict[tuple[str, str], str] = {}
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
            answers[context.record.key, context.text.id] = known[context.prompt]
    return answers
