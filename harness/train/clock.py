"""Where the time of a run goes, how fast its steps are, and how much memory they hold.

The run enters one phase after another (PHASES); `Clock.spent` has the seconds of each since the run
began, whose sum is all of its time. `data` is waiting: for what is read, decoded and collated, here
or by workers. `step` is everything that a GPU does for a step, too: each step ends by waiting for
it. So data / (data + step) near 0 is a run bound by computing; `evaluation` and `saving` are what
training stands still for. Every rank has a clock of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Literal

import psutil
import torch

Phase = Literal["data", "step", "evaluation", "saving", "rest"]
PHASES: tuple[Phase, ...] = ("data", "step", "evaluation", "saving", "rest")


def memory_mb(device: torch.device) -> float:
    """Returns the device's peak, or what this process holds in main memory now; in 2**20 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


class Clock:
    """Seconds of each phase; and since the last `reset` images and targets a second of data and
    steps, and the share of waiting for data.
    """

    def __init__(self) -> None:
        self._phase: Phase = "rest"
        self._all_images = 0.0
        self._mark = time.perf_counter()
        self._spent: dict[Phase, float] = dict.fromkeys(PHASES, 0.0)
        self.reset()

    @property
    def spent(self) -> Mapping[Phase, float]:
        """Seconds of each phase until now."""
        self.enter(self._phase)
        return dict(self._spent)

    def enter(self, phase: Phase) -> None:
        """Ends the phase that is on and begins another."""
        now = time.perf_counter()
        self._spent[self._phase] += now - self._mark
        self._mark = now
        self._phase = phase

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Is in a phase inside, and afterwards in the one before: a save within an evaluation is
        saving.
        """
        before = self._phase
        self.enter(phase)
        try:
            yield
        finally:
            self.enter(before)

    def stood_still(self, seconds: float) -> None:
        """Counts a part of the steps as waiting for data: what a GPU had nothing to do for."""
        self._spent["step"] -= seconds
        self._spent["data"] += seconds

    def count(self, images: float, targets: float) -> None:
        """Counts what a step has learnt from."""
        self._images += images
        self._all_images += images
        self._targets += targets

    def leave_out(self, seconds: float) -> None:
        """Takes so many seconds of steps for rest, and begins the rates anew: a warm-up."""
        self.enter(self._phase)
        self._spent["step"] -= seconds
        self._spent["rest"] += seconds
        self.reset()

    def reset(self) -> None:
        """Begins the rates anew."""
        self._images = self._targets = 0.0
        self._before = self.spent

    def rates(self) -> dict[str, float]:
        now = self.spent
        wait = now["data"] - self._before["data"]
        seconds = max(wait + now["step"] - self._before["step"], 1e-9)
        return {
            "images_per_second": self._images / seconds,
            "targets_per_second": self._targets / seconds,
            "data_wait": wait / seconds,
        }

    @property
    def images_per_second(self) -> float:
        """Of all steps so far, what they waited for data included."""
        spent = self.spent
        return self._all_images / max(spent["data"] + spent["step"], 1e-9)
