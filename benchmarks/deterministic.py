"""The price of `train.deterministic`: one training step with it and without, in turns.

    python benchmarks/deterministic.py [--batch 16] [--steps 10]

A Q-Former of 2 layers and a T5 of 3 + 3 over random features, LoRA in 4 bits, on the GPU where
there is one; cuBLAS has the work space that is asked for in both ways. Losses and gradients of one
way must be the same bits at each turn: the last column counts the turns in which they were not.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from grouped import CAPTIONS
from transformers import T5Config, T5ForConditionalGeneration

from harness import base_lm
from harness.config.schema import (
    BridgeConfig,
    Config,
    LanguageModelConfig,
    ModelConfig,
    TrainConfig,
)
from harness.data.collate import Collator
from harness.machine.determinism import ask_for_the_same_bits, set_workspace
from harness.model.batch import Batch
from harness.model.pretrained import quiet_transformers
from harness.model.vlm import VisionLanguageModel
from harness.report.pictures import markdown_table
from shards.read import Sample
from shards.record import Record, Text

ENCODER = {"kind": "clip", "id": "none", "hash": "e" * 64, "tokens": 50, "width": 768}


def made(device: str) -> tuple[Config, VisionLanguageModel]:
    """The model, with an own language model at its random start."""
    with tempfile.TemporaryDirectory() as folder:
        base_lm.train_tokenizer(list(CAPTIONS), Path(folder), 128)
        sizes = {"d_model": 256, "d_kv": 64, "d_ff": 1024, "num_layers": 3, "num_heads": 4}
        lm = T5ForConditionalGeneration(T5Config(vocab_size=512, decoder_start_token_id=0, **sizes))
        with quiet_transformers():
            lm.save_pretrained(folder)
        config = Config(
            name="deterministic",
            model=ModelConfig(
                bridge=BridgeConfig(query_tokens=32, layers=2, width=256, heads=4),
                lm=LanguageModelConfig(id=folder, tuning="qlora"),
            ),
        )
        return config, VisionLanguageModel.build(config, ENCODER, device=device).train()


def batch_of(config: Config, model: VisionLanguageModel, images: int) -> Batch:
    """Random features, each with five captions."""
    shape = (images, ENCODER["tokens"], ENCODER["width"])
    features_IPD = np.random.default_rng(0).normal(size=shape).astype(np.float16)
    text = Text("t", "caption", CAPTIONS)
    samples = [
        Sample(Record(f"{n}", "d", "s", "i", (text,)), features_PD, "safetensors", 0, n)
        for n, features_PD in enumerate(features_IPD)
    ]
    batch = Collator(model.tokenizer, config.data, config.prompts)(samples)
    assert batch is not None
    return batch.to(model.device)


def step(model: VisionLanguageModel, batch: Batch) -> tuple[float, torch.Tensor]:
    """(seconds, loss and all gradients in one row) of one forward and backward pass."""
    model.zero_grad()
    started = time.perf_counter()
    out = model(batch)
    loss = out.sum / out.weight
    loss.backward()
    if loss.is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return seconds, torch.cat([loss.detach()[None], *gradients]).cpu()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=10)
    given = parser.parse_args()
    asked = TrainConfig(deterministic=True)
    set_workspace(asked)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config, model = made(device)
    batch = batch_of(config, model, given.batch)
    times: dict[bool, list[float]] = {False: [], True: []}
    others: dict[bool, int] = {False: 0, True: 0}  # turns with other bits than the first
    first: dict[bool, torch.Tensor] = {}
    for turn in range(given.steps + 1):
        for way in times:
            if way:
                ask_for_the_same_bits(asked)
            seconds, found = step(model, batch)
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic = False
            times[way] += [seconds] if turn else []  # the first turn warms up
            others[way] += not found.equal(first.setdefault(way, found))
    where = torch.cuda.get_device_name() if device == "cuda" else platform.processor()
    print(
        f"{where or platform.machine()}, {torch.get_num_threads()} thread(s), torch "
        f"{torch.__version__}; {given.batch} images, {len(batch.labels_TL)} captions\n"
    )
    rows = [
        [
            "true" if way else "false",
            f"{median(seconds):.3f}",
            f"{median(seconds) / median(times[False]):.2f}",
            f"{others[way]} of {given.steps}",
        ]
        for way, seconds in times.items()
    ]
    print(markdown_table(rows, ["train.deterministic", "s a step", "times", "other bits"]))


if __name__ == "__main__":
    main()
