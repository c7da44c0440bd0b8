"""Processes that end with the one that started them, also where that was killed.

Who starts a process puts its own number into the environment; without it, as under nohup, a process
may outlive its parent.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

PARENT = "HARNESS_PARENT"
PERIOD = 0.5  # seconds between two looks; every system knows a parent, few can wait for its end


def as_parent() -> dict[str, str]:
    """Returns what the environment of a process must say that is to end with this one."""
    return {PARENT: str(os.getpid())}


def watch_parent(gone: Callable[[], object] | None = None) -> None:
    """Calls `gone` from another thread when the process that started this one has ended; without
    it, this one gets a SIGTERM.

    Nothing happens where that one has not asked for it; what this one starts does not inherit it.
    """
    parent = os.environ.pop(PARENT, None)

    def watch() -> None:
        while str(os.getppid()) == parent:
            time.sleep(PERIOD)
        gone() if gone else os.kill(os.getpid(), signal.SIGTERM)

    if parent is not None:
        threading.Thread(target=watch, name="parent", daemon=True).start()
