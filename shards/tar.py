"""The members of a tar, by walking its 512-byte headers, and the samples they make.

The walk is our own, and webdataset only writes (its TarWriter): its reader, like any plain one,
ends silently at a damaged header, never notices damaged bytes, and gives no offsets. An order that
resumes by a seek needs the place of each sample, and an error has to name it.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from typing import BinaryIO

from shards.files import ShardError
from shards.remote import Patience, Stream

BLOCK = 512
_ZEROS = bytes(BLOCK)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_IGNORED = (tarfile.DIRTYPE, tarfile.XGLTYPE)  # a folder; comments on the whole archive
_PAX = re.compile(rb"^[0-9]+ (path|size)=(.*)$", re.MULTILINE)
# WebDataset: the key ends at the first dot
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its first header is at `start`, its content at `offset`."""

    key: str
    extension: str
    start: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Group:
    """The adjacent files of one key: one sample, from its first header at `start` to its last byte
    at `end`. `crc` is that of all contents in tar order.
    """

    key: str
    start: int
    end: int
    crc: int
    members: dict[str, Member]  # by extension, as the contents
    contents: dict[str, bytes]


def groups(
    read: Callable[[int, int], bytes], end: int, begin: int = 0, whole: bool = True
) -> Iterator[Group]:
    """Walks as `members` does. Raises ShardError also for two files of one name in a sample."""
    for key, run in groupby(members(read, end, begin, whole), attrgetter("key")):
        found: dict[str, Member] = {}
        contents: dict[str, bytes] = {}
        crc = 0
        for member in run:
            name = member.extension
            if name in found:
                raise ShardError(f"{key}.{name} occurs twice, again at offset {member.start}")
            found[name] = member
            contents[name] = read(member.offset, member.size)
            crc = zlib.crc32(contents[name], crc)
        start = next(iter(found.values())).start
        yield Group(key, start, member.offset + member.size, crc, found, contents)


def members(
    read: Callable[[int, int], bytes], end: int, begin: int = 0, whole: bool = False
) -> Iterator[Member]:
    """Walks the 512-byte headers of a tar, or of one sample of it, from `begin` to `end` by
    `read(offset, n)`.

    Offsets only grow. Understands ustar, GNU and PAX names. `whole`: the tar must close with its
    end marker. Raises ShardError naming the offset of what is not a sound header of a plain file.
    """
    offset = begin
    start = name = length = None
    while offset < end:
        header = read(offset, BLOCK)
        if whole and header == _ZEROS:
            return _check_rest(read, offset, end)
        info = _header(header, offset)
        start = offset if start is None else start
        plain = info.type in _PLAIN
        content = length if plain and length is not None else info.size
        offset += BLOCK
        if content < 0 or offset + content > end:
            raise ShardError(
                f"the data ends inside the member {info.name!r} at offset {start}: "
                "the shard is damaged"
            )
        if plain:
            path = name or info.name
            match = _NAME.fullmatch(path)
            key = match[1] if match else path
            extension = match[2].lower() if match else ""
            yield Member(key, extension, start, offset, content)
            start = name = length = None
        elif info.type == tarfile.GNUTYPE_LONGNAME:  # what follows describes the next header
            name = _decoded(read(offset, content).rstrip(b"\0"))
        elif info.type == tarfile.XHDTYPE:
            described = dict(_PAX.findall(read(offset, content)))
            name = _decoded(described.get(b"path", b"")) or None
            length = int(described[b"size"]) if b"size" in described else None
        elif info.type in _IGNORED:
            start = None
        else:
            raise ShardError(
                f"the member {info.name!r} at offset {start} is a link or special file, "
                "not a plain one"
            )
        offset += -(-content // BLOCK) * BLOCK
    if whole:
        raise ShardError(f"the tar ends at {end} without its end marker: it is truncated")


def _header(data: bytes, offset: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(data, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise ShardError(
            f"no valid tar header at offset {offset} ({error}): the shard is damaged"
        ) from error


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _check_rest(read: Callable[[int, int], bytes], offset: int, size: int) -> None:
    """Checks that a tar's end marker is two blocks of zeros with nothing but zeros behind; zeros
    alone may be a lost header.
    """
    if size - offset < 2 * BLOCK:
        raise ShardError(f"the tar ends at {size} inside its end marker: it is truncated")
    for start in range(offset, size, 1 << 20):
        if read(start, min(1 << 20, size - start)).strip(b"\0"):
            raise ShardError(
                f"zeros in place of the tar header at offset {offset}: the shard is damaged"
            )


class OnePass:
    """A stream read by `read(offset, n)` with growing offsets, every byte that goes by hashed."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._position = 0
        self._sha256 = hashlib.sha256()

    def __call__(self, offset: int, n: int) -> bytes:
        while (gap := offset - self._position) > 0 and self._read(min(gap, 1 << 20)):
            pass
        return self._read(n)

    def _read(self, n: int) -> bytes:
        data = self._file.read(n)
        self._position += len(data)
        self._sha256.update(data)
        return data

    def finish(self) -> tuple[int, str]:
        """Returns (bytes, sha256) of the whole stream, the rest included."""
        while self._read(1 << 20):
            pass
        return self._position, self._sha256.hexdigest()


@contextmanager
def open_shard(location: str, patience: Patience | None = None) -> Iterator[tuple[OnePass, int]]:
    """Opens a shard as (one-pass reader, its size in bytes)."""
    try:
        file = Stream(location, patience or Patience())
    except FileNotFoundError as error:
        raise ShardError(f"{location} cannot be opened: it does not exist") from error
    with file:
        if file.size is None:
            raise ShardError(f"{location}: the server does not say how large it is")
        yield OnePass(file), file.size
