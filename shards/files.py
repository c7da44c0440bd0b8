"""Files of a set, local or remote: names, hashes, writing whole or not at all, the error that names
a place.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path


class ShardError(ValueError):
    """A set of shards that is missing, damaged or does not match its index; the message names the
    place.
    """

    is_for_user = True  # harness.errors tells its message in place of a traceback


class UnreachableError(ShardError):
    """Data that did not answer, or found no room here: no fault of a sample, so a run saves and
    stops.
    """


def is_remote(location: str) -> bool:
    return "://" in location and not location.startswith("file://")


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/')}/{name}"


def is_count(value: object) -> bool:
    """Tells whether it may be a number of things, as JSON holds it."""
    return type(value) is int and value >= 0


@dataclass(frozen=True)
class FileInfo:
    """One file of a set: its sidecar, or the controls of a feature set."""

    name: str
    bytes: int
    sha256: str


def file_info(name: str, data: bytes) -> FileInfo:
    return FileInfo(name, len(data), hashlib.sha256(data).hexdigest())


def write_whole(path: Path, data: bytes) -> FileInfo:
    """Writes beside, syncs, renames: the file is whole or absent. Makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.writing")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return file_info(path.name, data)


def read_plain(path: Path) -> bytes:
    """Returns the bytes of a plain file. Raises OSError for any other: to read a pipe that nobody
    writes to would wait for ever.
    """
    if path.exists() and not path.is_file():
        raise OSError(f"{path} is no plain file")
    return path.read_bytes()


# How files begin that are no UTF-8; the longer beginning first.
_BEGINNINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
    b"\x1f\x8b": "a gzip file",
    b"PK\x03\x04": "a zip file",
}


def other_encoding(data: bytes) -> str | None:
    """Returns what a file looks like that is no UTF-8 text by its first bytes; None: no such."""
    for beginning, name in _BEGINNINGS.items():
        if data.startswith(beginning):
            return name
    start = data[:1000]
    zeros = start.count(0)  # every second byte of UTF-16 that holds mostly ASCII
    return "UTF-16 or UTF-32" if zeros * 3 > len(start) else None


def decode(data: bytes, what: str) -> str:
    """Returns the text of a UTF-8 file (a byte order mark is dropped, line ends are "\\n").

    Raises ShardError: a short sentence that names `what` and the encoding that it looks like.
    """
    looks_like = other_encoding(data)
    if not looks_like:
        try:
            # As any reader of text gives it.
            return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
        except UnicodeDecodeError as error:
            place = f"{error.reason} at byte {error.start}"
            looks_like = f"Latin-1 or Windows-1252 ({place})"
            if re.search(rb"[\x00-\x08\x0e-\x1f]", data):
                looks_like = f"no text at all ({place})"
    raise ShardError(f"{what} is not UTF-8 text: it looks like {looks_like}; save it as UTF-8")


def sync(path: Path) -> None:
    """Makes a file's bytes, or what was renamed into a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
