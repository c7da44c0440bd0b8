"""Files far and near, read with patience: what fails in passing is asked for again, and what is not
there is told from what did not answer.

A location -> its bytes. Passing: short reads, EIO, a time-out, a connection that breaks, HTTP 408,
425, 429 and 5xx. Final: 404, and (once the credentials were read anew) 401, 403 and the other 4xx.
"""

from __future__ import annotations

import io
import logging
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import count
from typing import Any, BinaryIO, Literal, TypeVar

import fsspec

from shards.files import ShardError, UnreachableError, is_remote

logger = logging.getLogger(__name__)
T = TypeVar("T")

_BLOCK = 4 << 20  # bytes of one request
_LONGEST_PAUSE = 30.0  # seconds between two attempts
_PASSING = (408, 425, 429)  # HTTP: as every 5xx
_NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
# Where each kind of storage finds its credentials: fsspec's own way for HTTP, as JSON.
_S3 = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_CREDENTIALS = {
    "s3": _S3,
    "s3a": _S3,
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
    "gcs": "GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "HF_TOKEN",
    "http": 'FSSPEC_HTTP (as {"headers": {"Authorization": "..."}})',
    "https": 'FSSPEC_HTTPS (as {"headers": {"Authorization": "..."}})',
}


@dataclass(frozen=True)
class Patience:
    """How long a file is waited for: attempts in a row, and seconds for one answer."""

    attempts: int = 7  # half a minute of pauses
    seconds: float = 60.0


def patiently(ask: Callable[[], T], location: str, patience: Patience) -> T:
    """Returns what `ask` gives, asked again with growing, random pauses while it fails in passing.

    Raises FileNotFoundError for what is not there, UnreachableError for all else.
    """
    is_anew = False
    for attempt in count(1):
        try:
            return _in_time(ask, patience.seconds) if is_remote(location) else ask()
        except Exception as error:  # every fsspec back end has exceptions of its own
            kind = _kind(error)
            words = _words(error)
            if kind == "absent":
                raise FileNotFoundError(2, "it does not exist", location) from error
            if kind == "unknown":
                raise UnreachableError(f"{location} cannot be read: {error}") from error
            if kind == "refused" and (is_anew or not is_remote(location)):
                raise UnreachableError(f"{location} is refused ({words}){_advice(location)}") from (
                    error
                )
            if attempt >= patience.attempts:
                raise UnreachableError(
                    f"{location} cannot be read, after {attempt} attempts: {words}"
                ) from error
        if kind == "refused":  # they may have been renewed since
            fsspec.get_filesystem_class(location.partition("://")[0]).clear_instance_cache()
            is_anew = True
        pause = min(0.5 * 2 ** (attempt - 1), _LONGEST_PAUSE)
        pause *= random.SystemRandom().uniform(0.5, 1.5)  # many readers must not come back at once
        logger.warning("%s: %s; asked again in %.1f s", location, words, pause)
        time.sleep(pause)
    raise AssertionError("unreachable")


def _in_time(ask: Callable[[], T], seconds: float) -> T:
    """Asks in a thread of its own, left behind when it hangs: no back end bounds every wait."""
    answer: Future[T] = Future()

    def run() -> None:
        try:
            answer.set_result(ask())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return answer.result(seconds)
    except TimeoutError as error:
        if answer.done():  # it is the back end's own
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from error


def _kind(error: BaseException) -> Literal["absent", "refused", "unknown", "passing"]:
    chain = list(_chain(error))
    status = next(filter(None, map(_status, chain)), None)
    if status in (404, 410):
        return "absent"
    if status is not None:
        return "refused" if 400 <= status < 500 and status not in _PASSING else "passing"
    # fsspec calls a failed size request "not found", whatever the reason: that is its cause
    is_not_there = isinstance(error, _NOT_THERE)
    if is_not_there and all(isinstance(e, (*_NOT_THERE, LookupError)) for e in chain):
        return "absent"
    if isinstance(error, ImportError | ValueError):
        return "unknown"
    if any(map(_is_refusal, chain)):
        return "refused"
    return "passing"


