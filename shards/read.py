"""One sample of one shard by its offsets; local tars, and remote ones through a bounded cache. No
tar is extracted.

A Manifest and an index -> Sample, by two `pread`s and a crc (of an index of format 1, by walking
the sample's headers): damaged bytes are noticed on every read.
"""

from __future__ import annotations

import copy
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from shards.cache import Cache
from shards.files import ShardError, UnreachableError, is_remote
from shards.images import EXTENSIONS
from shards.layout import Layout, field_texts
from shards.manifest import Manifest
from shards.record import Record, RecordError, Text
from shards.remote import Descriptor, Patience
from shards.tar import groups

PAYLOADS = {
    "images": EXTENSIONS,
    "features": ("safetensors",),
}


@dataclass
class Sample:
    """One image and its record. `index` counts within its set. A filler, or a sample that could not
    be read, has weight 0 and neither record nor payload; the latter says why in `error`. A record
    without a picture has no payload, and an empty `extension`.
    """

    record: Record | None
    payload: Any  # bytes, or what the loader's `decode` made of them
    extension: str
    set_index: int
    index: int
    weight: float = 1.0
    error: str | None = None
    # of its own set: how often that has passed before (in a weighted mixture sets differ)
    epoch: int = 0

    @property
    def known(self) -> Record:
        """The record of a sample that was read."""
        assert self.record is not None
        return self.record


class Reader:
    """Reads samples of one set, in any order. Safe to fork, to pickle and to share between
    threads.
    """

    def __init__(
        self,
        manifest: Manifest,
        cache: Cache | None = None,
        *,
        set_index: int = 0,
        max_open: int = 32,
        answered: bool = True,
    ):
        """`answered`: whether questions must have answers, without which nothing can be learnt or
        scored. Raises ShardError.
        """
        if answered:
            manifest.check_answered()
        self.manifest = manifest
        self.set_index = set_index
        self._cache = cache or manifest.cache
        self._max_open = max_open
        self._open: dict[int, Descriptor] = {}  # least recently used first
        if self._cache is None and is_remote(manifest.location(0)):
            raise ShardError(
                f"{manifest.location(0)} is remote: reading it needs a cache folder "
                "(data.cache_dir)"
            )

    def read(self, index: int) -> Sample:
        """Raises ShardError, naming shard, offset and key, for a sample that is damaged in any
        way.
        """
        return self._sample(index, _walked if self.manifest.format == 1 else _by_members)

    def walk(self, index: int) -> Sample:
        """Reads as `read` does, and checks the tar's headers and all other files of the sample."""
        return self._sample(index, _walked)

    def _sample(
        self, index: int, contents_of: Callable[[Descriptor, np.void], dict[str, bytes]]
    ) -> Sample:
        manifest = self.manifest
        if not 0 <= index < manifest.samples:
            raise IndexError(f"sample {index} of {manifest.folder}, which has {manifest.samples}")
        row = manifest.sidecar[index]
        shard = int(manifest.starts.searchsorted(index, side="right")) - 1
        key = manifest.key(index)
        descriptor = self._descriptor(shard)  # held, so that it stays open while it is read
        try:
            _check_inside(row, manifest.shards[shard].bytes)
            contents = contents_of(descriptor, row)
            if manifest.layout and contents_of is _walked:
                contents = manifest.layout.contents(contents)
            parsed = parse_sample(key, contents, **manifest.described)
        except UnreachableError:
            raise
        except (ShardError, RecordError) as error:
            place = f"{manifest.location(shard)}, offset {row['offset']}, key {key}"
            raise ShardError(f"{place}: {error}") from error
        name = parsed.payload
        return Sample(parsed.record, contents.get(name), name, self.set_index, index)

    @property
    def is_remote(self) -> bool:
        """Whether the shards come through the cache."""
        return is_remote(self.manifest.location(0))

    def fetch(self, shard: int) -> None:
        """Makes the cache hold a remote shard and its rows of the index. Raises as `read`."""
        assert self._cache is not None  # checked when the reader was made
        info = self.manifest.shards[shard]
        os.close(self._cache.open(self.manifest.location(shard), info.bytes, info.sha256))
        if info.samples:
            _ = self.manifest.sidecar[int(self.manifest.starts[shard])]

    def impatient(self) -> Reader:
        """Returns one for the same remote set that asks once alone for what does not answer."""
        once = Patience(1, self.manifest.patience.seconds)
        cache = copy.copy(self._cache)
        assert cache is not None  # checked when the reader was made
        cache.patience = once
        return Reader(replace(self.manifest, cache=cache, patience=once), cache, answered=False)

    def _descriptor(self, shard: int) -> Descriptor:
        found = self._open.pop(shard, None)
        if found is None:
            # A shard that was evicted from the cache lives on while it is open: let go of it before
            # the next comes.
            for other, descriptor in list(self._open.items()):
                if os.fstat(descriptor.number).st_nlink == 0 or len(self._open) >= self._max_open:
                    self._open.pop(other, None)
            info = self.manifest.shards[shard]
            location = self.manifest.location(shard)
            if is_remote(location):
                assert self._cache is not None  # checked when the reader was made
                number = self._cache.open(location, info.bytes, info.sha256)
                kept = str(self._cache.folder / info.sha256)
                found = Descriptor(number, kept, self.manifest.patience)
            else:
                found = Descriptor.open(location, self.manifest.patience)
        self._open[shard] = found
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def _by_members(descriptor: Descriptor, row: np.void) -> dict[str, bytes]:
    """Reads payload and text alone, from where format 2 says they are."""
    contents: dict[str, bytes] = {}
    crc = 0
    for part in ("payload", "text"):
        if name := row[f"{part}_extension"].decode(errors="replace"):  # "": there is no picture
            contents[name] = descriptor.read(int(row[f"{part}_size"]), int(row[f"{part}_offset"]))
            crc = zlib.crc32(contents[name], crc)
    _check_crc(crc, int(row["members_crc"]))
    return contents


