"""What packed targets are worth: one training step of a decoder over the same captions, two ways.

    python benchmarks/packed.py [--lm FOLDER] [--images 4] [--steps 5] [--json FILE]

unpacked: a row for each caption with image tokens and prompt of its own; packed: the captions of a
picture in one row behind one prefix. Without --lm a Llama of SmolLM2-135M's shape with random
weights. The ways take turns, so that a busy machine slows both alike; losses must agree, or the
program stops. One thread unless OMP_NUM_THREADS says otherwise.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from grouped import step
from transformers import LlamaConfig, LlamaForCausalLM

from harness import base_lm
from harness.config.schema import Config, LanguageModelConfig, ModelConfig
from harness.data.collate import Collator
from harness.machine.precision import choose
from harness.model.batch import Batch
from harness.model.pretrained import quiet_transformers
from harness.model.vlm import VisionLanguageModel
from harness.report.pictures import markdown_table
from shards.read import Sample
from shards.record import Record, Text

CAPTIONS = (
    "A black dog is running through the deep white snow with a stick .",
    "Two children in red shirts play with a ball on the grass .",
    "A man climbs a steep rock face above the blue sea .",
    "People stand in front of a large building in the city at night .",
    "A girl in a pink dress goes up the stairs of a wooden house .",
)
PATCHES = 49
WIDTH = 1280
ENCODER = {
    "kind": "efficientnet_lite0",
    "id": "features",
    "hash": "0" * 64,
    "tokens": PATCHES,
    "width": WIDTH,
    "image_size": 224,
}
# of SmolLM2-135M
SHAPE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def unpacked(batch: Batch) -> Batch:
    """The same targets, each behind a prefix of its own; images are still encoded once."""
    contexts = batch.context_of_T
    return replace(
        batch,
        prompt_ids_CL=batch.prompt_ids_CL[contexts],
        prompt_mask_CL=batch.prompt_mask_CL[contexts],
        features_IPD=batch.features_IPD[batch.image_of_C[contexts]],
        image_of_C=torch.arange(len(contexts)),
        context_of_T=torch.arange(len(contexts)),
    ).indexed()


def random_model(folder: Path, vocabulary: int) -> None:
    """Writes a Llama of SmolLM2-135M's shape, with a tokenizer that keeps the captions' words."""
    base_lm.train_byte_tokenizer(list(CAPTIONS), folder, 1000)
    torch.manual_seed(0)
    with quiet_transformers():
        LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, **SHAPE)).save_pretrained(folder)


def batch_of(model: VisionLanguageModel, config: Config, images: int) -> Batch:
    rng = np.random.default_rng(0)
    text = Text("t", "caption", CAPTIONS)
    samples = []
    for number in range(images):
        features = rng.normal(size=(PATCHES, WIDTH)).astype(np.float16)
        record = Record(f"{number}", "d", "s", f"{number}", (text,))
        samples.append(Sample(record, features, "safetensors", 0, number))
    made = Collator(model.tokenizer, config.data, config.prompts)(samples)
    assert made is not None
    return made.indexed()


def measured(folder: str, precision: Any, images: int, steps: int, tuning: Any) -> dict[str, Any]:
    """Returns captions a second of both ways, the median of `steps` turns."""
    lm = LanguageModelConfig(kind="decoder", id=folder, tuning=tuning)
    config = Config(name="packed", model=ModelConfig(lm=lm))
    policy = choose(precision, torch.device("cpu"))
    model = VisionLanguageModel.build(config, ENCODER, precision=policy).train()
    packed = batch_of(model, config, images)
    ways = {"unpacked": unpacked(packed), "packed": packed}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    losses = {}
    for turn in range(steps + 1):
        for name, batch in ways.items():
            took, losses[name] = step(model, batch)
            seconds[name] += [took] if turn else []  # the first turn warms up
    apart = abs(losses["packed"] - losses["unpacked"])
    if apart > (1e-4 if precision == "fp32" else 2e-2) * losses["unpacked"]:
        raise SystemExit(f"the losses differ: {losses}")
    captions = len(packed.labels_TL)
    rates = {name: captions / median(took) for name, took in seconds.items()}
    return {
        "precision": precision,
        "captions/s": rates,
        "times as many": rates["packed"] / rates["unpacked"],
        "loss": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lm", help="a folder; without it a random Llama")
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--tuning", default="lora", choices=("lora", "qlora", "full"))
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--json", type=Path, help="where the figures are written too")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        if given.lm is None:
            random_model(Path(made), 49_152)
        found = [
            measured(given.lm or made, precision, given.images, given.steps, given.tuning)
            for precision in given.precision
        ]
    hardware = (
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__}"
    )
    print(f"{hardware};\n{given.images} pictures of 5 captions, 32 image tokens, {given.tuning}\n")
    rows = []
    for one in found:
        figures = (*one["captions/s"].values(), one["times as many"])
        rows.append([one["precision"], *(f"{figure:.2f}" for figure in figures)])
    print(markdown_table(rows, ["captions a second in", "unpacked", "packed", "times as many"]))
    if given.json:
        given.json.write_text(json.dumps({"hardware": hardware, "ways": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
