"""Remote shards fetched one window ahead, in a thread: no pause falls at the beginning of a window.

Where a reading process stands -> the shards of that window and of the next, in the cache.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence

from shards.files import ShardError
from shards.read import Reader
from shards.stream import Lanes


class Ahead:
    """The thread of a process that reads these lanes.

    `lag`: images by which other readers of the cache may be behind: a window is not left before
    all of them have left it, since the cache need hold no more than two.
    """

    def __init__(self, order: Lanes, lanes: Sequence[int], readers: Sequence[Reader], lag: int):
        self._order = copy.deepcopy(order)  # the reader's own remembers where it is
        self._lanes = lanes
        # whoever reads a shard has the patience, and says what does not answer
        self._readers = [reader.impatient() if reader.is_remote else None for reader in readers]
        self._lag = lag
        self._position: int | None = None  # in images of all epochs
        self._is_due = threading.Event()
        self._ends = False
        self._fetched: dict[tuple[int, int], set[int]] = {}  # (lane, set) -> shards of two windows
        threading.Thread(target=self._run, daemon=True, name="shards ahead").start()

    def move(self, epoch: int, position: int) -> None:
        """Tells where the process reads now."""
        there = epoch * self._order.samples + position
        if self._position is not None:
            there = max(self._position, there - self._lag)
        self._position = there
        self._is_due.set()

    def end(self) -> None:
        """Ends the thread after what it is fetching."""
        self._ends = True
        self._is_due.set()

    def _run(self) -> None:
        while self._is_due.wait() and not self._ends:
            self._is_due.clear()
            for reader, shard in self._due():
                if self._ends:
                    return
                try:
                    reader.fetch(shard)
                except (ShardError, OSError):
                    continue  # whoever reads it will say so

    def _due(self) -> Iterator[tuple[Reader, int]]:
        """Yields what was not fetched: first of the windows that are read now."""
        there = self._position or 0
        epoch = there // self._order.samples
        firsts = self._order.before(there % self._order.samples).tolist()
        for is_next in (False, True):
            for lane in self._lanes:
                windows = self._order.lanes[lane].windows_from(epoch, firsts[lane])
                for s, both in enumerate(windows):
                    known = self._fetched.setdefault((lane, s), set())
                    if (reader := self._readers[s]) is not None:
                        yield from (
                            (reader, shard) for shard in both[is_next] if shard not in known
                        )
                    if is_next:
                        self._fetched[lane, s] = {*both[0], *both[1]}