def _walked(descriptor: Descriptor, row: np.void) -> dict[str, bytes]:
    """Reads a whole sample, header by header."""
    begin = int(row["offset"])
    size = int(row["size"])
    key = row["key"].decode(errors="replace")
    data = descriptor.read(size, begin)
    contents: dict[str, bytes] = {}
    crc = 0
    for group in groups(
        lambda at, n: data[at - begin : at - begin + n], begin + size, begin, whole=False
    ):
        if group.key != key:
            raise ShardError(f"found a member of {group.key}")
        if group.problem:
            raise ShardError(group.problem)
        contents = group.contents
        crc = group.crc
    _check_crc(crc, int(row["crc"]))
    return contents


def _check_inside(row: np.void, size: int) -> None:
    """Raises ShardError for a row of another shard, before as much memory is asked for."""
    for part in ("", "payload_", "text_"):
        if f"{part}size" in (row.dtype.names or ()):
            end = int(row[f"{part}offset"]) + int(row[f"{part}size"])
            if end > size:
                raise ShardError(
                    f"the index says that it ends at {end}, the shard has {size} bytes"
                )


def _check_crc(found: int, expected: int) -> None:
    if found != expected:
        raise ShardError(
            f"the bytes have crc {found:08x}, expected {expected:08x}: they are damaged"
        )


def records(paths: Iterable[str], cache: Cache | None = None) -> Iterator[Record]:
    """Yields those of all samples of these sets, in order, less those that cannot be read: whoever
    scores them has named them. Raises UnreachableError.
    """
    for reader in [Reader(Manifest.open(path, cache)) for path in paths]:
        for index in range(reader.manifest.samples):
            try:
                yield reader.read(index).known
            except UnreachableError:
                raise
            except ShardError:
                continue


class Parsed(NamedTuple):
    """A sample's record, and the extensions of its payload ("": it has no picture) and of the file
    that gave the record.
    """

    record: Record
    payload: str
    text: str


def parse_sample(
    key: str,
    contents: Mapping[str, bytes],
    kind: str,
    dataset: str,
    split: str,
    layout: Layout | None = None,
) -> Parsed:
    """Reads the files of a sample, by extension; of a set with a layout, those that it left.

    `.json` is our record, or anything with a "caption" (a text or a list of texts); without either,
    `.txt` is the caption. A layout that says where the text stands holds instead. Raises ShardError
    for a sample without payload or text, RecordError for a bad record.
    """
    extension = next((name for name in contents if name in PAYLOADS[kind]), "")
    described = layout if layout and layout.text else None
    if not described and b'"texts"' in contents.get("json", b""):
        record = Record.from_json(contents["json"])
        if record.key != key:
            raise ShardError(f"the record is that of {record.key}")
        if extension and not record.has_picture:
            raise ShardError(f"its record says that it has no picture, and there is .{extension}")
        if extension or not record.has_picture:
            return Parsed(record, extension, "json")
    if not extension:
        ends = (layout and layout.image) or PAYLOADS[kind]
        raise ShardError(f"no {kind} file ({', '.join(ends)}) among .{', .'.join(contents)}")
    if described:
        source = described.end
        captions = described.captions(contents)
    else:
        captions = field_texts(contents.get("json", b"null"), "caption")
        source = "json" if captions else "txt"
        captions = captions or [_decoded(contents.get("txt", b""))]
    targets = tuple(filter(None, map(str.strip, captions)))
    if not targets:
        expected = 'neither a record nor a "caption" in .json, nor a caption in .txt'
        raise ShardError(f"no text: {layout.told() if layout else expected}")
    text = Text(id=key, task="caption", targets=targets)
    record = Record(record_key(key), dataset, split, key, (text,))
    record.check()
    return Parsed(record, extension, source)


def record_key(key: str) -> str:
    """Returns the key of a record: what else than letters and digits stands in a tar's key becomes
    "_", with a hash behind, since two keys may differ in that alone.
    """
    key = key.removeprefix("./")
    name = re.sub(r"[^A-Za-z0-9_\-]", "_", key)
    return name if name == key else f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def _decoded(caption: bytes) -> str:
    try:
        return caption.decode()
    except ValueError as error:
        raise ShardError(f"its text cannot be read: {error}") from error
