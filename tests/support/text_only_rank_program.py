"""What each of two processes does where some ranks' shares hold no picture: a run by ZeRO-3, then
the same by DDP.

Started by the shipped launch file zero2.yaml; argument 1 is a folder with models and a training
set. RANK.json tells of each run how many pictures this rank had in each step.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from harness.config.schema import Config
from harness.train.engine import Engine
from harness.train.run import run
from harness.train.state import Observer
from toy_runs import make_config

ALONE = (0, 2, 3, 5, 6, 8, 9, 12)  # of 14 records, those without a picture
SETTINGS = {"epochs": 2, "save_every": 100, "evaluate_every": 100, "micro_batch": 1}
SPLIT = {"stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0}


class Pictures(Observer):
    """How many pictures this rank has in each step, and by which engine."""

    def __init__(self) -> None:
        self.told: dict[str, object] = {"pictures": []}
        self.steps: list[int] = []

    def batches_made(self, run, samples, batches) -> None:
        self.steps.append(sum(sample.payload is not None for sample in samples))
        self.told = {"engine": run.engine.facts()["engine"], "pictures": self.steps}


def config_of(root: Path, name: str) -> Config:
    return make_config(root, root / "clip", root / "t5", name, dev=False, **SETTINGS)


def main(root: Path) -> None:
    rank = os.environ["RANK"]
    Engine.close = Engine.wait  # the group serves both runs of this process
    settings = root / f"{rank}-deepspeed.json"
    settings.write_text(json.dumps({"zero_optimization": {"stage": 3, **SPLIT}}))
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(settings)
    told = {}
    for name in ("zero-3", "ddp"):
        AcceleratorState._reset_state(reset_partial_state=True)
        seen = Pictures()
        run(config_of(root, name), None, [seen])
        told[name] = seen.told
        (root / f"{rank}.json").write_text(json.dumps(told))
        for key in [key for key in os.environ if "DEEPSPEED" in key]:  # the next: without
            del os.environ[key]
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
