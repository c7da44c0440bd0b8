"""A child in a process of its own: `python -m harness.ablate.child OUT/VARIANT/seed-N`.

The config that the runner has put into that folder -> a run, and its scores on data.test. What it
says goes to log.txt, where its last words tell why it failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from harness.ablate.experiment import CONFIG
from harness.errors import explain
from harness.evaluate.run_on_disk import evaluate_run
from harness.machine.launcher import launch


def train_and_score(out: Path) -> None:
    """Trains through the launcher, going on from the newest checkpoint, then scores data.test."""
    if code := launch([str(out / CONFIG), "--resume", "auto"]):
        sys.exit(code)
    evaluate_run(out)


def main() -> None:
    try:
        train_and_score(Path(sys.argv[1]))
    except Exception as error:
        if (sentence := explain(error)) is None:
            raise
        sys.exit(f"harness: {sentence}")


if __name__ == "__main__":
    main()
