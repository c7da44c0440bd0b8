"""Whole sets: index the WebDataset shards of others, verify a set byte by byte, count what is in it.

A folder or fsspec URL of tars -> an index (index_shards), sentences about what is wrong (verify), figures (stats). All
of them read each tar from front to back in one pass and extract nothing.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
from braceexpand import braceexpand
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors

from shards.manifest import (
    INDEX,
    SIDECAR,
    SKIPPED,
    Kind,
    Manifest,
    ShardError,
    ShardInfo,
    SidecarWriter,
    is_remote,
    join,
    write_index,
    write_whole,
)
from shards.read import Cache, Reader, Sample, members, parse_sample
from shards.record import RecordError

Progress = Callable[[int], None]  # called with the number of samples done since the last call


@dataclass(frozen=True)
class _Group:
    """The adjacent files of one key: one sample, from its first header at `start` to its last byte at `end`."""

    key: str
    start: int
    end: int
    crc: int
    contents: dict[str, bytes]


class _OnePass:
    """`read(offset, n)` with growing offsets over a stream, hashing every byte that goes by."""

    def __init__(self, file: BinaryIO):
        self._file, self._position, self._sha256 = file, 0, hashlib.sha256()

    def __call__(self, offset: int, n: int) -> bytes:
        self._skip(offset - self._position)
        data = self._file.read(n)
        self._position += len(data)
        self._sha256.update(data)
        return data

    def _skip(self, n: int | None) -> None:
        while n is None or n > 0:
            chunk = self._file.read(1 << 20 if n is None else min(n, 1 << 20))
            if not chunk:
                return
            self._position += len(chunk)
            self._sha256.update(chunk)
            n = None if n is None else n - len(chunk)

    def finish(self) -> tuple[int, str]:
        """(bytes, sha256) of the whole stream, the rest included."""
        self._skip(None)
        return self._position, self._sha256.hexdigest()


def _groups(read: _OnePass, size: int) -> Iterator[_Group]:
    key, start, end, crc, contents = "", 0, 0, 0, {}
    for member in members(read, size, whole=True):
        if contents and member.key != key:
            yield _Group(key, start, end, crc, contents)
            crc, contents = 0, {}
        if not contents:
            key, start = member.key, member.start
        if member.extension in contents:
            raise ShardError(f"{member.key}.{member.extension} occurs twice, again at offset {member.start}")
        data = read(member.offset, member.size)
        contents[member.extension], crc, end = data, zlib.crc32(data, crc), member.offset + member.size
    if contents:
        yield _Group(key, start, end, crc, contents)


def index_shards(
    source: str | os.PathLike,
    dataset: str,
    split: str,
    *,
    out: Path | str | None = None,
    kind: Kind = "images",
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Manifest:
    """Makes `index.json` and its sidecar for WebDataset shards made elsewhere; the tars stay as and where they are.

    `source` is a folder or fsspec URL of tars, or a pattern like `s3://b/train-{0000..0042}.tar`. `out` is where the
    index goes: needed for a remote source, else beside the tars. A sample is adjacent files of one key: an image with
    our record, or with a "caption" in .json, or with a caption in .txt. A sample without image or text is left out,
    counted in the index and named in `skipped.jsonl`. Raises ShardError, naming shard and offset, for a damaged tar
    or a key that occurs again.
    """
    base, names = _find_tars(os.fspath(source).removeprefix("file://"))
    if out is None and is_remote(base):
        raise ShardError(f"{base} is remote: say with --out where its index is to be written")
    folder = Path(base if out is None else out)
    if (folder / INDEX).exists() and not overwrite:
        raise ShardError(f"{folder / INDEX} is there already: allow it to be overwritten to index the shards again")
    folder.mkdir(parents=True, exist_ok=True)
    sidecar, shards, keys, skipped = SidecarWriter(folder / SIDECAR), [], set(), []
    try:
        for name in names:
            shards.append(_index_tar(join(base, name), dataset, split, kind, sidecar, keys, skipped, on_progress))
        if not keys:
            raise ShardError(f"{base} holds no sample with image and text; the first: {skipped[:1]}")
        (folder / INDEX).unlink(missing_ok=True)
        info, key_bytes = sidecar.finish()
    finally:
        sidecar.discard()
    if skipped:
        write_whole(folder / SKIPPED, [json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in skipped])
    beside = folder.resolve() == Path(base).resolve() if not is_remote(base) else False
    place = None if beside else base if is_remote(base) else str(Path(base).resolve())
    manifest = Manifest(
        str(folder), kind, dataset, split, tuple(shards), info, key_bytes, base=place, skipped=len(skipped)
    )
    write_index(manifest, folder)
    return manifest


def _find_tars(source: str) -> tuple[str, list[str]]:
    """The folder and the sorted names of its tars."""
    if source.endswith(".tar"):
        locations = list(braceexpand(source))
        folders = {location.rpartition("/")[0] for location in locations}
        if len(folders) > 1:
            raise ShardError(f"{source} names tars of {len(folders)} folders: index one folder at a time")
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
    kind: Kind,
    sidecar: SidecarWriter,
    keys: set[str],
    skipped: list[dict[str, Any]],
    on_progress: Progress | None,
) -> ShardInfo:
    samples = texts = 0
    with _open(location) as (read, size):
        try:
            for group in _groups(read, size):
                try:
                    record, _ = parse_sample(group.key, group.contents, kind, dataset, split)
                except (ShardError, RecordError) as error:
                    name = location.rpartition("/")[2]
                    skipped.append({"shard": name, "offset": group.start, "key": group.key, "reason": str(error)})
                    continue
                if record.key in keys:
                    raise ShardError(
                        f"the key {group.key!r} at offset {group.start} occurs again: the files of a sample must be "
                        "adjacent and keys unique"
                    )
                keys.add(record.key)
                counts = len(record.texts), record.targets, record.characters
                sidecar.append(group.start, group.end - group.start, *counts, group.crc, group.key)
                samples, texts = samples + 1, texts + len(record.texts)
                if on_progress:
                    on_progress(1)
        except ShardError as error:
            raise ShardError(f"{location}: {error}") from error
        return ShardInfo(location.rpartition("/")[2], *read.finish(), samples, texts)


@contextmanager
def _open(location: str) -> Iterator[tuple[_OnePass, int]]:
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
        yield _OnePass(file), size


def verify(folder: str | os.PathLike, cache: Cache | None = None, on_progress: Progress | None = None) -> list[str]:
    """Re-reads and re-hashes everything, decodes every image; a sentence for each problem, none if all is well."""
    try:
        manifest = Manifest.read_index(folder, cache)
    except ShardError as error:
        return [str(error)]
    problems = manifest.file_problems() + _strangers(manifest)
    for file in manifest.files:
        if not any(join(manifest.folder, file.name) in problem for problem in problems):
            problems += _problem(lambda file=file: manifest.read_file(file.name))
    broken = _problem(lambda: manifest.sidecar)
    if broken:
        return problems + ([] if any(SIDECAR in problem for problem in problems) else broken)
    keys, counts = np.unique(manifest.sidecar["key"], return_counts=True)
    problems += [
        f"{folder}: key {key.decode()!r} occurs {n} times" for key, n in zip(keys, counts, strict=True) if n > 1
    ]
    left_out = _left_out(manifest)
    for shard, info in enumerate(manifest.shards):
        if is_remote(manifest.location(shard)) or Path(manifest.location(shard)).is_file():
            problems += _verify_shard(manifest, shard, left_out[info.name], cache, on_progress)
    return problems


def _verify_shard(
    manifest: Manifest, shard: int, left_out: set[int], cache: Cache | None, on_progress: Progress | None
) -> list[str]:
    info, location, first = manifest.shards[shard], manifest.location(shard), int(manifest.starts[shard])
    rows = manifest.sidecar[first : manifest.starts[shard + 1]]
    waiting = {int(row["offset"]): first + i for i, row in enumerate(rows)}
    problems, stopped, hashed = [], None, None
    if int(rows["texts"].sum()) != info.texts:
        problems.append(f"{location}: the sidecar counts {rows['texts'].sum()} texts, the index {info.texts}")
    try:
        with _open(location) as (read, size):
            try:
                for group in _groups(read, size):
                    index = waiting.pop(group.start, None)
                    if index is not None:
                        problems += _check_group(manifest, index, group, location)
                        if on_progress:
                            on_progress(1)
                    elif group.start not in left_out:
                        problems.append(f"{location}: {group.key} at offset {group.start} is not in the index")
            except ShardError as error:
                stopped = f"{location}: {error}"
            hashed = read.finish()
    except ShardError as error:
        return [str(error)]
    precise = len(problems)
    if stopped and waiting:  # behind a damaged place the samples are still found by their offsets
        reader = Reader(manifest, cache)
        for index in waiting.values():
            problems += _problem(lambda index=index: _decode(manifest, reader.read(index)))
            if on_progress:
                on_progress(1)
    if stopped and len(problems) == precise:
        problems.append(stopped)
    if waiting and not stopped:
        keys = ", ".join(manifest.key(index) for index in list(waiting.values())[:3])
        problems.append(f"{location}: {len(waiting)} samples of the index are not where it says ({keys} ...)")
    if not problems and hashed != (info.bytes, info.sha256):
        problems.append(f"{location} has sha256 {hashed[1]}, expected {info.sha256}")
    return problems


def _check_group(manifest: Manifest, index: int, group: _Group, location: str) -> list[str]:
    """What is wrong with one sample found in its place."""
    row, place = manifest.sidecar[index], f"{location}, offset {group.start}, key {group.key}"
    if group.key != row["key"].decode():
        return [f"{place}: the index has {row['key'].decode()} here"]
    if group.crc != row["crc"] or group.end - group.start != row["size"]:
        return [f"{place}: the bytes have crc {group.crc:08x}, expected {int(row['crc']):08x}: they are damaged"]
    try:
        record, extension = parse_sample(group.key, group.contents, manifest.kind, manifest.dataset, manifest.split)
    except (ShardError, RecordError) as error:
        return [f"{place}: {error}"]
    found = {"texts": len(record.texts), "targets": record.targets, "characters": record.characters}
    for name, count in found.items():
        if count != row[name]:
            return [f"{place}: the record has {count} {name}, the index says {row[name]}"]
    sample = Sample(record, group.contents[extension], extension, 0, index)
    return [f"{place}: {problem}" for problem in _problem(lambda: _decode(manifest, sample))]


def _decode(manifest: Manifest, sample: Sample) -> None:
    """Raises ShardError unless the payload is what the set promises."""
    if manifest.kind == "images":
        try:
            with Image.open(io.BytesIO(sample.payload)) as image:
                image.load()
        except Exception as error:  # Pillow's decoders raise what they like
            raise ShardError(f"the image cannot be decoded: {str(error).split(' <_io')[0]}") from error
        return
    try:
        patches_PD = load_safetensors(sample.payload)["patches_PD"]
    except (KeyError, SafetensorError) as error:
        raise ShardError(f"the features cannot be read: {error}") from error
    encoder = manifest.encoder or {}
    shape = encoder.get("tokens", patches_PD.shape[0]), encoder.get("width", patches_PD.shape[-1])
    if patches_PD.shape != shape or not np.isfinite(patches_PD).all():
        raise ShardError(f"patches_PD has shape {patches_PD.shape}, expected {shape} and finite values")


def _problem(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except (ShardError, OSError) as error:
        return [str(error)]
    return []


def _strangers(manifest: Manifest) -> list[str]:
    """Files in the set's own folder that its index does not name: the loader would never read them."""
    if is_remote(manifest.folder):
        return []
    known = {INDEX, SIDECAR, SKIPPED} | {info.name for info in (*manifest.shards, *manifest.files)}
    found = sorted(path.name for path in Path(manifest.folder).iterdir() if path.name not in known)
    return [f"{join(manifest.folder, name)} is not named in {INDEX}" for name in found]


