"""Records -> tar shards, atomically: the folder of a set appears whole, under its name, or not at
all.

Equal input gives equal bytes (fixed time and owner), so a set that is built twice has one digest.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
from webdataset import TarWriter

from shards.files import ShardError, sync, write_whole
from shards.manifest import INDEX, STATISTICS, Kind, Manifest, StatisticsInfo
from shards.origin import remembered
from shards.read import PAYLOADS
from shards.record import Record
from shards.sidecar import Indexing, write_index
from shards.statistics import COLUMNS, statistics_of, unknown
from shards.tar import BLOCK

# Record, payload, extension and, where the caller has it, the row of its statistics. A record
# without a picture comes with b"" and "".
Sample = tuple[Record, bytes, str] | tuple[Record, bytes, str, np.ndarray]

# characters of a member's name that every tar reader takes without an extended header
MAX_NAME = 100


def write_shards(
    samples: Iterable[Sample],
    out: Path | str,
    *,
    dataset: str,
    split: str,
    kind: Kind = "images",
    encoder: dict[str, Any] | None = None,
    max_shard_bytes: int = 256 * 2**20,
    max_shard_samples: int = 10_000,
    extra_files: Mapping[str, bytes] | None = None,
    origin: Manifest | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes (record, payload, extension) to OUT/SPLIT-000000.tar ... with `index.json`, its
    sidecar and the pictures' statistics: the row that a sample has as its fourth, else what its
    picture gives; of features without such rows there are none.

    OUT is the folder of the split itself. A shard is closed before it would pass either bound.
    `origin` is the set that features were made from, whose place and digest are remembered.
    Raises ShardError for an OUT that already holds something (unless `overwrite`), a key that
    occurs twice, an extension that is not of the set's kind or of a record without a picture, no
    sample at all; RecordError for a bad record. On any error OUT is as it was before.
    """
    out = Path(out)
    settle(out)
    if not overwrite:
        _must_be_free(out)
    with folder_beside(out) as beside:
        indexing = Indexing(kind, dataset, split)
        rows = bytearray()
        triples = _with_rows_noted(samples, kind, rows)
        numbered = _numbered(triples, split, kind, max_shard_bytes, max_shard_samples)
        _write_tars(numbered, beside, split, indexing)
        if not indexing.shards:
            raise ShardError(f"there is no sample to write for {split}")
        assert not indexing.skipped, indexing.skipped[0]  # each was checked before it was written
        extra = sorted((extra_files or {}).items())
        files = tuple(write_whole(beside / name, data) for name, data in extra)
        outside_digest: dict[str, Any] = {"statistics_file": _write_statistics(beside, rows)}
        outside_digest |= remembered(origin, out)
        made = indexing.finish(beside, encoder=encoder, files=files, **outside_digest)
        manifest = replace(made, folder=str(out))
        write_index(manifest, beside)
        sync(beside)
        _put_in_place(beside, out)
    return manifest


def _must_be_free(out: Path) -> None:
    if not out.exists():
        return
    if (out / INDEX).exists():
        raise ShardError(
            f"{out} already holds shards: choose another folder, or replace them with --overwrite"
        )
    if not out.is_dir() or any(out.iterdir()):
        raise ShardError(f"{out} is there and is not empty: choose another folder")


def _with_rows_noted(
    samples: Iterable[Sample], kind: Kind, rows: bytearray
) -> Iterator[tuple[Record, bytes, str]]:
    """Yields the samples without their statistics, which go to `rows`."""
    for record, payload, extension, *given in samples:
        if given:
            rows += given[0].astype("<f4").tobytes()
        elif not record.has_picture:
            rows += unknown(1).astype("<f4").tobytes()
        elif kind == "images":
            rows += statistics_of(payload).astype("<f4").tobytes()
        yield record, payload, extension


def _write_statistics(folder: Path, rows: bytearray) -> StatisticsInfo | None:
    if not rows:
        return None
    return StatisticsInfo(**asdict(write_whole(folder / STATISTICS, bytes(rows))), columns=COLUMNS)


def _put_in_place(beside: Path, out: Path) -> None:
    old = _aside(out, "replaced")
    if out.exists():  # what was there goes only when the new one stands
        os.rename(out, old)
    os.rename(beside, out)
    sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def add_to(beside: Path, out: Path) -> None:
    """Moves all that lies in `beside` into the folder `out`, or into its place if it is not there.

    A process killed in it leaves a folder whose name says so: `settle` does the rest.
    """
    if out.exists():
        adding = _aside(out, "adding")
        os.rename(beside, adding)
        _move_all(adding, out)
    else:
        os.rename(beside, out)


