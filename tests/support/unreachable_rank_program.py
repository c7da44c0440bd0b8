"""What each of two processes does where the data of rank 1 alone stop to answer after step 3:
argument 1 is a folder with models; what the run says goes to RANK-told.txt there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

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


def main(root: Path) -> None:
    config = make_config(root, root / "clip", root / "t5", "ranks", dev=False, save_every=100)
    try:
        run(config, observers=[Unplugged(3)])
    except UnreachableError as error:
        (root / f"{os.environ['RANK']}-told.txt").write_text(str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
