"""How soon the loop people write and ours reach the same dev loss; a part of loop.py.

At toy size: EfficientNet-Lite0, a Q-Former of 2 x 256 with 32 queries, and a T5 of 3 + 3 layers of
256 that `harness base-lm` makes of the training captions, in NF4 with LoRA of rank 16. Both loops
see as many pictures a step, with one seed and learning rate; the usual one draws a caption of each,
ours learns all. Each is a process of its own on one thread of the CPU. Seconds are the processor's
own, from the making of the model on, without the looks at the dev loss: nats a token of all
captions of pictures that neither loop learns from.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from usual_loops import WEIGHT_DECAY, ImageCaptions, Parts, plain

from harness import base_lm
from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.images import reading
from harness.report.pictures import markdown_table
from harness.train.run import run
from harness.train.state import Observer, Run, StepResult
from shards.loader import Loader

IMAGES, DEV_IMAGES = 384, 48
BATCH = 16
STEPS, EVERY = 80, 8  # a look at the dev loss every so many
LEARNING_RATE = 5e-4
QUERIES, WIDTH, HEADS = 32, 256, 4
LOOPS = {
    "plain": "the loop people write",
    "images": "ours, from images",
    "features": "ours, from features",
}
Point = tuple[float, float]  # seconds, dev loss


def config_of(folder: Path, data: str) -> Config:
    """Returns our config of the same training."""
    return Config.model_validate(
        {
            "name": "loop",
            "out": str(folder / f"run_{data}"),
            "data": {"train": [{"path": str(folder / "train" / data / "train")}], "workers": 0},
            "model": {
                "vision": {"kind": "efficientnet_lite0"},
                "bridge": {"query_tokens": QUERIES, "layers": 2, "width": WIDTH, "heads": HEADS},
                "lm": {"id": str(folder / "t5"), "lora": {"r": 16, "alpha": 32}},
            },
            "prompts": {"caption": "photo"},
            "train": {
                "epochs": 1_000_000,
                "max_steps": STEPS,
                "global_batch": BATCH,
                "micro_batch": BATCH,
                "learning_rate": LEARNING_RATE,
                "schedule": "constant",
                "warmup": 0.0,
                "betas": (0.9, 0.999),  # those of torch's AdamW
                "weight_decay": WEIGHT_DECAY,
                "save_every": 10**9,
                "save_minutes": None,
                "image_use_every": None,
            },
            "tracking": {"kind": "none"},
        }
    )


# ---- one loop, in a process of its own -----------------------------------------------------------


class EnoughError(Exception):
    """As many steps as were asked for are taken."""


class Curve:
    """The dev loss over the seconds that were spent on learning."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.tokens = 0.0
        self.step = 0
        self.started = time.process_time()

    def taken(self, look: Callable[[], tuple[float, float]]) -> None:
        """Hears of a step; `look` gives nats and tokens of the dev set."""
        self.step += 1
        if self.step % EVERY:
            return
        now = time.process_time()
        with torch.no_grad():
            nats, self.tokens = look()
        self.points.append((now - self.started, nats / self.tokens))
        self.started += time.process_time() - now


def learn_as_usual(folder: Path, curve: Curve) -> None:
    texts = [json.loads((folder / f"{name}.json").read_text()) for name in ("train", "dev")]
    parts = Parts(folder, texts[0], QUERIES, WIDTH, HEADS, LEARNING_RATE)
    processed = ImageCaptions(texts[1], parts.data.processor)
    items = [processed[index] for index in range(len(processed))]
    pixels = torch.stack([item["pixels"] for item in items])
    own = [[{"pixels": pixels[0], "caption": text} for text in each] for each in texts[1].values()]
    batches = [parts.collate(each) for each in own]

    def look() -> tuple[float, float]:
        # In train mode, which is the same without dropout: in eval mode bitsandbytes packs the
        # weights of a CPU for inference, and no gradient passes them from then on.
        nats = tokens = 0.0
        for one, batch in zip(pixels, batches, strict=True):
            patches = parts.model.vision(one[None]).last_hidden_state
            batch = {name: t for name, t in batch.items() if name != "pixel_values"}
            patches = patches.expand(len(batch["labels"]), -1, -1)
            count = float((batch["labels"] != -100).sum())
            nats += float(parts.model.captioned(patches, **batch).loss) * count
            tokens += count
        return nats, tokens

    def taken(captions: int) -> None:
        curve.taken(look)
        if curve.step == STEPS:
            raise EnoughError

    with suppress(EnoughError):
        plain(parts, BATCH, 0, taken)