def settle(out: Path) -> None:
    """Ends what a killed process left between two renames: a set that was to be replaced stands
    again, one that was to be added is there whole, what was replaced is gone.
    """
    replaced = _aside(out, "replaced")
    if replaced.exists():
        if out.exists():
            shutil.rmtree(replaced)
        else:
            os.rename(replaced, out)
    adding = _aside(out, "adding")
    if adding.exists():
        _move_all(adding, out)


def _aside(out: Path, what: Literal["replaced", "adding"]) -> Path:
    out = Path(os.path.abspath(out))
    return out.with_name(f".{out.name}.{what}")


def _move_all(adding: Path, out: Path) -> None:
    out.mkdir(exist_ok=True)
    for path in sorted(adding.iterdir()):
        os.replace(path, out / path.name)
    adding.rmdir()
    sync(out)


@contextmanager
def folder_beside(out: Path) -> Iterator[Path]:
    """Makes a new folder beside `out` to build in, gone at the end if it was not renamed to it.

    What killed processes of this machine left there is removed; that of others may still be
    written.
    """
    out = Path(os.path.abspath(out))  # also where it is "."
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in left_beside(out):
        shutil.rmtree(left)
    beside = out.with_name(f"{_prefix(out)}{os.getpid()}")
    beside.mkdir()
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def left_beside(out: Path) -> list[Path]:
    """Returns the folders that killed processes of this machine left beside `out`."""
    out = Path(os.path.abspath(out))
    prefix = _prefix(out)
    return [
        left
        for left in sorted(out.parent.glob(f"{glob.escape(prefix)}*"))
        if (process := left.name.removeprefix(prefix).partition(".")[0]).isdecimal()
        # not decimal: that of a machine whose name goes on
        and not psutil.pid_exists(int(process))
    ]


def _prefix(out: Path) -> str:
    return f".{out.name}.{os.uname().nodename}."


def _numbered(
    samples: Iterable[tuple[Record, bytes, str]],
    split: str,
    kind: Kind,
    max_bytes: int,
    max_samples: int,
) -> Iterator[tuple[int, Record, dict[str, bytes]]]:
    """Yields checked samples as (number of the shard, record, its files by extension in the order
    of TarWriter).
    """
    # grows by some 100 bytes a sample: the price of naming a duplicate at once
    keys: set[str] = set()
    number = held = count = 0
    for record, payload, extension in samples:
        record.check()
        if record.key in keys:
            raise ShardError(
                f"the key {record.key!r} occurs twice in {split}: keys must be unique in a split"
            )
        ends = PAYLOADS[kind] if record.has_picture else ("",)
        if extension not in ends:
            expected = ", ".join(ends) or "none, since its record has no picture"
            raise ShardError(
                f"{record.key}: extension {extension!r} in a set of {kind}, expected {expected}"
            )
        if len(record.key) + 1 + max(len(extension), 4) > MAX_NAME:
            raise ShardError(
                f"the key {record.key!r} makes a name of more than {MAX_NAME} characters"
            )
        keys.add(record.key)
        beside = {extension: payload} if record.has_picture else {}
        members = dict(sorted({**beside, "json": record.to_json()}.items()))
        size = sum(map(_size_in_tar, members.values()))
        if count and (count == max_samples or held + size > max_bytes):
            number += 1
            held = count = 0
        held += size
        count += 1
        yield number, record, members


def _write_tars(
    numbered: Iterable[tuple[int, Record, dict[str, bytes]]],
    folder: Path,
    split: str,
    indexing: Indexing,
) -> None:
    """Writes the shards; each is read again for its index while the next one is written."""
    with ThreadPoolExecutor(1) as reading:
        added = []
        for number, samples in groupby(numbered, key=itemgetter(0)):
            path = folder / f"{split}-{number:06d}.tar"
            _write_tar(path, samples)
            added.append(reading.submit(indexing.add, str(path)))
    for done in added:
        done.result()


def _write_tar(path: Path, samples: Iterable[tuple[int, Record, dict[str, bytes]]]) -> None:
    with open(path, "wb") as file:
        with TarWriter(
            file, user="harness", group="harness", mtime=0, encoder=False, compress=False
        ) as tar:
            for _, record, members in samples:
                tar.write({"__key__": record.key, **members})
        file.flush()
        os.fsync(file.fileno())


def _size_in_tar(content: bytes) -> int:
    return BLOCK + -(-len(content) // BLOCK) * BLOCK
