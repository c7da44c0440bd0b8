"""Tiny runs of the whole loop: generated pictures in real shards, a tiny CLIP and a tiny T5.

A folder in; shards, models and a config out. Imported by tests and by the programs they launch on
several processes.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from pathlib import Path

import numpy as np
from PIL import Image

from harness.config.schema import Config
from shards.record import Record, Text
from shards.write import write_shards

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (40, 40, 220)}


def picture(index: int, side: int = 32) -> bytes:
    rng = np.random.default_rng(index)
    pixels = np.clip(
        np.array(list(COLOURS.values())[index % 3]) + rng.integers(-30, 30, (side, side, 3)), 0, 255
    )
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def texts(index: int, captions: bool = True, questions: bool = True) -> tuple[Text, ...]:
    """Returns unequal numbers of texts of unequal lengths: an average of averages is not theirs."""
    colour = list(COLOURS)[index % 3]
    seen = ("a square", "a man in a hat and a dog", "the street with a white dog")
    asked = [
        Text(
            f"{index}q",
            "vqa",
            (colour,) * 6 + ("dark", "light", "red", "grey"),
            "what colour is it?",
        )
    ]
    asked += [
        Text(f"{index}r{n}", "vqa", ("yes" if colour == "red" else "no",) * 10, "is it red?")
        for n in range(index % 2)
    ]
    told = tuple(f"a {colour} picture of {seen[n % 3]}" for n in range(1 + index % 3))
    return (
        *(asked if questions else ()),
        *([Text(f"{index}c", "caption", told)] if captions else ()),
    )


def make_shards(
    out: Path,
    count: int,
    split: str = "train",
    first: int = 0,
    unreadable: Collection[int] = (),
    text_only: Collection[int] = (),
    **kinds: bool,
) -> Path:
    """Writes `count` pictures in shards of four; those `unreadable` are none, and records that are
    `text_only` have none.
    """

    def sample(i: int) -> tuple[Record, bytes, str]:
        record = Record(f"{i:04d}", "toy", split, str(i), texts(i, **kinds), i not in text_only)
        if not record.has_picture:
            return record, b"", ""
        return record, b"no picture" if i in unreadable else picture(i), "png"

    write_shards(
        map(sample, range(first, first + count)),
        out,
        dataset="toy",
        split=split,
        max_shard_samples=4,
    )
    return out


def make_config(
    root: Path, clip: Path, t5: Path, name: str = "run", dev: bool = True, **train
) -> Config:
    """Returns a config of 14 images in global batches of 4 (the last of an epoch: 2).

    Micro-batches of 3, 4-bit + LoRA, texts drawn.
    """
    for split, count, first in (("train", 14, 0), ("dev", 5, 100)):
        if not (root / split).exists():
            make_shards(root / split, count, split, first)
    return Config(
        name=name,
        out=str(root / name),
        seed=3,
        data={
            "train": [{"path": str(root / "train")}],
            "dev": [{"path": str(root / "dev")}] if dev else [],
            "texts_per_image": 2,
            "answer": "drawn",
            "window_shards": 2,
        },
        model={
            "vision": {"id": str(clip), "image_size": 32},
            "bridge": {"query_tokens": 4, "width": 32, "heads": 4, "layers": 1},
            "lm": {"id": str(t5), "tuning": "qlora", "lora": {"r": 4}},
        },
        generate={"vqa": {"max_new_tokens": 3}, "caption": {"max_new_tokens": 3}},
        train={
            "epochs": 2,
            "global_batch": 4,
            "micro_batch": 3,
            "learning_rate": 3e-3,
            "log_every": 1,
            "evaluate_every": 3,
            "save_every": 2,
            **train,
        },
        evaluation={
            "batch_images": 3,
            "counterfactual_texts": 4,
            "show_images": 2,
            "look_images": 0,
            "bootstrap": 20,
        },
        tracking={"kind": "none"},
    )


def losses(out: Path) -> dict[int, float]:
    """Returns the logged training loss by step; a step that is there twice is an error."""
    found: dict[int, float] = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "train/loss" in row["values"]:
            assert row["step"] not in found
            found[row["step"]] = float(row["values"]["train/loss"])
    return found
