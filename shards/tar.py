"""The members of a tar, by walking its 512-byte headers."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shards.files import ShardError

BLOCK = 512


_ZEROS = bytes(BLOCK)


_PAX = re.compile(rb"^[0-9]+ (path|size)=(.*)$", re.MULTILINE)


_NAME = re.compile(
    r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL
)  # WebDataset: the key ends at the first dot


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its first header is at `start`, its content at `offset`."""

    key: str
    extension: str
    start: int
    offset: int
    size: int


def members(
    read: Callable[[int, int], bytes], end: int, begin: int = 0, whole: bool = False
) -> Iterator[Member]:
    """Walks the 512-byte headers of a tar, or of one sample of it, from `begin` to `end` by
    `read(offset, n)`.

    Offsets only grow. Understands ustar, GNU and PAX names. `whole`: the tar must close with its
    end marker. Raises ShardError naming the offset of what is not a sound header of a plain file.
    """
    offset, start, name, length = begin, None, None, None
    while offset < end:
        header = read(offset, BLOCK)
        if whole and header == _ZEROS:
            return _check_rest(read, offset, end)
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ShardError(
                f"no valid tar header at offset {offset} ({error}): the shard is damaged"
            ) from error
        start = offset if start is None else start
        plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
        content = length if plain and length is not None else info.size
        offset += BLOCK
        if content < 0 or offset + content > end:
            raise ShardError(
                f"the data ends inside the member {info.name!r} at offset {start}: the shard is damaged"
            )
        if plain:
            match = _NAME.fullmatch(name or info.name)
            key, extension = match.groups() if match else (name or info.name, "")
            yield Member(key, extension.lower(), start, offset, content)
            start = name = length = None
        elif info.type == tarfile.GNUTYPE_LONGNAME:  # what follows describes the next header
            name = read(offset, content).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            described = dict(_PAX.findall(read(offset, content)))
            name = (
                described[b"path"].decode("utf-8", "surrogateescape")
                if b"path" in described
                else None
            )
            length = int(described[b"size"]) if b"size" in described else None
        elif info.type in (
            tarfile.DIRTYPE,
            tarfile.XGLTYPE,
        ):  # a folder; comments on the whole archive
            start = None
        else:
            raise ShardError(
                f"the member {info.name!r} at offset {start} is a link or special file, not a plain one"
            )
        offset += -(-content // BLOCK) * BLOCK
    if whole:
        raise ShardError(f"the tar ends at {end} without its end marker: it is truncated")


def _check_rest(read: Callable[[int, int], bytes], offset: int, size: int) -> None:
    """A tar's end marker is two blocks of zeros with nothing but zeros behind; zeros alone may be a
    lost header.
    """
    if size - offset < 2 * BLOCK:
        raise ShardError(f"the tar ends at {size} inside its end marker: it is truncated")
    for start in range(offset, size, 1 << 20):
        if read(start, min(1 << 20, size - start)).strip(b"\0"):
            raise ShardError(
                f"zeros in place of the tar header at offset {offset}: the shard is damaged"
            )
