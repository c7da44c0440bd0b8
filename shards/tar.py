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
from pathlib import Path
from typing import BinaryIO

from shards.files import ShardError, is_remote
from shards.remote import Patience, Stream

BLOCK = 512
_ZEROS = bytes(BLOCK)
_PLAIN = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
# a folder; comments on the whole archive; the name of what a link leads to
_IGNORED = (tarfile.DIRTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
_DESCRIPTIONS = (*_IGNORED, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)
_WITHOUT_CONTENT = (
    *(tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE),
    tarfile.DIRTYPE,
)
# No file has a size of more than 20 digits; what else stands there is nonsense, and the header's
# own size holds.
_PAX = re.compile(rb"^[0-9]+ (path|size)=(.*)$", re.MULTILINE)
_SIZE = re.compile(rb"[0-9]{1,20}")
_LONGEST_DESCRIPTION = 1 << 20  # bytes of a long name, or of PAX fields
# What a Mac adds to every archive: no files of the set.
_OF_A_MAC = re.compile(r"(?:.*/|)(?:\._[^/]*|\.DS_Store)", re.DOTALL)
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# WebDataset: the key ends at the first dot
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its first header is at `start`, its content at `offset`. `problem` says why
    it cannot be one of a sample.
    """

    key: str
    extension: str
    start: int
    offset: int
    size: int
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Group:
    """The adjacent files of one key: one sample, from its first header at `start` to its last byte
    at `end`. `crc` is that of all contents in tar order. `problem` says why it cannot be used: it
    holds a link, or two files of one name.
    """

    key: str
    start: int
    end: int
    crc: int
    members: dict[str, Member]  # by extension, as the contents
    contents: dict[str, bytes]
    problem: str


def groups(
    read: Callable[[int, int], bytes],
    end: int,
    begin: int = 0,
    whole: bool = True,
    on_stray: Callable[[Member], None] = lambda member: None,
) -> Iterator[Group]:
    """Walks as `members` does. `on_stray` is told of what a Mac added, which no group holds."""

    def files() -> Iterator[Member]:
        for member in members(read, end, begin, whole):
            if _OF_A_MAC.fullmatch(member.key):
                on_stray(member)
            else:
                yield member

    for key, run in groupby(files(), attrgetter("key")):
        found: dict[str, Member] = {}
        contents: dict[str, bytes] = {}
        crc = 0
        problem = ""
        for member in run:
            name = member.extension
            problem = problem or member.problem
            if name in found:
                problem = f"{key}.{name} occurs twice, again at offset {member.start}"
            found.setdefault(name, member)
            contents[name] = read(member.offset, member.size)
            crc = zlib.crc32(contents[name], crc)
        start = next(iter(found.values())).start
        yield Group(key, start, member.offset + member.size, crc, found, contents, problem)


def members(
    read: Callable[[int, int], bytes], end: int, begin: int = 0, whole: bool = False
) -> Iterator[Member]:
    """Walks the 512-byte headers of a tar, or of one sample of it, from `begin` to `end` by
    `read(offset, n)`.

    Offsets only grow. Understands ustar, GNU and PAX names; bytes of a name that are not UTF-8 are
    read as `\\xff`. `whole`: the tar must close with its end marker. Raises ShardError naming the
    offset of what is not a sound header.
    """
    offset = begin
    start = name = length = None
    while offset < end:
        header = read(offset, BLOCK)
        if whole and header == _ZEROS:
            return _check_rest(read, offset, end)
        info = _header(header, offset)
        start = offset if start is None else start
        is_file = info.type not in _DESCRIPTIONS
        offset += BLOCK
        content = info.size
        if info.type in _WITHOUT_CONTENT:
            content = 0
        elif is_file and length is not None and offset + length <= end:
            content = length
        if content < 0 or offset + content > end:
            raise ShardError(
                f"the data ends inside the member {info.name!r} at offset {start}: "
                "the shard is damaged"
            )
        if is_file:
            yield _member(name or info.name, info.type, start, offset, content)
            start = name = length = None
        elif info.type in _IGNORED:
            start = None
        elif content > _LONGEST_DESCRIPTION:
            raise ShardError(f"the name of the member at offset {start} has {content} bytes")
        elif info.type == tarfile.GNUTYPE_LONGNAME:  # what follows describes the next header
            name = _decoded(read(offset, content))
        else:
            described = dict(_PAX.findall(read(offset, content)))
            name = _decoded(described.get(b"path", b""))
            size = described.get(b"size", b"")
            length = int(size) if _SIZE.fullmatch(size) else None
        offset += -(-content // BLOCK) * BLOCK
    if whole:
        raise ShardError(f"the tar ends at {end} without its end marker: it is truncated")


def _member(path: str, kind: bytes, start: int, offset: int, size: int) -> Member:
    match = _NAME.fullmatch(path)
    key = match[1] if match else path
    extension = match[2].lower() if match else ""
    problem = "" if kind in _PLAIN else f"the member {path!r} is a link or special file"
    return Member(key, extension, start, offset, size, problem)


def _header(data: bytes, offset: int) -> tarfile.TarInfo:
    try:
        return tarfile.TarInfo.frombuf(data, "utf-8", "backslashreplace")
    except tarfile.HeaderError as error:
        for magic, name in _COMPRESSED.items():
            if offset == 0 and data.startswith(magic):
                raise ShardError(
                    f"it is compressed ({name}), and a sample is read by its place in a plain tar: "
                    "unpack the file first, as with `gunzip`, and leave the tar"
                ) from error
        raise ShardError(
            f"no valid tar header at offset {offset} ({error}): the shard is damaged"
        ) from error


def _decoded(name: bytes) -> str:
    return name.partition(b"\0")[0].decode("utf-8", "backslashreplace")


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
    if not is_remote(location) and Path(location).exists() and not Path(location).is_file():
        raise ShardError(f"{location} is no plain file")  # to open a FIFO would wait for ever
    try:
        file = Stream(location, patience or Patience())
    except FileNotFoundError as error:
        raise ShardError(f"{location} cannot be opened: it does not exist") from error
    with file:
        if file.size is None:
            raise ShardError(f"{location}: the server does not say how large it is")
        yield OnePass(file), file.size
