"""Micro-batches on their way to the device.

On a GPU they are copied from pinned memory on a stream of their own: each while the one before it
is computed, the first of a step while the step before it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch

from harness.model.batch import Batch


class Transfer:
    """The way to one device; that to the CPU is none."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._ahead: tuple[Batch, Batch] | None = None  # in main memory, and on the device

    def send_ahead(self, batches: Sequence[Batch]) -> None:
        """Begins to copy the first of a later step's micro-batches."""
        self._ahead = (batches[0], self._sent(batches[0])) if batches else None

    def arriving(self, batches: Sequence[Batch]) -> Iterator[Batch]:
        """Yields each on the device, where what is computed next may use it."""
        for place, batch in enumerate(batches):
            if self._ahead is None or self._ahead[0] is not batch:
                self._ahead = batch, self._sent(batch)
            arrived = self._ahead[1]
            self._await(arrived)
            self.send_ahead(batches[place + 1 : place + 2] if self.stream else ())
            yield arrived

    def _sent(self, batch: Batch) -> Batch:
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            return batch.to(self.device)

    def _await(self, batch: Batch) -> None:
        """Has the device, not the host, wait for the copy; its memory is kept until it is used."""
        if self.stream is None:
            return
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        batch.mapped(partial(_kept_for, computing))


def _kept_for(stream: torch.cuda.Stream, tensor: torch.Tensor) -> torch.Tensor:
    tensor.record_stream(stream)
    return tensor
