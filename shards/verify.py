"""Whole sets: what is wrong with one, and what is in it.

A folder or fsspec URL of a set -> sentences about its problems (verify), figures (stats). Nothing
is extracted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from shards.features import read_features
from shards.files import ShardError, is_remote, join
from shards.images import on_white, upright
from shards.manifest import INDEX, SIDECAR, SKIPPED, STATISTICS, Manifest
from shards.read import Reader, Sample, parse_sample
from shards.record import RecordError
from shards.sidecar import Progress, row_of
from shards.tar import Group, groups, open_shard


def verify(folder: str | os.PathLike, on_progress: Progress = lambda samples: None) -> list[str]:
    """Re-reads and re-hashes everything, decodes every image; a sentence for each problem, none if
    all is well.
    """
    try:
        manifest = Manifest.read_index(folder)
    except ShardError as error:
        return [str(error)]
    problems = manifest.file_problems() + _strangers(manifest)
    for file in manifest.files:
        if not any(join(manifest.folder, file.name) in problem for problem in problems):
            problems += _problem(partial(manifest.read_file, file.name))
    statistics = manifest.statistics_file
    if statistics and not any(statistics.name in problem for problem in problems):
        problems += _problem(lambda: manifest.statistics)
    broken = _problem(lambda: manifest.sidecar)
    if broken:
        name = manifest.sidecar_file.name
        return problems + ([] if any(name in problem for problem in problems) else broken)
    counted = np.unique(manifest.sidecar["key"], return_counts=True)
    problems += [
        f"{folder}: key {key.decode()!r} occurs {n} times"
        for key, n in zip(*counted, strict=True)
        if n > 1
    ]
    try:
        left_out = _left_out(manifest)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        where = join(manifest.folder, SKIPPED)
        return [*problems, f"{where} does not name what the index left out: {error!r}"]
    problems += _miscounted(manifest)
    for shard, info in enumerate(manifest.shards):
        if is_remote(manifest.location(shard)) or Path(manifest.location(shard)).is_file():
            problems += _verify_shard(manifest, shard, left_out[info.name], on_progress)
    return problems


def _miscounted(manifest: Manifest) -> list[str]:
    """Says where the index counts other records without a picture than its sidecar shows."""
    if manifest.format == 1:  # whose records all have one
        return []
    found = int((manifest.sidecar["payload_extension"] == b"").sum())
    if found == manifest.without_picture:
        return []
    where = join(manifest.folder, INDEX)
    return [
        f"{where}: {manifest.without_picture} records are without a picture, the sidecar has "
        f"{found}"
    ]


def _verify_shard(
    manifest: Manifest, shard: int, left_out: set[int], on_progress: Progress
) -> list[str]:
    info = manifest.shards[shard]
    location = manifest.location(shard)
    first = int(manifest.starts[shard])
    rows = manifest.sidecar[first : manifest.starts[shard + 1]]
    waiting = {int(row["offset"]): first + i for i, row in enumerate(rows)}
    problems: list[str] = []
    stopped = hashed = None
    if int(rows["texts"].sum()) != info.texts:
        problems.append(
            f"{location}: the sidecar counts {rows['texts'].sum()} texts, the index {info.texts}"
        )
    try:
        with open_shard(location) as (read, size):
            try:
                for group in groups(read, size):
                    index = waiting.pop(group.start, None)
                    if index is not None:
                        problems += _check_group(manifest, index, group, location)
                        on_progress(1)
                    elif group.start not in left_out:
                        problems.append(
                            f"{location}: {group.key} at offset {group.start} is not in the index"
                        )
            except ShardError as error:
                stopped = f"{location}: {error}"
            hashed = read.finish()
    except ShardError as error:
        return [str(error)]
    precise = len(problems)
    if stopped and not is_remote(location):
        # behind a damaged place the samples are still found by their offsets
        reader = Reader(manifest, answered=False)
        for index in waiting.values():
            problems += _problem(partial(_read_and_decode, reader, index))
            on_progress(1)
    if stopped and len(problems) == precise:
        problems.append(stopped)
    if waiting and not stopped:
        keys = ", ".join(manifest.key(index) for index in list(waiting.values())[:3])
        problems.append(
            f"{location}: {len(waiting)} samples of the index are not where it says ({keys} ...)"
        )
    if not problems and hashed != (info.bytes, info.sha256):
        problems.append(f"{location} has sha256 {hashed[1]}, expected {info.sha256}")
    return problems


def _read_and_decode(reader: Reader, index: int) -> None:
    _decode(reader.manifest, reader.walk(index))


def _check_group(manifest: Manifest, index: int, group: Group, location: str) -> list[str]:
    """Says what is wrong with one sample found in its place."""
    row = manifest.sidecar[index]
    place = f"{location}, offset {group.start}, key {group.key}"
    if group.key != row["key"].decode():
        return [f"{place}: the index has {row['key'].decode()} here"]
    if group.crc != row["crc"] or group.end - group.start != row["size"]:
        return [
            f"{place}: the bytes have crc {group.crc:08x}, expected {int(row['crc']):08x}: they "
            "are damaged"
        ]
    if group.problem:
        return [f"{place}: {group.problem}"]
    if manifest.layout:
        group = manifest.layout.applied(group)
    try:
        parsed = parse_sample(group.key, group.contents, **manifest.described)
    except (ShardError, RecordError) as error:
        return [f"{place}: {error}"]
    found = row_of(group, parsed)
    for name, value in zip((row.dtype.names or ())[:-1], found, strict=False):  # format 1 has fewer
        if value != row[name]:
            return [f"{place}: the record has {value!s} {name}, the index says {row[name]}"]
    name = parsed.payload
    sample = Sample(parsed.record, group.contents.get(name), name, 0, index)
    return [f"{place}: {problem}" for problem in _problem(lambda: _decode(manifest, sample))]


def _decode(manifest: Manifest, sample: Sample) -> None:
    """Raises ShardError unless the payload is what the set promises."""
    if not sample.known.has_picture:
        return
    if manifest.kind == "images":
        try:
            on_white(upright(sample.payload)[0])
        except Exception as error:  # Pillow's decoders raise what they like
            raise ShardError(
                f"the image cannot be decoded: {str(error).split(' <_io')[0]}"
            ) from error
        return
    read_features(sample.payload, manifest.encoder)


def _problem(check: Callable[[], object]) -> list[str]:
    try:
        check()
    except (ShardError, OSError) as error:
        return [str(error)]
    return []


def _strangers(manifest: Manifest) -> list[str]:
    """Files in the set's own folder that its index does not name: the loader would never read
    them.
    """
    if is_remote(manifest.folder):
        return []
    known = {INDEX, SIDECAR, SKIPPED, STATISTICS, manifest.sidecar_file.name} | {
        info.name for info in (*manifest.shards, *manifest.files)
    }
    # What img2dataset writes beside each tar.
    stems = [info.name.removesuffix(".tar") for info in manifest.shards]
    known |= {f"{stem}{end}" for stem in stems for end in ("_stats.json", ".parquet")}
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


def stats(folder: str | os.PathLike) -> dict[str, Any]:
    """Returns counts, lengths in characters and sizes in pixels, ready for JSON.

    `samples`, `texts`, `targets` and `bytes` are exact. What needs the records themselves (`tasks`)
    is counted on at most 100,000 of them, evenly spread, `image_sizes` on 1,000; `records_read`
    says on how many. `unreadable` counts those of them that cannot be read, or decoded.
    """
    manifest = Manifest.open(folder)
    reader = Reader(manifest, answered=False)
    read = _spread(manifest.samples, 100_000)
    measured = set(_spread(manifest.samples, 1_000) if manifest.kind == "images" else ())
    tasks: dict[str, dict[str, Any]] = {}
    sizes: Counter[str] = Counter()
    unreadable = 0
    for index in sorted(measured.union(read)):
        try:
            sample = reader.read(index)
            if index in measured and sample.known.has_picture:
                sizes["{}x{}".format(*upright(sample.payload)[0].size)] += 1
        except Exception:  # Pillow's decoders raise what they like; `verify` says what
            unreadable += 1
            continue
        for text in sample.known.texts:
            task = tasks.setdefault(text.task, {"texts": 0, "prompt": [], "target": []})
            task["texts"] += 1
            task["target"] += map(len, text.targets)
            task["prompt"] += [len(text.prompt)] if text.prompt else []
    for task in tasks.values():
        task["targets"] = len(task["target"])
        for name in ("prompt", "target"):
            if lengths := task.pop(name):
                percentiles = {f"p{p}": int(np.percentile(lengths, p)) for p in (5, 50, 95, 100)}
                task[f"{name}_characters"] = percentiles
    names = ("folder", "kind", "dataset", "split", "digest", "bytes", "samples", "texts", "skipped")
    return {
        **{name: getattr(manifest, name) for name in names},
        "shards": len(manifest.shards),
        "targets": int(manifest.sidecar["targets"].sum(dtype=np.int64)),
        "without_picture": manifest.without_picture,
        "records_read": len(measured.union(read)) - unreadable,
        "unreadable": unreadable,
        "tasks": tasks,
        "image_sizes": dict(sizes.most_common(10)),
        "images_measured": sizes.total(),
    }


def _spread(n: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(int)).tolist()
