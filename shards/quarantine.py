"""What could not be read: named once in a file, told by kind of fault, and how much is too much.

A reading process's errors -> quarantine.jsonl, a summary, a bound for each set.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections import Counter
from pathlib import Path

logger = logging.getLogger(__name__)

_FEW = 20  # samples of a set that may be unreadable in an epoch, whatever the share
_KINDS = 1000  # told apart; all others are one
FILE = "quarantine.jsonl"  # in the folder of a run or of an evaluation
NAMED = 100_000  # samples kept by name, some 100 bytes each; beyond that they are only counted
_PLACE = re.compile(r"\A.*?, key .*?: ", re.DOTALL)
_VARYING = re.compile(r"b?'[^']*'|b?\"[^\"]*\"|\b[0-9a-f]{8,}\b|[-+]?\d[\d.]*")

Fault = tuple[str, str]  # folder of a set, kind of fault


def most_unreadable(images: int, share: float) -> float:
    """Returns how many of a set's `images` of an epoch may be unreadable: `share` of them, but at
    least 20, and at most half of them; any number where the share is 1.
    """
    return math.inf if share >= 1 else min(images // 2, max(_FEW, math.ceil(share * images)))


def fault(folder: str, error: str) -> Fault:
    """Returns the set and the error without what differs from sample to sample."""
    return folder, _VARYING.sub("N", _PLACE.sub("", error, count=1))[:160]


def count_fault(faults: Counter[Fault], one: Fault, n: int = 1) -> None:
    """Adds to the counts, whose number of kinds is bounded."""
    known = one in faults or len(faults) < _KINDS
    faults[one if known else (one[0], "other faults")] += n


def summary(faults: Counter[Fault]) -> str:
    """Returns the ten most frequent faults in words, by set and kind."""
    rows = faults.most_common(10)
    words = "; ".join(f"{folder}: {n} x {kind}" for (folder, kind), n in rows)
    rest = faults.total() - sum(n for _, n in rows)
    return words + (f"; {rest} of other kinds" if rest else "")


class Quarantine:
    """The file that names each unreadable sample once, however often the run is restarted and
    whichever rank or epoch meets the sample again.
    """

    def __init__(self, path: Path | None):
        self._path = path
        self._read_to = 0
        self._named: set[tuple[str, int]] = set()

    def add(self, folder: str, index: int, key: str, error: str) -> None:
        """Names the sample, unless it is named. Where the disk is full it is logged alone."""
        if self._path is None:
            return
        try:
            self._add(self._path, folder, index, key, error)
        except OSError as problem:
            logger.warning("%s cannot name %s of %s: %s", self._path, key, folder, problem)

    def _add(self, path: Path, folder: str, index: int, key: str, error: str) -> None:
        is_torn = self._read_others(path)
        if (folder, index) in self._named or len(self._named) >= NAMED:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        line = {"set": folder, "index": index, "key": key, "error": error}
        with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
            # one short write: ranks do not mix lines
            file.write("\n" * is_torn + json.dumps(line, ensure_ascii=False) + "\n")

    def _read_others(self, path: Path) -> bool:
        """Reads what earlier processes, other ranks and this one have named since the last look.

        Tells whether the last line was torn by a kill.
        """
        if not path.is_file():
            return False
        with path.open("rb") as file:
            file.seek(self._read_to)
            for line in file:
                if not line.endswith(b"\n"):
                    return True
                self._read_to += len(line)
                try:
                    row = json.loads(line)
                    self._named.add((row["set"], row["index"]))
                except (ValueError, TypeError, KeyError, RecursionError):
                    continue  # torn: its sample is named again
        return False
