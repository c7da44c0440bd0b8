"""One sample of one shard by its offset: local tars, and remote ones through a bounded cache. No tar is extracted.

A Manifest and an index -> Sample, by one `pread`. Tar headers, names and the crc of the contents are checked on every
read, because a plain tar reader ends silently at a damaged header and never notices damaged bytes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import tarfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fsspec

from shards.manifest import Manifest, ShardError, is_remote
from shards.record import Record, RecordError, Text

BLOCK = 512
PAYLOADS = {"images": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"), "features": ("safetensors",)}
_ZEROS = bytes(BLOCK)
_PAX = re.compile(rb"^[0-9]+ (path|size)=(.*)$", re.MULTILINE)
_NAME = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)  # WebDataset: the key ends at the first dot


@dataclass
class Sample:
    """One image and its record. `index` counts within its set. A filler, or a sample that could not be read, has
    weight 0 and no payload; the latter says why in `error`."""

    record: Record | None
    payload: Any  # bytes, or what the loader's `decode` made of them
    extension: str
    set_index: int
    index: int
    weight: float = 1.0
    error: str | None = None
    epoch: int = 0  # of its own set: how often that has passed before, which in a weighted mixture is its own affair


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar: its first header is at `start`, its content at `offset`."""

    key: str
    extension: str
    start: int
    offset: int
    size: int


class Reader:
    """Reads samples of one set, in any order. Safe to fork, to pickle and to share between threads."""

    def __init__(self, manifest: Manifest, cache: Cache | None = None, *, set_index: int = 0, max_open: int = 32):
        self.manifest, self.set_index = manifest, set_index
        self._cache, self._max_open = cache or manifest.cache, max_open
        self._open: dict[int, _Descriptor] = {}  # least recently used first
        if self._cache is None and is_remote(manifest.location(0)):
            raise ShardError(f"{manifest.location(0)} is remote: reading it needs a cache folder (data.cache_dir)")

    def read(self, index: int) -> Sample:
        """Raises ShardError, naming shard, offset and key, for a sample that is damaged in any way."""
        manifest = self.manifest
        if not 0 <= index < manifest.samples:
            raise IndexError(f"sample {index} of {manifest.folder}, which has {manifest.samples}")
        row = manifest.sidecar[index]
        shard = int(manifest.starts.searchsorted(index, side="right")) - 1
        offset, size, key = int(row["offset"]), int(row["size"]), row["key"].decode()
        place = f"{manifest.location(shard)}, offset {offset}, key {key}"
        data = os.pread(self._descriptor(shard).number, size, offset)
        if len(data) < size:
            raise ShardError(f"{place}: the file ends after {len(data)} of {size} bytes: it is truncated")
        crc, contents = 0, {}
        try:
            for member in members(lambda at, n: data[at - offset : at - offset + n], offset + size, offset):
                if member.key != key:
                    raise ShardError(f"found a member of {member.key}")
                begin = member.offset - offset
                contents[member.extension] = data[begin : begin + member.size]
                crc = zlib.crc32(contents[member.extension], crc)
            if crc != row["crc"]:
                raise ShardError(f"the bytes have crc {crc:08x}, expected {int(row['crc']):08x}: they are damaged")
            record, extension = parse_sample(key, contents, manifest.kind, manifest.dataset, manifest.split)
        except (ShardError, RecordError) as error:
            raise ShardError(f"{place}: {error}") from error
        return Sample(record, contents[extension], extension, self.set_index, index)

    def _descriptor(self, shard: int) -> _Descriptor:
        found = self._open.pop(shard, None)
        if found is None:
            # A shard that was evicted from the cache lives on while it is open: let go of it before the next comes.
            for other, descriptor in list(self._open.items()):
                if os.fstat(descriptor.number).st_nlink == 0 or len(self._open) >= self._max_open:
                    self._open.pop(other, None)
            info, location = self.manifest.shards[shard], self.manifest.location(shard)
            try:
                if is_remote(location):
                    found = _Descriptor(self._cache.open(location, info.bytes, info.sha256))
                else:
                    found = _Descriptor(os.open(location, os.O_RDONLY))
            except OSError as error:
                raise ShardError(f"{location} cannot be opened: {error}") from error
        self._open[shard] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def records(paths: Iterable[str], cache: Cache | None = None) -> Iterator[Record]:
    """Of all samples of these sets, in order, less those that cannot be read: whoever scores them has named them."""
    for reader in [Reader(Manifest.open(path, cache)) for path in paths]:
        for index in range(reader.manifest.samples):
            with suppress(ShardError):
                yield reader.read(index).record


class _Descriptor:
    """A file descriptor that is closed with its last user."""

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        os.close(self.number)


def parse_sample(key: str, contents: Mapping[str, bytes], kind: str, dataset: str, split: str) -> tuple[Record, str]:
    """The record of a sample's files, by extension, and the extension of its payload.

    `.json` is our record, or anything with a "caption" (a text or a list of texts); without either, `.txt` is the
    caption. Raises ShardError for a sample without payload or text, RecordError for a bad record.
    """
    extension = next((name for name in contents if name in PAYLOADS[kind]), None)
    if extension is None:
        raise ShardError(f"no {kind} file ({', '.join(PAYLOADS[kind])}) among .{', .'.join(contents)}")
    if b'"texts"' in contents.get("json", b""):
        record = Record.from_json(contents["json"])
        if record.key != key:
            raise ShardError(f"the record is that of {record.key}")
        return record, extension
    captions = _captions(contents)
    if not captions:
        raise ShardError('no text: neither a record nor a "caption" in .json, nor a caption in .txt')
    text = Text(id=key, task="caption", targets=captions)
    record = Record(re.sub(r"[^A-Za-z0-9_\-]", "_", key.removeprefix("./")), dataset, split, key, (text,))
    record.check()
    return record, extension


