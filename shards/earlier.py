"""What a build that was killed had prepared already: the next one takes its images from there.

A build notes each image that goes into a shard in `prepared.jsonl` beside its shards; a killed one
leaves both. An image is taken from these shards if its file and the options are as they were and
its bytes have the checksum that was noted: so the new shards are those of an undisturbed build.
"""

from __future__ import annotations

import base64
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import PIL

from shards.files import ShardError
from shards.prepare import JPEG_QUALITY, Outcome, Prepared
from shards.record import RecordError
from shards.sources.source import ImageFiles, Item, Source
from shards.statistics import COLUMNS
from shards.tar import Member, members
from shards.write import left_beside

JOURNAL = "prepared.jsonl"
TAKEN = "images taken from a build that was killed"
_FLUSHED_AFTER = 64  # lines


class _Noted(NamedTuple):
    """A line of a journal, with the place of the payload."""

    stamp: str
    extension: str
    changed: str
    crc: int
    row: str
    tar: int  # its descriptor
    member: Member


class Journal:
    """Notes what goes into the shards beside it, and gives what an earlier one noted.

    Made before the folder of the build is, since what killed ones left goes with that.
    """

    def __init__(self, out: Path, files: ImageFiles, options: tuple[int | None, int]):
        self._files = files
        self._head = json.dumps([*options, JPEG_QUALITY, PIL.__version__, COLUMNS])
        self._noted: dict[str, _Noted] = {}
        self._tars: list[int] = []
        self._file: TextIO | None = None
        self._lines = 0
        for folder in left_beside(out):
            self._read(folder)

    def _read(self, folder: Path) -> None:
        """Reads what one left, as far as it is whole."""
        try:
            lines = (folder / JOURNAL).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            return
        if lines[:1] != [self._head]:
            return
        places: dict[tuple[str, str, str], tuple[int, Member]] = {}
        for path in folder.rglob("*.tar"):
            tar = os.open(path, os.O_RDONLY)  # open, it outlives its name
            self._tars.append(tar)
            split = path.name.rpartition("-")[0]
            for member in _members(tar):
                places[split, member.key, member.extension] = (tar, member)
        for line in lines[1:]:
            try:
                split, key, image, stamp, extension, changed, crc, row = json.loads(line)
                place = places[split, key, extension]
                self._noted[image] = _Noted(stamp, extension, changed, crc, row, *place)
            except (ValueError, KeyError):  # the last line may be cut off, and its image not there
                continue

    def taking(
        self,
        source: Source,
        items: Sequence[Item],
        prepare: Callable[[Sequence[Item]], Iterator[tuple[Item, Outcome]]],
    ) -> Iterator[tuple[Item, Outcome]]:
        """Yields items with what becomes of them, in their order; `prepare` does those that are not
        there.
        """
        known = {item.record.key for item in items if self._noted and self._has(item)}
        rest = prepare([item for item in items if item.record.key not in known])
        for item in items:
            if item.record.key not in known:
                yield next(rest)
            elif (found := self._taken(item.name)) is not None:
                source.notes[TAKEN] += 1
                yield item, found
            else:
                yield from prepare([item])

    def _has(self, item: Item) -> bool:
        noted = None if item.image is None else self._noted.get(item.image)
        try:
            item.record.check()
            item.record.to_json()
        except RecordError:
            return False
        return noted is not None and noted.stamp == self._files.stamp(item.name)

    def _taken(self, image: str) -> Prepared | None:
        noted = self._noted[image]
        payload = os.pread(noted.tar, noted.member.size, noted.member.offset)
        if zlib.crc32(payload) != noted.crc:  # the machine went down before it was on the disk
            return None
        row_K = np.frombuffer(base64.b64decode(noted.row), "<f4")
        return payload, noted.extension, noted.changed, row_K

    def begin(self, folder: Path) -> None:
        """Notes from now on in the folder of this build."""
        self._file = open(folder / JOURNAL, "w", encoding="utf-8")  # noqa: SIM115  `end` closes it
        self._file.write(self._head + "\n")

    def note(self, item: Item, prepared: Prepared) -> None:
        """Notes what an image became; a record without one costs nothing to make again."""
        if item.image is None:
            return
        payload, extension, changed, row_K = prepared
        row = base64.b64encode(row_K.astype("<f4").tobytes()).decode()
        stamp = self._files.stamp(item.image)
        where = (item.record.split, item.record.key, item.image, stamp)
        line = json.dumps([*where, extension, changed, zlib.crc32(payload), row])
        assert self._file is not None  # `begin` opened it
        self._file.write(line + "\n")
        self._lines += 1
        if self._lines % _FLUSHED_AFTER == 0:
            self._file.flush()

    def end(self) -> None:
        """Removes the journal: the shards are complete."""
        assert self._file is not None
        os.unlink(self._file.name)

    def close(self) -> None:
        if self._file:
            self._file.close()
        for tar in self._tars:
            os.close(tar)


def _members(tar: int) -> Iterator[Member]:
    """Yields the whole members of a tar that may end anywhere."""
    size = os.fstat(tar).st_size

    def read(offset: int, count: int) -> bytes:
        return os.pread(tar, count, offset)

    try:
        yield from members(read, size)
    except ShardError:
        return
