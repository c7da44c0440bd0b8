"""Tokenizer and text-only training of a small T5: the offline base language model, and the text-only floor.

Sets of shards in, a folder in the hub's own format out. The model reads prompts and writes answers and never sees an
image, so its score is what the words alone give: the honest floor for every model built on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from harness.batch import Batch, Collator
from harness.config import Config, LanguageModel
from harness.model.bridge import BridgeOutput
from harness.model.language.t5 import T5Language
from harness.prompts import prompt, template
from harness.train import learning_rate
from shards.loader import Loader
from shards.read import Sample


def train_tokenizer(texts: Sequence[str], folder: Path, vocabulary: int = 4000) -> PreTrainedTokenizerFast:
    """A T5-like Unigram tokenizer (pad 0, EOS 1, unknown 2; `$A </s>`), saved as `AutoTokenizer` reads it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\n", " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.UnigramTrainer(vocab_size=vocabulary, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )
    fast.save_pretrained(folder)
    return fast


def texts_of(sets: Sequence[str], config: Config) -> Iterator[str]:
    """Every prompt after its template, and every target, of sets of shards."""
    loader = Loader(sets, global_batch=256, shuffle=False, decode=no_image)
    for _, samples in loader.iterate(epochs=1):
        for sample in samples:
            for text in sample.record.texts if sample.record else ():
                yield prompt(text.task, getattr(config.prompts, text.task), text.prompt)
                yield from text.targets


def no_image(sample: Sample) -> np.ndarray:
    """In place of an image's pixels: the text-only model never gets to see any."""
    return np.zeros((1, 1, 3), np.uint8)


def without_images(batch: Batch, width: int) -> BridgeOutput:
    return BridgeOutput(torch.zeros(batch.images, 0, width), batch.image_of_C)


def make(
    sets: Sequence[str],
    out: Path,
    config: Config,
    *,
    d_model: int = 128,
    layers: int = 2,
    heads: int = 4,
    d_ff: int = 512,
    vocabulary: int = 4000,
    epochs: int = 1,
    images_a_step: int = 32,
    peak: float = 2e-3,
    progress: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> Path:
    """Trains tokenizer and model on the texts of `sets` alone and saves both in `out`. The seed is `config.seed`."""
    out.mkdir(parents=True, exist_ok=True)
    # Templates are rare or absent in the texts of captions, but every prompt must have its words.
    texts = [template("caption", config.prompts.caption), *texts_of(sets, config)]
    tokenizer = train_tokenizer(texts, out, vocabulary)
    torch.manual_seed(config.seed)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=_round_up(len(tokenizer), 64),
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
    t5.save_pretrained(out)
    language = T5Language(LanguageModel(id=str(out), tuning="full"))
    _train(language, sets, config, epochs, images_a_step, peak, progress)
    language.lm.save_pretrained(out)
    return out


def _train(language: T5Language, sets, config: Config, epochs, images_a_step, peak, progress) -> None:
    collate = Collator(language.tokenizer, config.data, config.prompts, config.seed)
    loader = Loader(sets, global_batch=images_a_step, seed=config.seed, decode=no_image)
    total = loader.steps_per_epoch * epochs
    schedule = config.train.model_copy(update={"learning_rate": peak, "schedule": "cosine", "warmup": 0.1})
    optimizer = torch.optim.AdamW(language.parameters(), lr=peak, weight_decay=0.01)
    language.train()
    for step, (state, samples) in enumerate(loader.iterate(epochs=epochs)):
        batch = collate(samples, state.epoch)
        if batch is None:
            continue
        out = language.loss(without_images(batch, language.width), batch)
        loss = out.sum / out.weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(language.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(schedule, step, total)
        optimizer.step()
        optimizer.zero_grad()
        progress(step + 1, total, loss.item())
    if not math.isfinite(loss.item()):
        raise RuntimeError(f"the text-only training ended with a loss of {loss.item()}")


@torch.no_grad()
def answer(
    folder: Path | str, sets: Sequence[str], config: Config, images_a_batch: int = 256
) -> dict[tuple[str, str], str]:
    """(record key, text id) -> what the text-only model says to every question or caption prompt of `sets`."""
    language = T5Language(LanguageModel(id=str(folder), tuning="frozen")).eval()
    collate = Collator(language.tokenizer, config.data, config.prompts, training=False)
    loader = Loader(sets, global_batch=images_a_batch, shuffle=False, decode=no_image)
    said: dict[tuple[str, str], str] = {}
    # The model is deterministic and sees the prompt alone: each prompt is answered once.
    known: dict[str, str] = {}
    for _, samples in loader.iterate(epochs=1):
        batch = collate(samples)
        new = {c.prompt: i for i, c in enumerate(batch.contexts) if c.prompt not in known} if batch else {}
        if new:
            rows = torch.tensor(list(new.values()))
            part = batch.contexts_at(rows)
            task = batch.contexts[rows[0]].text.task
            texts = language.generate(without_images(part, language.width), part, getattr(config.generate, task)).texts
            known.update(zip(new, texts, strict=True))
        for context in batch.contexts if batch else ():
            said[context.record.key, context.text.id] = known[context.prompt]
    return said


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
