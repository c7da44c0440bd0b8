"""What a store is still to be given besides figures: files of OUT/outbox, until they are sent.

A page of answers, a table, tags or a status in; the same out, in that order, also in another
process: of a run that was killed, or whose store did not answer, nothing is lost.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from shards.files import write_whole

log = logging.getLogger(__name__)

FOLDER = "outbox"


class Outbox:
    """The queue in OUT/outbox."""

    def __init__(self, out: Path) -> None:
        self.folder = out / FOLDER
        self._count = max((int(file.name[:8]) for file in self.waiting()), default=0)

    def waiting(self) -> list[Path]:
        """Returns what is there, the oldest first."""
        return sorted(self.folder.glob(f"{'[0-9]' * 8}-*.json"))

    def put(self, job: dict[str, Any]) -> Path:
        """Writes a job down. Two processes (a run and its evaluation) never take one name."""
        self._count += 1
        path = self.folder / f"{self._count:08d}-{os.getpid()}.json"
        write_whole(path, json.dumps(job).encode())
        return path

    @staticmethod
    def read(path: Path) -> dict[str, Any] | None:
        """Returns a job; None where another process sent it, or, with a warning, it is damaged."""
        try:
            return dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, TypeError, ValueError) as error:
            log.warning("%s is damaged and reaches no store: %s", path, error)
            return None

    def clear(self) -> None:
        """Removes what an earlier run in this folder left."""
        for file in self.waiting():
            file.unlink(missing_ok=True)
