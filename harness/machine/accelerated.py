"""`accelerate launch` as `harness train` runs it: python -m harness.machine.accelerated OPTIONS.

What it adds: it ends with the exit code of the process that failed first, 128 + N where a signal
ended that, tells of the signal in a sentence and not in torchrun's screen, and hands a stop on to
the run when `harness train` itself was killed.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Mapping

from accelerate.commands.launch import main as accelerate
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from harness.machine.heartbeat import HUNG
from harness.machine.parent import as_parent, watch_parent
from harness.machine.signals import STOPS, signal_run
from harness.redact import say


def main() -> int:
    """Runs `accelerate launch` with this program's arguments and returns the exit code."""
    watch_parent(lambda: signal_run(signal.SIGTERM, os.getpid()))
    os.environ.update(as_parent())
    logging.disable(logging.ERROR)  # torchrun's account of a failure, which the run has told itself
    try:
        accelerate()
    except subprocess.CalledProcessError as error:
        return _told(error.returncode, rank=None)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        rank = cause(codes)
        return _told(codes[rank], rank)
    return 0


def cause(codes: Mapping[int, int]) -> int:
    """Returns the rank that the others ended for, from the exit codes of those that failed.

    One that had to end tells why; else a signal tells most, but for those of torchrun, which stops
    the others and kills what does not end.
    """
    had_to = (HUNG, *(128 + number for number in STOPS))
    return min(
        codes,
        key=lambda rank: (codes[rank] not in had_to, -codes[rank] in STOPS, codes[rank]),
    )


def _told(code: int, rank: int | None) -> int:
    """Returns a process's exit code as a shell has it; tells of a signal that nobody asked for."""
    if code >= 0:
        return code
    number = signal.Signals(-code)
    if number not in STOPS:
        who = "the run" if rank is None else f"rank {rank}"
        memory = ", as the system does when main memory is out" if number == signal.SIGKILL else ""
        say(
            f"harness: {who} was ended by {number.name}{memory}; go on with --resume auto",
            sys.stderr,
        )
    return 128 - code


if __name__ == "__main__":
    sys.exit(main())
