"""A whole run on a decoder with a chat template: it is evaluated on the way, and one that was
killed goes on bit for bit.
"""

import json
import os
import signal

from harness import checkpoint as checkpoints
from harness.train import run as train
from plan_cases import changed
from same_runs import AtStep, forked, same_run
from tiny_models import tiny_decoder
from toy_runs import make_config


def test_a_killed_run_on_a_decoder_goes_on_bit_for_bit(root):
    lm = {"kind": "decoder", "id": str(tiny_decoder(root / "qwen2", "qwen2"))}
    whole, config = (
        changed(
            make_config(root, root / "clip", root / "t5", name),
            lm=lm,
        )
        for name in ("whole", "killed")
    )
    train.run(whole)
    kill = AtStep(7, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert forked(lambda: train.run(config, observers=[kill])) == -signal.SIGKILL
    assert checkpoints.newest(config.out_dir).step == 6
    train.run(config, "auto")
    same_run(config.out_dir, whole.out_dir)
    rows = [json.loads(line) for line in (whole.out_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = {key for row in rows for key in row["values"] if key.startswith("dev")}
    assert any("gap" in key or "loss" in key for key in evaluated), evaluated
