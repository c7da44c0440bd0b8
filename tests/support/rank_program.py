"""What each of several processes does in the launched tests: argument 1 is a folder with models;
results go there.

`first` trains a run without interruption, goes on with one begun by a single process, begins one
for others, trains two with a loss that is not finite on rank 1 alone, one of them with a loss
scaler, and is killed in the middle of an epoch. `second` goes on with the killed one where rank 1
does not see its folder, trains one with samples that cannot be read, is given two configs, and
stops by a signal that rank 1 alone gets. `three` goes on with what one began.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from harness.config.schema import Config
from harness.errors import ConfigError
from harness.machine.parent import watch_parent
from harness.train import engine
from harness.train.engine import Engine
from harness.train.run import run
from harness.train.state import Observer
from same_runs import AtStep
from toy_runs import make_config


class NotFinite(Observer):
    """A fault: the loss of these steps (0, 1, ... of the run) is NaN on one rank.

    In odd ones its gradient stays finite.
    """

    def __init__(self, steps: set[int], rank: int = 0) -> None:
        self.steps = steps
        self.rank = rank
        self.step: int | None = None

    def batches_made(self, run, samples, batches) -> None:
        if self.step is None and run.engine.rank == self.rank:
            run.model.register_forward_hook(self._spoil)
        self.step = run.state.step

    def _spoil(self, model, given, output):
        if self.step not in self.steps:
            return None
        nan = float("nan")
        return replace(output, sum=output.sum + nan if self.step % 2 else output.sum * nan)


class SamplesRead(Observer):
    """The keys of the samples that this rank read, one list a step."""

    def __init__(self) -> None:
        self.steps: list[list[str]] = []

    def batches_made(self, run, samples, batches) -> None:
        self.steps.append([sample.record.key for sample in samples])


class LastModel(Observer):
    """The model of the newest run."""

    def batches_made(self, run, samples, batches) -> None:
        self.model = run.model


def with_scaler(patch=setattr) -> None:
    """Has engines made from now on scale their loss as on a T4."""
    choose = engine.choose
    patch(engine, "choose", lambda *given: replace(choose(*given), loss_scaler=True))


def main(root: Path, stage: str) -> None:
    watch_parent()
    rank = int(os.environ["RANK"])
    results: dict[str, object] = {}
    last = LastModel()
    Engine.close = Engine.wait  # the group serves all runs of this process

    def train(name: str, *observers: Observer, resume: str | None = None, **settings) -> None:
        config = make_config(
            root, root / "clip", root / "t5", name, dev=name == "killed", **settings
        )
        run(changed(config), resume, [last, *observers])

    def changed(config: Config) -> Config:
        update: dict[str, object] = {}
        if config.name == "torn":
            sets = ({"path": str(root / "torn-set")},)
            update = {"data": Config(name="-", data={"train": sets}).data}
        if stage == "second" and rank == 1 and config.name in ("killed", "torn"):
            update["out"] = str(root / "elsewhere")
        return config.model_copy(update=update)

    def note(name: str, value: object = None) -> None:
        weights = hashlib.sha256(
            b"".join(v.numpy().tobytes() for v in last.model.trained_state().values())
        )
        results[name] = [weights.hexdigest(), value]
        (root / f"{stage}-{rank}.json").write_text(json.dumps(results))

    def signalled(number: signal.Signals) -> None:
        if rank == 1:
            os.kill(os.getpid(), number)

    if stage == "three":
        read = SamplesRead()
        train("three", read, resume="auto")
        note("three", read.steps)
    elif stage == "first":
        train("two")
        note("two")
        train("begun-by-two", max_steps=3)
        train("begun-by-one", resume="auto")
        note("begun-by-one")
        train("skipped", NotFinite({2, 5}, rank=1))
        note("skipped")
        with pytest.MonkeyPatch.context() as patch:
            with_scaler(patch.setattr)
            train("scaled", NotFinite({2, 5}, rank=1))
        note("scaled")
        train("killed", AtStep(5, lambda: signalled(signal.SIGKILL)))
    else:
        train("killed", resume="auto")
        note("killed")
        train("torn", epochs=1)
        with pytest.raises(ConfigError) as refused:
            train("differs", clip_norm=1.0 + rank, max_steps=1)
        with pytest.raises(ConfigError) as nowhere:
            train("differs", resume=str(root / "nowhere"))
        note("differs", [str(refused.value), str(nowhere.value)])
        try:
            train("stopped", AtStep(3, lambda: signalled(signal.SIGTERM)))
        except SystemExit as left:
            note("stopped", left.code)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
