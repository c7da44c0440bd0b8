"""A child in a process of its own: `python -m harness.ablate.child OUT/VARIANT/seed-N`.

The config that the runner has put into that folder -> a run, and its scores on data.test. What it
says goes to log.txt, where its last words tell why it failed.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from harness.ablate.experiment import CONFIG
from harness.errors import explain
from harness.machine.launcher import launch
from harness.machine.parent import PARENT, watch_parent
from harness.redact import guard_output, say


def main() -> None:
    """Trains through the launcher, going on from the newest checkpoint, then scores data.test."""
    runner = {name: os.environ[name] for name in (PARENT,) if name in os.environ}
    watch_parent()
    guard_output()
    out = sys.argv[1]
    try:
        code = launch([str(Path(out, CONFIG)), "--resume", "auto"])
    except Exception as error:
        if (sentence := explain(error)) is None:
            raise
        say(f"harness: {sentence}", sys.stderr)
        sys.exit(1)
    if code:
        sys.exit(code)
    # In this one's place, so that a signal reaches it and it knows the same parent; and torch is
    # imported where it is used.
    os.environ.update(runner)
    os.execv(sys.executable, [sys.executable, "-m", "harness", "evaluate", out])


if __name__ == "__main__":
    main()
