"""An index of ours for WebDataset shards made elsewhere; the tars stay as and where they are.

A folder, an fsspec URL or a pattern of tars -> `index.json` and its sidecar, in one pass over each
tar.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from braceexpand import braceexpand

from shards.files import ShardError, is_remote, join, write_whole
from shards.manifest import INDEX, SKIPPED, Manifest, ShardInfo, SidecarWriter, write_index
from shards.read import parse_sample
from shards.record import RecordError
from shards.tar import members

Progress = Callable[[int], None]  # called with the number of samples done since the last call


@dataclass(frozen=True)
class Group:
    """The adjacent files of one key: one sample, from its first header at `start` to its last byte
    at `end`.
    """

    key: str
    start: int
    end: int
    crc: int
    contents: dict[str, bytes]


class OnePass:
    """`read(offset, n)` with growing offsets over a stream, hashing every byte that goes by."""

    def __init__(self, file: BinaryIO):
        self._file, self._position, self._sha256 = file, 0, hashlib.sha256()

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
        """(bytes, sha256) of the whole stream, the rest included."""
        while self._read(1 << 20):
            pass
        return self._position, self._sha256.hexdigest()


def groups(read: OnePass, size: int) -> Iterator[Group]:
    key, start, end, crc, contents = "", 0, 0, 0, {}
    for member in members(read, size, whole=True):
        if contents and member.key != key:
            yield Group(key, start, end, crc, contents)
            crc, contents = 0, {}
        if not contents:
            key, start = member.key, member.start
        if member.extension in contents:
            raise ShardError(
                f"{member.key}.{member.extension} occurs twice, again at offset {member.start}"
            )
        data = read(member.offset, member.size)
        contents[member.extension], crc, end = (
            data,
            zlib.crc32(data, crc),
            member.offset + member.size,
        )
    if contents:
        yield Group(key, start, end, crc, contents)


def index_shards(
    source: str | os.PathLike,
    dataset: str,
    split: str,
    *,
    out: Path | str | None = None,
    overwrite: bool = False,
    on_progress: Progress = lambda samples: None,
) -> Manifest:
    """Makes `index.json` and its sidecar for WebDataset shards made elsewhere; the tars stay as and
    where they are.

    `source` is a folder or fsspec URL of tars, or a pattern like `s3://b/train-{0000..0042}.tar`.
    `out` is where the index goes: needed for a remote source, else beside the tars. A sample is
    adjacent files of one key: an image with our record, or with a "caption" in .json, or with a
    caption in .txt. A sample without image or text is left out, counted in the index and named in
    `skipped.jsonl`. Raises ShardError, naming shard and offset, for a damaged tar or a key that
    occurs again.
    """
    base, names = _find_tars(os.fspath(source).removeprefix("file://"))
    if out is None and is_remote(base):
        raise ShardError(f"{base} is remote: say with --out where its index is to be written")
    folder = Path(base if out is None else out)
    if (folder / INDEX).exists() and not overwrite:
        raise ShardError(
            f"{folder / INDEX} is there already: index the shards again with --overwrite"
        )
    sidecar, shards, keys, skipped = SidecarWriter(), [], set(), []
    for name in names:
        shards.append(
            _index_tar(join(base, name), dataset, split, sidecar, keys, skipped, on_progress)
        )
    if not sum(shard.samples for shard in shards):
        why = (
            f": {skipped[0]['shard']}, {skipped[0]['key']}: {skipped[0]['reason']}"
            if skipped
            else ""
        )
        raise ShardError(f"{base} holds no sample with image and text{why}")
    (folder / INDEX).unlink(missing_ok=True)
    files = sidecar.finish(folder)
    if skipped:
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped)
        write_whole(folder / SKIPPED, lines.encode())
    place = base if is_remote(base) else str(Path(base).resolve())
    place = None if place == str(folder.resolve()) else place
    manifest = Manifest(
        str(folder),
        "images",
        dataset,
        split,
        tuple(shards),
        *files,
        base=place,
        skipped=len(skipped),
    )
    write_index(manifest, folder)
    return manifest


def _find_tars(source: str) -> tuple[str, list[str]]:
    """The folder and the sorted names of its tars."""
    if source.endswith(".tar"):
        locations = list(braceexpand(source))
        folders = {location.rpartition("/")[0] for location in locations}
        if len(folders) > 1:
            raise ShardError(
                f"{source} names tars of {len(folders)} folders: index one folder at a time"
            )
        return folders.pop() or ".", [location.rpartition("/")[2] for location in locations]
    try:
        system, path = fsspec.core.url_to_fs(source)
        found = [entry.rstrip("/").rpartition("/")[2] for entry in system.ls(path, detail=False)]
    except (OSError, ImportError, ValueError) as error:
        raise ShardError(f"{source} cannot be listed: {error}") from error
    names = sorted(name for name in found if name.endswith(".tar"))
    if not names:
        raise ShardError(f"{source} holds no .tar files")
    return source.rstrip("/"), names


def _index_tar(
    location: str,
    dataset: str,
    split: str,
    sidecar: SidecarWriter,
    keys: set[str],
    skipped: list[dict[str, Any]],
    on_progress: Progress,
) -> ShardInfo:
    samples = texts = 0
    with open_shard(location) as (read, size):
        try:
            for group in groups(read, size):
                _must_be_new(group.key, keys, group.start)
                try:
                    record, _ = parse_sample(group.key, group.contents, "images", dataset, split)
                except (ShardError, RecordError) as error:
                    name = location.rpartition("/")[2]
                    skipped.append(
                        {
                            "shard": name,
                            "offset": group.start,
                            "key": group.key,
                            "reason": str(error),
                        }
                    )
                    continue
                if record.key != group.key:
                    _must_be_new(record.key, keys, group.start)
                sidecar.append(record, group.key, group.start, group.end - group.start, group.crc)
                samples, texts = samples + 1, texts + len(record.texts)
                on_progress(1)
        except ShardError as error:
            raise ShardError(f"{location}: {error}") from error
        return ShardInfo(location.rpartition("/")[2], *read.finish(), samples, texts)


def _must_be_new(key: str, keys: set[str], offset: int) -> None:
    if key in keys:
        raise ShardError(
            f"the key {key!r} occurs again at offset {offset}: keys must be unique, the files of a sample adjacent"
        )
    keys.add(key)


@contextmanager
def open_shard(location: str) -> Iterator[tuple[OnePass, int]]:
    """A shard as (one-pass reader, its size in bytes)."""
    try:
        system, path = fsspec.core.url_to_fs(location)
        size = system.size(path)
        file = system.open(path, "rb", block_size=4 << 20)
    except (OSError, ImportError) as error:
        raise ShardError(f"{location} cannot be opened: {error}") from error
    with file:
        if size is None:
            raise ShardError(f"{location}: the server does not say how large it is")
        yield OnePass(file), size
