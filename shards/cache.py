"""Remote files in a local folder of bounded size, shared by any number of processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec

from shards.files import ShardError


class Cache:
    """Remote files in a folder of at most `max_bytes`, the least recently opened evicted first.

    Files are named by their sha256, downloaded beside and renamed once size and hash are right. Any
    number of processes may share the folder. What `open` gave stays readable after an eviction.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int, *, attempts: int = 3):
        self.folder = Path(folder)
        self.max_bytes = int(max_bytes)
        self._attempts = attempts
        self._lock = self.folder / ".lock"
        self.folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def at(cls, folder: str | os.PathLike | None, max_bytes: float | None) -> Cache | None:
        """Returns None where one of them is not given: then only local sets can be read."""
        return cls(folder, int(max_bytes)) if folder and max_bytes else None

    def open(self, url: str, size: int, sha256: str) -> int:
        """Returns a file descriptor for reading, the caller's to close; downloads what is not
        there.

        Raises ShardError for a file larger than the cache, unreachable, or not the one with this
        size and hash.
        """
        if size > self.max_bytes:
            raise ShardError(
                f"{url} has {size} bytes, the cache {self.folder} may hold only {self.max_bytes}"
            )
        path = self.folder / sha256
        part = self.folder / f"{sha256}.part"
        while True:
            with self._locked():
                if (number := self._present(path, size)) is not None:
                    return number
            number = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                # waits for another process that downloads the same file
                fcntl.flock(number, fcntl.LOCK_EX)
                if not self._is(part, number):
                    continue  # it is done, or gave up and removed it
                with self._locked():  # or was done before this one made its own part
                    if (done := self._present(path, size)) is not None:
                        part.unlink()
                        return done
                self._reserve(part, number, size)
                self._download(url, number, size, sha256)
                with self._locked():
                    os.replace(part, path)
                    return os.open(path, os.O_RDONLY)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            finally:
                fcntl.flock(number, fcntl.LOCK_UN)
                os.close(number)

    def _present(self, path: Path, size: int) -> int | None:
        try:
            number = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        if os.fstat(number).st_size != size:  # cut by a full disk or a crash of the machine
            os.close(number)
            path.unlink()
            return None
        os.utime(path)
        return number

    @staticmethod
    def _is(part: Path, number: int) -> bool:
        try:
            return os.path.samestat(os.stat(part), os.fstat(number))
        except FileNotFoundError:
            return False

    def _reserve(self, part: Path, number: int, size: int) -> None:
        """Makes room, then takes it by the length of the empty file; waits for room others have
        taken.
        """
        while True:
            with self._locked():
                entries = [
                    (entry, entry.stat())
                    for entry in self.folder.iterdir()
                    if entry not in (self._lock, part)
                ]
                taken = sum(stat.st_size for _, stat in entries)
                for entry, stat in sorted(entries, key=lambda item: item[1].st_mtime_ns):
                    if taken + size <= self.max_bytes:
                        break
                    if entry.suffix != ".part" or self._abandoned(entry):
                        entry.unlink()
                        taken -= stat.st_size
                if taken + size <= self.max_bytes:
                    return os.ftruncate(number, size)
            time.sleep(0.05)

    @staticmethod
    def _abandoned(part: Path) -> bool:
        """Tells whether the process that downloaded it has died: then nobody holds its lock."""
        number = os.open(part, os.O_RDWR)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(number)

    def _download(self, url: str, number: int, size: int, sha256: str) -> None:
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(2**attempt / 2)
            digest = hashlib.sha256()
            offset = 0
            try:
                with fsspec.open(url, "rb") as source:
                    while chunk := source.read(1 << 20):
                        if offset + len(chunk) <= size:
                            os.pwrite(number, chunk, offset)
                        offset += len(chunk)
                        digest.update(chunk)
            except FileNotFoundError as error:
                raise ShardError(f"{url} does not exist") from error
            except Exception as error:  # every fsspec back end has exceptions of its own
                problem = f"cannot be downloaded: {type(error).__name__}: {error}"
                continue
            if (offset, digest.hexdigest()) == (size, sha256):
                return os.fsync(number)
            found = (
                f"{offset} bytes, expected {size}"
                if offset != size
                else f"sha256 {digest.hexdigest()}, expected {sha256}"
            )
            problem = f"has {found}: it is not the indexed file"
        raise ShardError(f"{url} {problem} ({self._attempts} attempts)")

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._lock, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            # closing is not enough to unlock: a process forked meanwhile would hold the lock on
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
