"""Toys of a first stage: a batch of captions alone, a model, and configs of whole tiny runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from harness.config.schema import Config
from harness.model.first_stage import FirstStageModel
from shards.read import Sample
from shards.record import Record, Text
from toy_batch import ENCODER, TOKENS, WIDTH
from toy_batch import config as toy_config
from toy_runs import make_config, make_shards

THINGS = ("a black dog", "a man", "two girls", "a boy jumps", "a cat", "the sea", "a hat", "stairs")


def captioned(count: int = 8, texts: int = 3) -> list[Sample]:
    """Returns pictures with one to `texts` captions each."""
    rng = np.random.default_rng(0)

    def record(i: int) -> Record:
        told = tuple(f"{THINGS[i]} {word}" for word in ("in red", "alone", "and a dog"))
        caption = Text(f"c{i}", "caption", told[: 1 + i % texts])
        return Record(str(i), "toy", "train", str(i), (caption,))

    features = [rng.normal(size=(TOKENS, WIDTH)).astype(np.float16) for _ in range(count)]
    return [Sample(record(i), features[i], "safetensors", 0, i) for i in range(count)]


def first_stage(lm: Path, objective: tuple[str, ...] = ("itc", "lm"), **bridge: Any):
    """Returns a model in train mode."""
    config = toy_config(lm, bridge=bridge, train={"objective": objective})
    return FirstStageModel.build(config, ENCODER).train()


def run_config(root: Path, name: str, objective: list[str] | None = None, **train: Any) -> Config:
    """Returns a tiny run on captions alone; a first stage unless `objective` is None."""
    made = make_config(root, root / "clip", root / "t5", name)
    for split, count, first in (("captions", 14, 0), ("dev-captions", 5, 100)):
        if not (root / split).exists():
            make_shards(root / split, count, split, first, questions=False)
    document = made.model_dump()
    document["data"] |= {
        "train": [{"path": str(root / "captions")}],
        "dev": [{"path": str(root / "dev-captions")}],
    }
    document["train"] |= {"objective": objective, "image_use_every": None, **train}
    return Config(**document)