def _is_refusal(error: BaseException) -> bool:
    """Tells of errors that say it without a status: of a disk, of botocore and google, of gcsfs."""
    is_named_so = "Credential" in type(error).__name__ or str(error).startswith("Forbidden")
    return is_named_so or isinstance(error, PermissionError)


def _words(error: Exception) -> str:
    # "not found" hides what was: a status, a time-out
    reason = next((e for e in _chain(error) if not isinstance(e, _NOT_THERE)), error)
    return f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status that an exception of aiohttp, gcsfs, the hub or botocore tells."""
    response: Any = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        # aiohttp's errors of parsing have a `code` that nobody sent
        name = "code" if type(error).__module__.startswith("gcsfs") else "status"
        found = getattr(response, "status_code", None) or getattr(error, name, None)
    return found if isinstance(found, int) and 100 <= found < 600 else None


def _advice(location: str) -> str:
    names = _CREDENTIALS.get(location.partition("://")[0])
    return f": its credentials are taken from {names}" if names else ""


class _Raw(io.RawIOBase):
    """A file from its beginning; after a failure it is opened anew and goes on where it was."""

    def __init__(self, location: str, patience: Patience):
        self._location = location
        self._patience = patience
        self._position = 0
        self._file: BinaryIO | None = patiently(self._opened, location, patience)
        self.size: int | None = getattr(self._file, "size", None)  # as its server says

    def _opened(self) -> BinaryIO:
        system, path = fsspec.core.url_to_fs(self._location)
        return system.open(path, "rb", block_size=_BLOCK)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        held = self._file
        self._file = None

        def ask() -> tuple[BinaryIO, bytes]:
            nonlocal held
            file = held
            held = None  # one that failed is not asked again
            if file is None:
                file = self._opened()
                if self._position:
                    file.seek(self._position)
            data = file.read(len(buffer))
            if not data and self._position < (self.size or 0):
                raise EOFError(f"it ended after {self._position} of {self.size} bytes")
            return file, data

        answer = patiently(ask, self._location, self._patience)
        self._file = answer[0]
        data = answer[1]
        self._position += len(data)
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
        super().close()


class Stream(io.BufferedReader):
    """A file for one pass; `size` in bytes, None where that is not told.

    Opening and reading raise as `patiently` does.
    """

    def __init__(self, location: str, patience: Patience):
        raw = _Raw(location, patience)
        super().__init__(raw, _BLOCK)
        self.size = raw.size


def fetch(location: str, patience: Patience) -> bytes:
    """Returns a small file, whole. Raises as `patiently` does."""
    with Stream(location, patience) as stream:
        return stream.read()


def fetch_range(location: str, start: int, stop: int, patience: Patience) -> bytes:
    """Returns the bytes [start, stop) of a remote file. Raises as `patiently` does."""

    def ask() -> bytes:
        there = fsspec.core.url_to_fs(location)
        data: bytes = there[0].cat_file(there[1], start=start, end=stop)
        # a server that knows no ranges sends all
        return data[start:stop] if len(data) > stop - start else data

    return patiently(ask, location, patience)


class Descriptor:
    """An open local file, read at any place; closed with its last user."""

    def __init__(self, number: int, path: str, patience: Patience):
        self.number = number
        self.path = path
        self._patience = patience

    @classmethod
    def open(cls, path: str, patience: Patience) -> Descriptor:
        """Raises ShardError for a file that is not there, UnreachableError for one that cannot be
        opened.
        """
        try:
            number = patiently(lambda: os.open(path, os.O_RDONLY), path, patience)
        except FileNotFoundError as error:
            raise ShardError(f"{path} cannot be opened: it does not exist") from error
        return cls(number, path, patience)

    def read(self, size: int, offset: int) -> bytes:
        """Returns `size` bytes from `offset`, however many reads that takes.

        Raises ShardError where the file ends before, UnreachableError where the disk fails.
        """
        data = b""
        while len(data) < size:
            more = self._once(size - len(data), offset + len(data))
            if not more:
                raise ShardError(
                    f"the file ends after {len(data)} of {size} bytes: it is truncated"
                )
            data += more
        return data

    def _once(self, size: int, offset: int) -> bytes:
        return patiently(lambda: os.pread(self.number, size, offset), self.path, self._patience)

    def __del__(self) -> None:
        os.close(self.number)
