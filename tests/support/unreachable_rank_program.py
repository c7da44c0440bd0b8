"""What each of two processes does where the data of rank 1 alone stop to answer after step 3, and
where the dev set of rank 0 does not: argument 1 is a folder with models; what the runs say goes to
RUN-RANK.txt there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from harness.train import between_steps
from harness.train.engine import Engine
from harness.train.run import run
from harness.train.state import Observer
from shards.files import UnreachableError
from toy_runs import make_config


class Unplugged(Observer):
    """A fault: from step `number` on no sample can be read on this rank."""

    def __init__(self, number: int) -> None:
        self.number = number

    def step_taken(self, run, step) -> None:
        if run.state.step == self.number and run.engine.rank == 1:
            run.loader._reading.readers[0].read = self.fail

    def fail(self, index: int) -> None:
        raise UnreachableError("the network of rank 1 is down")


def unanswered(*given, **named) -> None:
    raise UnreachableError("the dev set of rank 0 does not answer")


def main(root: Path) -> None:
    Engine.close = Engine.wait  # the group serves both runs of this process
    between_steps.evaluate_model = unanswered
    for name, dev in (("ranks", False), ("dev-ranks", True)):
        config = make_config(root, root / "clip", root / "t5", name, dev=dev, save_every=100)
        try:
            run(config, observers=[] if dev else [Unplugged(3)])
        except UnreachableError as error:
            (root / f"{name}-{os.environ['RANK']}.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
