"""What each of two processes does under DeepSpeed: a run by every stage, and the runs that go from
engine to engine.

Started by the shipped launch file zero2.yaml; argument 1 is a folder with models and with
`plan.json`, a list of runs: name, DeepSpeed settings, config settings, resume, steps whose loss is
not finite. RANK.json tells of each run.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from accelerate.state import AcceleratorState

from harness.config.schema import Config
from harness.data import collate as batch
from harness.model.vlm import VisionLanguageModel
from harness.train import prepare
from harness.train import run as train
from harness.train import step as one_step
from harness.train.engine import Engine
from harness.train.zero import ZeroEngine
from rank_program import not_finite_in, watch
from toy_runs import make_config


def tuned(config: Config, tuning: str) -> Config:
    parts = config.model_dump(mode="json")
    parts["model"]["lm"]["tuning"] = tuning
    return Config(**parts)


def main(root: Path) -> None:
    rank, told = os.environ["RANK"], {}
    # the ranks' decoders run unequally often, but for a partitioned model's
    batch.MIN_PADDING_SAVED = 4
    Engine.close = Engine.wait  # the group serves all runs of this process
    prepare_engine = ZeroEngine.prepare
    micro_batches = one_step.micro_batches
    forward, drawn = VisionLanguageModel.forward, one_step.drawn
    for run in json.loads((root / "plan.json").read_text()):
        settings = root / f"{run['name']}-{rank}-deepspeed.json"
        settings.write_text(json.dumps({"zero_optimization": run["zero"]}))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(settings)
        AcceleratorState._reset_state()
        VisionLanguageModel.forward = forward
        one_step.drawn = drawn
        one_step.micro_batches = prepare.micro_batches = micro_batches
        told[run["name"]] = mine = {"samples": []}
        watch(mine["samples"])

        def told_of(self, model, mine=mine):
            wrapped = prepare_engine(self, model)
            kept = ("wo.weight", "layer_norm.weight", "shared.weight", "lm_head.weight")
            mine["dtypes"] = sorted(
                {str(p.dtype) for n, p in model.named_parameters() if n.endswith(kept)}
            )
            mine["engine"] = [type(wrapped).__name__, self.facts()["engine"], self.world_size]
            mine["partitioned"] = any(p.numel() == 0 for p in model.parameters())
            return wrapped

        ZeroEngine.prepare = told_of
        if run["not_finite"]:
            not_finite_in(set(run["not_finite"]), rank=1)
        config = make_config(root, root / "clip", root / "t5", run["name"], **run["settings"])
        train.run(tuned(config, run["tuning"]), run["resume"])
        (root / f"{rank}.json").write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
