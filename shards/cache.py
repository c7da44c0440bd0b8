"""Remote files in a local folder of bounded size, shared by any number of processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from shards.files import ShardError, UnreachableError
from shards.remote import Patience, Stream, fetch_range

FOLDER = "harness-shards"  # inside the folder that a user names: nothing beside it is touched
MARKER = ".harness-cache"  # an empty file: the folder is ours
_OURS = re.compile(r"[0-9a-f]{64}(\.part|\.bad)?")
_DOWNLOADS = 2  # of bytes that are wrong: the first may have been damaged on the way
_BAD_SECONDS = 3600.0  # a file known to be wrong is not asked for again so long


class Cache:
    """Remote files in a folder of at most `max_bytes`, the least recently opened evicted first.

    Files are named by their sha256, downloaded beside and renamed once size and hash are right. Any
    number of processes may share the folder. What `open` gave stays readable after an eviction.
    All lies in FOLDER/harness-shards, the cache's own. Raises ShardError where that is somebody
    else's.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int, patience: Patience | None = None):
        self.folder = Path(folder) / FOLDER
        self.max_bytes = int(max_bytes)
        self.patience = patience or Patience()
        self._lock = self.folder / ".lock"
        # A file found wrong before this moment is tried anew: it may have been mended since.
        self._since = self._take_folder()

    @classmethod
    def at(
        cls,
        folder: str | os.PathLike | None,
        max_bytes: float | None,
        patience: Patience | None = None,
    ) -> Cache | None:
        """Returns None where one of them is not given: then only local sets can be read."""
        return cls(folder, int(max_bytes), patience) if folder and max_bytes else None

    def _take_folder(self) -> float:
        """Returns when that was, by the clock of the folder's own files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        marker = self.folder / MARKER
        if not marker.exists():
            others = [path for path in self.folder.iterdir() if path.name not in (MARKER, ".lock")]
            if others:
                raise ShardError(
                    f"{self.folder} is there and is no cache of harness (it has no {MARKER}): "
                    "name another data.cache_dir"
                )
        marker.touch()
        return marker.stat().st_mtime

    def open(self, url: str, size: int, sha256: str, start: int | None = None) -> int:
        """Returns a file descriptor for reading, the caller's to close; downloads what is not
        there. `start`: of a part of a file, which is kept as a file of its own.

        Raises ShardError for a file that is larger than the cache, not there, or not the one with
        this size and hash; UnreachableError for one that does not answer, and for a disk that is
        full or fails under the cache.
        """
        if size > self.max_bytes:
            raise ShardError(
                f"{url} has {size} bytes, the cache {self.folder} may hold only {self.max_bytes}"
            )
        try:
            return self._open(url, size, sha256, start)
        except OSError as error:
            raise UnreachableError(
                f"{url} cannot be kept in the cache {self.folder}: {error}: make room there or "
                "repair it, or name another data.cache_dir"
            ) from error

    def _open(self, url: str, size: int, sha256: str, start: int | None) -> int:
        path = self.folder / sha256
        part = self.folder / f"{sha256}.part"
        while True:
            with self._locked():
                if (number := self._present(path, size)) is not None:
                    return number
                self._must_not_be_bad(path)
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
                    self._must_not_be_bad(path)
                self._reserve(part, number, size)
                self._download(url, number, size, path, start)
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
                entries = []
                for entry in self.folder.iterdir():
                    if entry != part and _OURS.fullmatch(entry.name):
                        with suppress(FileNotFoundError):  # a download that another gave up
                            entries.append((entry, entry.stat()))
                taken = sum(stat.st_size for _, stat in entries)
                for entry, stat in sorted(entries, key=lambda item: item[1].st_mtime_ns):
                    if taken + size <= self.max_bytes:
                        break
                    if entry.suffix != ".part" or self._abandoned(entry):
                        entry.unlink(missing_ok=True)
                        taken -= stat.st_size
                if taken + size <= self.max_bytes:
                    return os.ftruncate(number, size)
            time.sleep(0.05)

    @staticmethod
    def _abandoned(part: Path) -> bool:
        """Tells whether the process that downloaded it has died: then nobody holds its lock."""
        try:
            number = os.open(part, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        finally:
            os.close(number)

    def _download(self, url: str, number: int, size: int, path: Path, start: int | None) -> None:
        """Fills the file; what is not there, or is wrong each time, is marked as bad."""
        for _ in range(_DOWNLOADS):
            try:
                if start is None:
                    found = self._copy(url, number, size)
                else:
                    found = self._copy_part(url, number, size, start)
            except FileNotFoundError:
                problem = f"{url} does not exist"
                break
            if found == (size, path.name):
                return os.fsync(number)
            what = (
                f"{found[0]} bytes, expected {size}"
                if found[0] != size
                else f"sha256 {found[1]}, expected {path.name}"
            )
            problem = f"{url} has {what}: it is not the indexed file"
        with self._locked():
            path.with_suffix(".bad").write_text(problem)
        raise ShardError(problem)

    def _copy(self, url: str, number: int, size: int) -> tuple[int, str]:
        """Returns how many bytes there are and their sha256; no more than `size` are kept."""
        digest = hashlib.sha256()
        offset = 0
        with Stream(url, self.patience) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
                kept = memoryview(chunk)[: max(0, size - offset)]
                done = 0
                while done < len(kept):
                    done += os.pwrite(number, kept[done:], offset + done)
                offset += len(chunk)
        return offset, digest.hexdigest()

    def _copy_part(self, url: str, number: int, size: int, start: int) -> tuple[int, str]:
        """Does the same for `size` bytes from `start`, few enough for memory."""
        data = fetch_range(url, start, start + size, self.patience)
        os.pwrite(number, data[:size], 0)
        return len(data), hashlib.sha256(data).hexdigest()

    def _must_not_be_bad(self, path: Path) -> None:
        """Raises what an earlier download found wrong: every sample would fetch it again."""
        bad = path.with_suffix(".bad")
        try:
            written = bad.stat().st_mtime
            problem = bad.read_text()
        except FileNotFoundError:
            return
        if self._since <= written and time.time() - written < _BAD_SECONDS:
            raise ShardError(problem)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with open(self._lock, "ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            # closing is not enough to unlock: a process forked meanwhile would hold the lock on
            finally:
                fcntl.flock(file, fcntl.LOCK_UN)
