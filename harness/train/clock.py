"""How long the steps take and how much memory they hold."""

from __future__ import annotations

import time

import psutil
import torch


def memory_mb(device: torch.device) -> float:
    """Returns the device's peak, or what this process holds in main memory now; in 2**20 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return psutil.Process().memory_info().rss / 2**20


class Clock:
    """Speed since the last `reset`: images and targets a second, the share of waiting for data."""

    def __init__(self) -> None:
        self.restart()
        self.reset()

    def reset(self) -> None:
        self._images = self._targets = self._wait = self._busy = 0.0

    def restart(self) -> None:
        """Leaves out what came after the step, an evaluation or a checkpoint."""
        self._mark = time.perf_counter()

    def waited(self) -> None:
        self._wait += self._lap()

    def step(self, images: float, targets: float) -> None:
        self._busy += self._lap()
        self._images += images
        self._targets += targets

    def _lap(self) -> float:
        before = self._mark
        self.restart()
        return self._mark - before

    def rates(self) -> dict[str, float]:
        seconds = max(self._wait + self._busy, 1e-9)
        return {
            "images_per_second": self._images / seconds,
            "targets_per_second": self._targets / seconds,
            "data_wait": self._wait / seconds,
        }
