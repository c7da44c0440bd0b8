"""Files of a set, local or remote: names, hashes, writing whole or not at all, the error that names
a place.
"""

from __future__ import annotations

import hashlib
import os
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


def sync(path: Path) -> None:
    """Makes a file's bytes, or what was renamed into a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