def _captions(contents: Mapping[str, bytes]) -> tuple[str, ...]:
    try:
        document = json.loads(contents.get("json", b"null"))
        found = document.get("caption") if isinstance(document, dict) else None
        if not found:
            found = contents.get("txt", b"").decode()
    except ValueError as error:
        raise ShardError(f"its text cannot be read: {error}") from error
    return tuple(text.strip() for text in ([found] if isinstance(found, str) else found) if text and text.strip())


def members(read: Callable[[int, int], bytes], end: int, begin: int = 0, whole: bool = False) -> Iterator[Member]:
    """Walks the 512-byte headers of a tar, or of one sample of it, from `begin` to `end` by `read(offset, n)`.

    Offsets only grow. Understands ustar, GNU and PAX names. `whole`: the tar must close with its end marker. Raises
    ShardError naming the offset of what is not a sound header of a plain file.
    """
    offset, start, name, length = begin, None, None, None
    while offset < end:
        header = read(offset, BLOCK)
        if whole and header == _ZEROS:
            return _check_rest(read, offset, end)
        try:
            info = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise ShardError(f"no valid tar header at offset {offset} ({error}): the shard is damaged") from error
        start = offset if start is None else start
        plain = info.type in (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
        content = length if plain and length is not None else info.size
        offset += BLOCK
        if content < 0 or offset + content > end:
            raise ShardError(f"the data ends inside the member {info.name!r} at offset {start}: the shard is damaged")
        if plain:
            match = _NAME.fullmatch(name or info.name)
            key, extension = match.groups() if match else (name or info.name, "")
            yield Member(key, extension.lower(), start, offset, content)
            start = name = length = None
        elif info.type == tarfile.GNUTYPE_LONGNAME:  # what follows describes the next header
            name = read(offset, content).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            described = dict(_PAX.findall(read(offset, content)))
            name = described[b"path"].decode("utf-8", "surrogateescape") if b"path" in described else None
            length = int(described[b"size"]) if b"size" in described else None
        elif info.type in (tarfile.DIRTYPE, tarfile.XGLTYPE):  # a folder; comments on the whole archive
            start = None
        else:
            raise ShardError(f"the member {info.name!r} at offset {start} is a link or special file, not a plain one")
        offset += -(-content // BLOCK) * BLOCK
    if whole:
        raise ShardError(f"the tar ends at {end} without its end marker: it is truncated")


def _check_rest(read: Callable[[int, int], bytes], offset: int, size: int) -> None:
    """A tar's end marker is two blocks of zeros with nothing but zeros behind; zeros alone may be a lost header."""
    if size - offset < 2 * BLOCK:
        raise ShardError(f"the tar ends at {size} inside its end marker: it is truncated")
    for start in range(offset, size, 1 << 20):
        if read(start, min(1 << 20, size - start)).strip(b"\0"):
            raise ShardError(f"zeros in place of the tar header at offset {offset}: the shard is damaged")


class Cache:
    """Remote files in a folder of at most `max_bytes`, the least recently opened evicted first.

    Files are named by their sha256, downloaded beside and renamed once size and hash are right. Any number of
    processes may share the folder. What `open` gave stays readable after an eviction.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int, *, attempts: int = 3):
        self.folder, self.max_bytes, self._attempts = Path(folder), int(max_bytes), attempts
        self._lock = self.folder / ".lock"
        self.folder.mkdir(parents=True, exist_ok=True)

    @classmethod
    def at(cls, folder: str | os.PathLike | None, max_bytes: float | None) -> Cache | None:
        """None where one of them is not given: then only local sets can be read."""
        return cls(folder, int(max_bytes)) if folder and max_bytes else None

    def open(self, url: str, size: int, sha256: str) -> int:
        """A file descriptor for reading, the caller's to close; downloads what is not there.

        Raises ShardError for a file larger than the cache, unreachable, or not the one with this size and hash.
        """
        if size > self.max_bytes:
            raise ShardError(f"{url} has {size} bytes, the cache {self.folder} may hold only {self.max_bytes}")
        path, part = self.folder / sha256, self.folder / f"{sha256}.part"
        while True:
            with self._locked():
                if (number := self._present(path, size)) is not None:
                    return number
            number = os.open(part, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(number, fcntl.LOCK_EX)  # waits for another process that downloads the same file
                if not self._is(part, number):
                    continue  # it is done, or gave up and removed it
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
        """Makes room, then takes it by the length of the empty file; waits for room others have taken."""
        while True:
            with self._locked():
                entries = [(entry, entry.stat()) for entry in self.folder.iterdir() if entry not in (self._lock, part)]
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
        """Whether the process that downloaded it has died: then nobody holds its lock."""
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
            digest, offset = hashlib.sha256(), 0
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
            finally:  # closing is not enough to unlock: a process forked meanwhile would hold the lock on
                fcntl.flock(file, fcntl.LOCK_UN)
