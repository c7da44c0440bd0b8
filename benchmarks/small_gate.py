"""What the small image-use gate costs: seconds of one look against seconds of one training step,
for a config.

    python benchmarks/small_gate.py configs/demo.yaml data.train.0.path=DIR data.dev.0.path=DIR ...

Prints the steps between looks from which on they take under 2% of a run's time
(`train.image_use_every`).
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import closing

import torch

from harness.config.load import load
from harness.data.collate import Collator
from harness.evaluate.small_gate import small_gate, small_set
from harness.model.vlm import VisionLanguageModel
from harness.train import prepare
from harness.train.engines import make_engine

STEPS, LOOKS, SHARE = 8, 3, 0.02


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE")
    args = parser.parse_args()
    config = load(args.config, args.overrides)
    engine = make_engine(config.train)
    loader = prepare.make_loader(config, engine)
    model = VisionLanguageModel.build(
        config, prepare.encoder_of(loader, config), precision=engine.precision, device=engine.device
    )
    prepare.calibrate(model, config)
    wrapped, collate = (
        engine.prepare(model),
        Collator.of(config, model.tokenizer),
    )
    model.train()
    step_seconds, look_seconds = [], []
    with closing(loader.iterate()) as steps:
        for _ in range(STEPS):
            began = time.perf_counter()
            _, samples = next(steps)
            for batch in prepare.micro_batches(samples, collate, config.train.micro_batch):
                loss = wrapped(batch.to(engine.device))
                engine.backward(loss.sum / loss.weight)
            engine.await_gradients()
            engine.step(config.train.learning_rate, skip=False)
            step_seconds.append(time.perf_counter() - began)
    began = time.perf_counter()
    small = small_set(model, config)
    read = time.perf_counter() - began
    for _ in range(LOOKS):
        began = time.perf_counter()
        small_gate(model, small, config)
        look_seconds.append(time.perf_counter() - began)
    step, look = (
        sorted(values[1:])[len(values[1:]) // 2] for values in (step_seconds, look_seconds)
    )
    print(
        f"{config.name} on {engine.device}, {torch.get_num_threads()} threads: a step "
        f"{step:.3f} s, a look {look:.3f} s"
    )
    print(
        f"(medians without the first; the set is read once: {read:.2f} s). Under {SHARE:.0%} of "
        f"the time from"
    )
    print(
        f"train.image_use_every={math.ceil(look * (1 / SHARE - 1) / step)} on, without the "
        f"evaluations' own time"
    )


if __name__ == "__main__":
    main()