def _left_out(manifest: Manifest) -> dict[str, set[int]]:
    """Offsets of the samples that were left out on indexing, by shard."""
    offsets: dict[str, set[int]] = {info.name: set() for info in manifest.shards}
    if manifest.skipped:
        with fsspec.open(join(manifest.folder, SKIPPED), "rt", encoding="utf-8") as lines:
            for line in map(json.loads, lines):
                offsets[line["shard"]].add(line["offset"])
    return offsets


def stats(
    folder: str | os.PathLike, cache: Cache | None = None, *, max_records: int = 100_000, max_images: int = 1_000
) -> dict[str, Any]:
    """Counts, lengths in characters and sizes in pixels, ready for JSON.

    `samples`, `texts`, `targets` and `bytes` are exact. What needs the records themselves (`tasks`) is counted on at
    most `max_records` of them, evenly spread, `image_sizes` on `max_images`; `records_read` says on how many.
    """
    manifest = Manifest.open(folder, cache)
    reader, read = Reader(manifest, cache), _spread(manifest.samples, max_records)
    measured = set(_spread(manifest.samples, max_images) if manifest.kind == "images" else ())
    lengths: dict[str, dict[str, list[int]]] = {}
    sizes: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    for index in sorted(measured.union(read)):
        sample = reader.read(index)
        for text in sample.record.texts:
            of_task = lengths.setdefault(text.task, {"prompt": [], "target": []})
            texts[text.task] += 1
            of_task["target"] += map(len, text.targets)
            of_task["prompt"] += [len(text.prompt)] if text.prompt else []
        if index in measured:
            sizes["{}x{}".format(*Image.open(io.BytesIO(sample.payload)).size)] += 1
    return {
        **{name: getattr(manifest, name) for name in ("folder", "kind", "dataset", "split", "digest")},
        **{name: getattr(manifest, name) for name in ("bytes", "samples", "texts", "skipped")},
        "shards": len(manifest.shards),
        "targets": int(manifest.sidecar["targets"].sum(dtype=np.int64)),
        "records_read": len(measured.union(read)),
        "tasks": {
            task: {
                "texts": texts[task],
                "targets": len(of_task["target"]),
                **{f"{name}_characters": _percentiles(values) for name, values in of_task.items() if values},
            }
            for task, of_task in sorted(lengths.items())
        },
        "image_sizes": dict(sizes.most_common(10)),
        "images_measured": sizes.total(),
    }


def _spread(n: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)).tolist()


def _percentiles(values: list[int]) -> dict[str, int]:
    return {f"p{p}": int(np.percentile(values, p)) for p in (5, 50, 95, 100)}
