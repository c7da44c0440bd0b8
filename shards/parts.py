"""Work that is cut into parts: each process makes its own, the first puts all together in order.

Number of a part -> its bytes, in a file beside the result that is whole or absent. So work that was
killed goes on after its last whole part, and processes need nothing in common but the folder.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.files import write_whole
from shards.stream import deal

logger = logging.getLogger(__name__)

POLL = 0.1  # seconds between two looks for a part that another process makes
TOLD_AFTER = 60.0  # seconds of waiting for one

Make = Callable[[int], bytes]


@dataclass(frozen=True)
class Share:
    """The process that this one is, of how many."""

    rank: int = 0
    world_size: int = 1

    def of(self, count: int) -> range:
        """Returns the parts that are this one's to make: a stretch without a gap."""
        return range(count)[deal(count, self.rank, self.world_size)]


class Parts:
    """The parts of one result, in a folder beside it whose name says what they are made of."""

    def __init__(self, out: Path, made_of: Any, count: int, share: Share):
        """`made_of`: all that they depend on, as JSON; parts made of anything else are not seen."""
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        self._out = Path(out).absolute()
        self._folder = self._out.with_name(f"{self._prefix}{digest[:16]}")
        self._count = count
        self._own = share.of(count)

    @property
    def _prefix(self) -> str:
        return f".{self._out.name}.parts-"

    def make_own(self, make: Make) -> None:
        """Makes those of this process that are not there."""
        for number in self._own:
            if not self._path(number).exists():
                write_whole(self._path(number), make(number))

    def each(self, make: Make, first: int = 0) -> Iterator[tuple[int, bytes]]:
        """Yields all from the `first` on, in their order, with their numbers: makes its own where
        they are not there, waits for those of others.
        """
        for number in range(first, self._count):
            path = self._path(number)
            if number in self._own and not path.exists():
                write_whole(path, make(number))
            self._wait_for(path)
            yield number, path.read_bytes()

    def _wait_for(self, path: Path) -> None:
        """Waits for what another process makes; a launcher ends all where that one fails."""
        tell_at = time.monotonic() + TOLD_AFTER
        while not path.exists():
            time.sleep(POLL)
            if time.monotonic() > tell_at:
                logger.warning("waiting for another process to make %s", path)
                tell_at = time.monotonic() + TOLD_AFTER

    def remove(self) -> None:
        """Removes them, and what was made for this result of anything else."""
        for folder in self._out.parent.glob(f"{glob.escape(self._prefix)}*"):
            shutil.rmtree(folder)

    def _path(self, number: int) -> Path:
        return self._folder / f"{number:06d}"
