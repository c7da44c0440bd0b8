"""What each of several processes does in the launched tests: argument 1 is a folder with models;
results go there.

`first` trains a run without interruption, goes on with one begun by a single process, begins one
for others, trains two with a loss that is not finite on rank 1 alone, one of them with a loss
scaler, and is killed in the middle of an epoch. `second` goes on with the killed one, and stops by
a signal that rank 1 alone gets. `three` goes on with what one began.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from harness.model.vlm import VisionLanguageModel
from harness.train import engine, prepare
from harness.train import run as train
from harness.train import step as one_step
from harness.train.engine import Engine
from toy_runs import make_config


def at_step(number: int, act, monkeypatch=None) -> None:
    """Has `act(engine)` called when optimizer step `number` (1, 2, ... of this process from now on)
    was taken.
    """
    original, taken = Engine.step, []

    def step(self, *arguments, **keywords):
        norm = original(self, *arguments, **keywords)
        taken.append(norm)
        if len(taken) == number:
            act(self)
        return norm

    monkeypatch.setattr(Engine, "step", step) if monkeypatch else setattr(Engine, "step", step)


def not_finite_in(steps: set[int], rank: int = 0, monkeypatch=None) -> None:
    """Makes the loss NaN in these steps (0, 1, ... of the run) on one rank; in odd ones its
    gradient stays finite.
    """
    original, drawn = VisionLanguageModel.forward, one_step.drawn
    at = []

    def forward(self, batch):
        output = original(self, batch)
        mine = os.environ.get("RANK", "0") == str(rank)
        if not (mine and at[-1] in steps):
            return output
        nan = float("nan")
        return replace(output, sum=output.sum + nan if at[-1] % 2 else output.sum * nan)

    def watched(seed, step, name):
        at[:] = [step]
        return drawn(seed, step, name)

    for owner, name, value in (
        (VisionLanguageModel, "forward", forward),
        (one_step, "drawn", watched),
    ):
        monkeypatch.setattr(owner, name, value) if monkeypatch else setattr(owner, name, value)


def watch(seen: list, patch=setattr) -> None:
    """Writes down which samples each step of this process reads."""
    micro_batches = one_step.micro_batches

    def watched(samples, *rest):
        seen.append([s.record.key for s in samples])
        return micro_batches(samples, *rest)

    # The steps, and before them the batch that calibrates the bridge.
    for module in (one_step, prepare):
        patch(module, "micro_batches", watched)


def with_scaler(patch=setattr) -> None:
    """Engines made from now on scale their loss as on a T4."""
    choose = engine.choose
    patch(engine, "choose", lambda *given: replace(choose(*given), loss_scaler=True))


def restored(function, *arguments) -> None:
    """Calls a function and takes back what it has patched."""
    before = Engine.step, VisionLanguageModel.forward, one_step.drawn, engine.choose
    try:
        function(*arguments)
    finally:
        Engine.step, VisionLanguageModel.forward, one_step.drawn, engine.choose = before


def main(root: Path, stage: str) -> None:
    rank = int(os.environ["RANK"])
    results: dict[str, object] = {}
    models: list[VisionLanguageModel] = []
    build = VisionLanguageModel.build
    VisionLanguageModel.build = lambda *a, **k: models.append(build(*a, **k)) or models[-1]
    Engine.close = Engine.wait  # the group serves all runs of this process

    def config(name: str, **settings):
        return make_config(root, root / "clip", root / "t5", name, dev=name == "killed", **settings)

    def note(name: str, value: object = None) -> None:
        weights = hashlib.sha256(
            b"".join(v.numpy().tobytes() for v in models[-1].trained_state().values())
        )
        results[name] = [weights.hexdigest(), value]
        (root / f"{stage}-{rank}.json").write_text(json.dumps(results))

    def killed() -> None:
        at_step(5, lambda engine: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None)
        train.run(config("killed"))

    def stopped() -> None:
        at_step(3, lambda engine: os.kill(os.getpid(), signal.SIGTERM) if rank == 1 else None)
        try:
            train.run(config("stopped"))
        except SystemExit as left:
            note("stopped", left.code)

    def skipped() -> None:
        not_finite_in({2, 5}, rank=1)
        train.run(config("skipped"))
        note("skipped")

    def scaled() -> None:
        with_scaler()
        not_finite_in({2, 5}, rank=1)
        train.run(config("scaled"))
        note("scaled")

    if stage == "three":
        seen: list[list[str]] = []
        watch(seen)
        train.run(config("three"), "auto")
        note("three", seen)
    elif stage == "first":
        train.run(config("two"))
        note("two")
        train.run(config("begun-by-two", max_steps=3))
        train.run(config("begun-by-one"), "auto")
        note("begun-by-one")
        restored(skipped)
        restored(scaled)
        restored(killed)
    else:
        train.run(config("killed"), "auto")
        note("killed")
        restored(stopped)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
