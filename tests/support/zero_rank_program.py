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
from harness.train.engine import Engine
from harness.train.run import run
from harness.train.state import Observer
from rank_program import NotFinite, SamplesRead
from toy_runs import make_config


def tuned(config: Config, tuning: str) -> Config:
    """The config with this tuning; `decoder`: in 4 bits, of the decoder beside the T5."""
    parts = config.model_dump(mode="json")
    lm = parts["model"]["lm"]
    lm["tuning"] = tuning
    if tuning == "decoder":
        place = str(Path(lm["id"]).parent / "decoder")
        lm |= {"kind": "decoder", "id": place, "tuning": "qlora"}
    return Config(**parts)


class EngineSeen(Observer):
    """What DeepSpeed made of the model, once a run."""

    def __init__(self) -> None:
        self.facts: dict[str, object] = {}

    def batches_made(self, run, samples, batches) -> None:
        if self.facts:
            return
        kept = ("wo.weight", "layer_norm.weight", "shared.weight", "lm_head.weight")
        named = dict(run.model.named_parameters())
        engine = [type(run.wrapped).__name__, run.engine.facts()["engine"], run.engine.world_size]
        self.facts = {
            "dtypes": sorted({str(p.dtype) for name, p in named.items() if name.endswith(kept)}),
            "engine": engine,
            "partitioned": any(p.numel() == 0 for p in named.values()),
        }


def main(root: Path) -> None:
    rank = os.environ["RANK"]
    told = {}
    # The ranks' decoders run unequally often, but for a partitioned model's.
    batch.MIN_PADDING_SAVED = 4
    Engine.close = Engine.wait  # the group serves all runs of this process
    for each in json.loads((root / "plan.json").read_text()):
        name = each["name"]
        settings = root / f"{name}-{rank}-deepspeed.json"
        settings.write_text(json.dumps({"zero_optimization": each["zero"]}))
        os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(settings)
        AcceleratorState._reset_state()
        config = make_config(root, root / "clip", root / "t5", name, **each["settings"])
        seen = EngineSeen()
        read = SamplesRead()
        not_finite = NotFinite(set(each["not_finite"]), rank=1)
        run(tuned(config, each["tuning"]), each["resume"], [seen, read, not_finite])
        told[name] = {"samples": read.steps, **seen.facts}
        (root / f"{rank}.json").write_text(json.dumps(told))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
