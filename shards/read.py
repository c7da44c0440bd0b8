"""One sample of one shard by its offset: local tars, and remote ones through a bounded cache. No
tar is extracted.

A Manifest and an index -> Sample, by one `pread`. Tar headers, names and the crc of the contents
are checked on every read, because a plain tar reader ends silently at a damaged header and never
notices damaged bytes.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from shards.cache import Cache
from shards.files import ShardError, is_remote
from shards.manifest import Manifest
from shards.record import Record, RecordError, Text
from shards.tar import members

PAYLOADS = {
    "images": ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff"),
    "features": ("safetensors",),
}


@dataclass
class Sample:
    """One image and its record. `index` counts within its set. A filler, or a sample that could not
    be read, has weight 0 and no payload; the latter says why in `error`.
    """

    record: Record | None
    payload: Any  # bytes, or what the loader's `decode` made of them
    extension: str
    set_index: int
    index: int
    weight: float = 1.0
    error: str | None = None
    # of its own set: how often that has passed before, which in a weighted mixture is its own
    # affair
    epoch: int = 0


class Reader:
    """Reads samples of one set, in any order. Safe to fork, to pickle and to share between threads."""

    def __init__(
        self,
        manifest: Manifest,
        cache: Cache | None = None,
        *,
        set_index: int = 0,
        max_open: int = 32,
    ):
        self.manifest, self.set_index = manifest, set_index
        self._cache, self._max_open = cache or manifest.cache, max_open
        self._open: dict[int, _Descriptor] = {}  # least recently used first
        if self._cache is None and is_remote(manifest.location(0)):
            raise ShardError(
                f"{manifest.location(0)} is remote: reading it needs a cache folder (data.cache_dir)"
            )

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
            raise ShardError(
                f"{place}: the file ends after {len(data)} of {size} bytes: it is truncated"
            )
        crc, contents = 0, {}
        try:
            for member in members(
                lambda at, n: data[at - offset : at - offset + n], offset + size, offset
            ):
                if member.key != key:
                    raise ShardError(f"found a member of {member.key}")
                begin = member.offset - offset
                contents[member.extension] = data[begin : begin + member.size]
                crc = zlib.crc32(contents[member.extension], crc)
            if crc != row["crc"]:
                raise ShardError(
                    f"the bytes have crc {crc:08x}, expected {int(row['crc']):08x}: they are damaged"
                )
            record, extension = parse_sample(
                key, contents, manifest.kind, manifest.dataset, manifest.split
            )
        except (ShardError, RecordError) as error:
            raise ShardError(f"{place}: {error}") from error
        return Sample(record, contents[extension], extension, self.set_index, index)

    def _descriptor(self, shard: int) -> _Descriptor:
        found = self._open.pop(shard, None)
        if found is None:
            # A shard that was evicted from the cache lives on while it is open: let go of it before
            # the next comes.
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
    """Of all samples of these sets, in order, less those that cannot be read: whoever scores them
    has named them.
    """
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


def parse_sample(
    key: str, contents: Mapping[str, bytes], kind: str, dataset: str, split: str
) -> tuple[Record, str]:
    """The record of a sample's files, by extension, and the extension of its payload.

    `.json` is our record, or anything with a "caption" (a text or a list of texts); without either,
    `.txt` is the caption. Raises ShardError for a sample without payload or text, RecordError for a
    bad record.
    """
    extension = next((name for name in contents if name in PAYLOADS[kind]), None)
    if extension is None:
        raise ShardError(
            f"no {kind} file ({', '.join(PAYLOADS[kind])}) among .{', .'.join(contents)}"
        )
    if b'"texts"' in contents.get("json", b""):
        record = Record.from_json(contents["json"])
        if record.key != key:
            raise ShardError(f"the record is that of {record.key}")
        return record, extension
    captions = _captions(contents)
    if not captions:
        raise ShardError(
            'no text: neither a record nor a "caption" in .json, nor a caption in .txt'
        )
    text = Text(id=key, task="caption", targets=captions)
    record = Record(
        re.sub(r"[^A-Za-z0-9_\-]", "_", key.removeprefix("./")), dataset, split, key, (text,)
    )
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
    return tuple(
        text.strip()
        for text in ([found] if isinstance(found, str) else found)
        if text and text.strip()
    )
