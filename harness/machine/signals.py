"""How a run is asked to stop: a signal in, a function that the loop asks at every step out."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil

STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def signal_run(number: int, launcher: int) -> None:
    """Sends a signal to the processes of a run, to the launcher only while there are none.

    torchrun would give them 30 seconds to end, a simple launch would leave them behind.
    """
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(launcher)
        for each in process.children() or [process]:
            with suppress(psutil.NoSuchProcess):
                each.send_signal(number)


@contextmanager
def stop_requests() -> Iterator[Callable[[], int]]:
    """Yields a function that tells which signal came first, or 0: the run then saves and ends, as
    before a preemption.

    Two may be one Ctrl-C, from the terminal and from the launcher; the third ends the process at
    once.
    """
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        if len(came) == 1 and os.environ.get("RANK", "0") == "0":
            os.write(2, b"\nharness: saving, then stopping; twice more to stop at once\n")
        if len(came) > 2:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # Under nohup a signal stays ignored.
    wanted = [number for number in STOPS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in wanted}
    try:
        yield lambda: came[0] if came else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