class Looks(Observer):
    """What looks at our dev loss."""

    def __init__(self, folder: Path, data: str, curve: Curve):
        self.folder = folder / "dev" / data / "train"
        self.curve = curve

    def step_taken(self, run: Run, step: StepResult) -> None:
        self.curve.taken(lambda: self.look(run))

    def look(self, run: Run) -> tuple[float, float]:
        collate = Collator.of(run.config, run.model.tokenizer, training=False)
        loader = Loader(
            [str(self.folder)], global_batch=BATCH, shuffle=False, **reading(run.config)
        )
        run.model.eval()
        nats = tokens = 0.0
        with closing(loader.iterate(epochs=1)) as steps:
            for _, samples in steps:
                batch = collate(samples)
                assert batch is not None
                out = run.model.loss(batch.to(run.model.device))
                nats += float(out.sum)
                tokens += float(out.weight)
        run.model.train()
        return nats, tokens


def child(folder: Path, loop: str) -> None:
    """Learns, and leaves its curve in the folder."""
    curve = Curve()
    if loop == "plain":
        learn_as_usual(folder, curve)
    else:
        run(config_of(folder, loop), observers=[Looks(folder, loop, curve)])
    found = {"tokens": curve.tokens, "points": curve.points}
    (folder / f"{loop}.json").write_text(json.dumps(found), encoding="utf-8")


# ---- both ----------------------------------------------------------------------------------------


def seconds_to(points: Sequence[Point], loss: float) -> float | None:
    """Returns after how many seconds a curve is first as low as `loss`, on the line between two
    looks; None where it never is.
    """
    before: Point | None = None
    for seconds, found in points:
        if found <= loss:
            if before is None or before[1] == found:
                return seconds
            share = (before[1] - loss) / (before[1] - found)
            return before[0] + share * (seconds - before[0])
        before = seconds, found
    return None


def make_parts(
    folder: Path, flickr8k: Path | None, captions_of: Callable[..., Any], make_sets: Any
) -> None:
    """Makes sets of images and of features, for training and dev, and the base model."""
    found = list(captions_of(flickr8k, folder, IMAGES + DEV_IMAGES).items())
    config = config_of(folder, "images")
    for name, captions in {
        "train": dict(found[DEV_IMAGES:]),
        "dev": dict(found[:DEV_IMAGES]),
    }.items():
        make_sets(folder / name, captions, config)
        (folder / f"{name}.json").write_text(json.dumps(captions), encoding="utf-8")
    processor = CLIPImageProcessorPil(image_mean=(127 / 255,) * 3, image_std=(128 / 255,) * 3)
    processor.save_pretrained(folder / "clip")
    sets = [str(folder / "train" / "images" / "train")]
    base_lm.make(sets, folder / "t5", config, d_model=WIDTH, layers=3, steps=40)


def reached_alike(
    folder: Path, given: Any, captions_of: Callable[..., Any], make_sets: Any
) -> dict[str, Any]:
    """Prints and returns final losses, and the seconds that each loop takes to those of the others;
    `captions_of` and `make_sets` are loop.py's.
    """
    make_parts(folder, given.flickr8k, captions_of, make_sets)
    curves: dict[str, list[Point]] = {}
    tokens = set()
    for loop in LOOPS:
        with (folder / f"{loop}.log").open("w") as log:
            ended = subprocess.run(
                [sys.executable, __file__, str(folder), loop],
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
                check=False,
            )
        if ended.returncode:
            raise SystemExit(f"{loop} ended:\n" + (folder / f"{loop}.log").read_text()[-3000:])
        found = json.loads((folder / f"{loop}.json").read_text())
        curves[loop] = found["points"]
        tokens.add(found["tokens"])
    assert len(tokens) == 1, f"not the same dev tokens: {tokens}"
    result = {
        loop: {
            "seconds": points[-1][0],
            "dev_loss": points[-1][1],
            "seconds_to": {other: seconds_to(points, curves[other][-1][1]) for other in LOOPS},
            "points": points,
        }
        for loop, points in curves.items()
    }
    rows = [
        [LOOPS[loop], f"{one['seconds']:.0f}", f"{one['dev_loss']:.3f}"]
        + ["not" if s is None else f"{s:.0f}" for s in one["seconds_to"].values()]
        for loop, one in result.items()
    ]
    to = [f"s to the last dev loss of {name}" for name in LOOPS.values()]
    print(markdown_table(rows, [f"{STEPS} steps", "s", "dev loss, nats a token", *to]), flush=True)
    return result


if __name__ == "__main__":
    child(Path(sys.argv[1]), sys.argv[2])
