"""What each of several processes does in tests/harness/train/test_exact_resume.py, or one alone.

Argument 1: a folder with models. Trains every kind of data uninterrupted, cut after step 5 and
resumed, with a loss scaler and dropout, and writes exact-WORLD-RANK.json there: for each kind what
the two runs consisted of before each step from 5 on.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from harness.config.schema import Config
from harness.data.encode import encode_set
from harness.train.engine import Engine
from harness.train.run import run
from harness.train.schedule import learning_rate
from harness.train.state import Observer
from rank_program import with_scaler
from toy_runs import make_config, make_shards

CUT = 5
KINDS = ("images", "features", "mixture")
UNREADABLE = (102, 104)


def digest(value: Any) -> str:
    """Returns a hash of tensors by name, exact to the bit."""
    if isinstance(value, Mapping):
        value = [(name, digest(part)) for name, part in sorted(value.items())]
    elif isinstance(value, torch.Tensor):
        data = value.detach().cpu().reshape(-1)
        value = [str(data.dtype), list(value.shape), data.view(torch.uint8).numpy().tobytes().hex()]
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


class Before(Observer):
    """What a run consists of before it takes each step from CUT on."""

    def __init__(self) -> None:
        self.seen: dict[int, dict[str, Any]] = {}

    def batches_made(self, run, samples, batches) -> None:
        step = run.state.step
        if step < CUT:
            return
        self.seen[step] = {
            "keys": [sample.record.key if sample.record else sample.error for sample in samples],
            "batches": [
                digest({field.name: getattr(batch, field.name) for field in fields(batch)})
                for batch in batches
            ],
            "weights": digest(run.engine.trained_state()),
            "moments": digest(run.engine.optimizer_state()),
            "moments there": len(run.engine.optimizer_state()),
            "rate": learning_rate(run.config.train, step, 8),
            "scaler": run.engine.scaler_state(),
            "counted": [run.state.skipped, run.state.unreadable, run.state.stream.position],
        }


def config_of(root: Path, kind: str, name: str, **settings: Any) -> Config:
    """Returns the config of a run over one kind of data, with dropout."""
    plain = make_config(root, root / "clip", root / "t5", name, dev=False, **settings)
    document = plain.model_dump(mode="json")
    document["model"]["bridge"]["dropout"] = document["model"]["lm"]["lora"]["dropout"] = 0.2
    train = {
        "images": [{"path": str(root / "train")}],
        "features": [{"path": str(root / "features")}],
        "mixture": [
            {"path": str(root / "train"), "weight": 0.6},
            {"path": str(root / "torn"), "weight": 0.4},
        ],
    }
    document["data"] |= {"train": train[kind]}
    if kind == "mixture":  # three processes read other lanes' shards too
        document["data"] |= {"train_images": 14, "lanes": 2}
    return Config(**document)


def make_sets(root: Path) -> None:
    """Makes the sets of all kinds, before any process is launched."""
    config = make_config(root, root / "clip", root / "t5", "unused", dev=False)
    encode_set(root / "train", root / "features", config.model.vision)
    make_shards(root / "torn", 8, first=100, unreadable=UNREADABLE)


def main(root: Path) -> None:
    """Trains all kinds and leaves what was seen."""
    rank = int(os.environ.get("RANK", "0"))
    world = int(os.environ.get("WORLD_SIZE", "1"))
    close = Engine.close
    Engine.close = Engine.wait  # the group serves all runs of this process
    with_scaler()
    found = {}
    for kind in KINDS:
        whole = Before()
        resumed = Before()
        run(config_of(root, kind, f"{kind}-{world}"), observers=[whole])
        run(config_of(root, kind, f"{kind}-{world}-cut", max_steps=CUT))
        run(config_of(root, kind, f"{kind}-{world}-cut"), "auto", [resumed])
        found[kind] = [whole.seen, resumed.seen]
    (root / f"exact-{world}-{rank}.json").write_text(json.dumps(found))
    Engine.close = close


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    # As harness.train itself: the interpreter's own way out meets gloo's threads.
    os._exit(0)
