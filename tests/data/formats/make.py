"""Makes the files that this version of harness writes, for the versions after it to be tried on.

    PYTHONPATH=.:tests/support python tests/data/formats/make.py version_1

Tiny models with random weights, a set of images, its features, and two runs that were killed in the
middle, all by relative paths. expected.json holds what this version read, scored and answered, and
the losses of uncut runs.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import tiny
import yaml
from PIL import Image

import toy_runs
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record
from shards.write import write_shards

HERE = Path(__file__).resolve().parent
DAMAGED = "0005"  # the key of a picture that cannot be read, which runs and feature sets name
LAST = 9  # steps of an uncut run
KILLED_AFTER = 5  # its newest checkpoint is that of step 4
VISION = {"id": "models/clip", "image_size": 32}
T5 = {
    "name": "t5",
    "out": "t5_run",
    "seed": 3,
    "data": {
        "train": [{"path": "shards/train"}],
        "dev": [{"path": "shards/dev"}],
        "test": [{"path": "shards/dev"}],
        "texts_per_image": 2,
        "answer": "drawn",
        "window_shards": 2,
    },
    "model": {
        "vision": VISION,
        "bridge": {"query_tokens": 4, "width": 16, "heads": 4, "layers": 1},
        "lm": {"id": "models/t5", "tuning": "qlora", "lora": {"r": 2}},
    },
    "generate": {"vqa": {"max_new_tokens": 3}, "caption": {"max_new_tokens": 6}},
    "train": {
        "epochs": 3,
        "global_batch": 4,
        "micro_batch": 3,
        "learning_rate": 0.003,
        "log_every": 1,
        "save_every": 4,
        "image_use_every": 2,
    },
    "evaluation": {"batch_images": 3, "counterfactual_texts": 4, "show_images": 2, "bootstrap": 20},
    "tracking": {"kind": "none"},
}
# From features, and with both keys that make a known mistake.
GPT2 = {
    **T5,
    "name": "gpt2",
    "out": "gpt2_run",
    "data": {
        **T5["data"],
        "train": [{"path": "features/train"}],
        "dev": [{"path": "features/dev"}],
        "test": [{"path": "features/dev"}],
        "max_target_tokens": 16,
        "loss_on_padding": True,
    },
    "model": {
        **T5["model"],
        "lm": {
            "kind": "gpt2",
            "id": "models/gpt2",
            "tuning": "lora",
            "lora": {"r": 2},
            "bos": "generation_only",
        },
    },
}


def main(name: str) -> None:
    folder = HERE / name
    folder.mkdir()
    os.chdir(folder)
    tiny.tiny_clip(Path("models/clip"), width=16)
    tiny.tiny_t5(Path("models/t5"), layers=1, vocabulary=120)
    tiny.tiny_gpt2(Path("models/gpt2"), width=32, layers=1, vocabulary=300)
    for split, count, first in (("train", 12, 0), ("dev", 6, 100)):
        made = samples(count, split, first)
        write_shards(made, f"shards/{split}", dataset="toy", split=split, max_shard_samples=4)
    Path("picture.jpg").write_bytes(picture(200))
    for config in (T5, GPT2):
        file = Path(config["out"], "config.yaml")
        file.parent.mkdir()
        file.write_text(yaml.safe_dump(config, sort_keys=False))
    harness("shards", "features", "shards", "--config", "t5_run/config.yaml", "--out", "features")
    sets = [f"{kind}/{split}" for kind in ("shards", "features") for split in ("train", "dev")]
    expected = {
        "sets": {place: held(place) for place in sets},
        "runs": {config["out"]: tried(config["out"]) for config in (T5, GPT2)},
    }
    Path("expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def picture(index: int) -> bytes:
    """A small JPEG of one colour with noise."""
    file = io.BytesIO()
    Image.open(io.BytesIO(toy_runs.picture(index, 40))).save(file, "JPEG", quality=70)
    return file.getvalue()


def samples(count: int, split: str, first: int) -> Iterator[tuple[Record, bytes, str]]:
    meta = {"answer_type": "other", "question_type": "what", "pair_id": None}
    for index in range(first, first + count):
        key = f"{index:04d}"
        texts = toy_runs.texts(index)
        texts = tuple(replace(text, meta=meta if text.task == "vqa" else {}) for text in texts)
        data = b"no image" if key == DAMAGED else picture(index)
        yield Record(key, "toy", split, str(index), texts), data, "jpg"


def held(place: str) -> list[list[object]]:
    """The records of a set in order, each with the hash of its picture or features."""
    manifest = Manifest.open(place)
    read = Reader(manifest).read
    found = [read(index) for index in range(manifest.samples)]
    return [[json.loads(s.record.to_json()), hashlib.sha256(s.payload).hexdigest()] for s in found]


def tried(out: str) -> dict[str, object]:
    """What an uncut run loses at each step, and what the one that was killed scores and says."""
    train = [sys.executable, "-m", "harness.train", f"{out}/config.yaml"]
    subprocess.run([*train, "out=uncut"], check=True)
    losses = journal("uncut")
    shutil.rmtree("uncut")
    killed = subprocess.Popen(train)
    while KILLED_AFTER not in journal(out):
        time.sleep(0.002)
    killed.kill()
    killed.wait()
    (newest,) = Path(out, "checkpoints").iterdir()
    assert newest.name == "step-000004"
    assert list(losses) == list(range(1, LAST + 1))
    assert journal(out).items() <= losses.items()
    ask = ["ask", out, "--image", "picture.jpg"]
    return {
        "losses": losses,
        "scores": json.loads(harness("evaluate", out, "--json")),
        "caption": harness(*ask),
        "answer": harness(*ask, "--prompt", "what colour is it?"),
    }


def journal(out: str) -> dict[int, float]:
    """Logged loss by step."""
    file = Path(out, "metrics.jsonl")
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    rows = map(json.loads, lines)
    return {r["step"]: r["values"]["train/loss"] for r in rows if "train/loss" in r["values"]}


def harness(*arguments: str) -> str:
    line = [sys.executable, "-m", "harness", *arguments]
    return subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout


if __name__ == "__main__":
    main(sys.argv[1])
