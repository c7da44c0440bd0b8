"""Records -> tar shards, atomically: the folder of a set appears whole, under its name, or not at
all.

Equal input gives equal bytes (fixed time and owner), so a set that is built twice has one digest.
"""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import psutil
from webdataset import TarWriter

from shards.files import ShardError, sync, write_whole
from shards.manifest import INDEX, Kind, Manifest
from shards.read import PAYLOADS
from shards.record import Record
from shards.sidecar import Indexing, write_index
from shards.tar import BLOCK

# characters of a member's name that every tar reader takes without an extended header
MAX_NAME = 100


def write_shards(
    samples: Iterable[tuple[Record, bytes, str]],
    out: Path | str,
    *,
    dataset: str,
    split: str,
    kind: Kind = "images",
    encoder: dict[str, Any] | None = None,
    max_shard_bytes: int = 256 * 2**20,
    max_shard_samples: int = 10_000,
    extra_files: Mapping[str, bytes] | None = None,
    overwrite: bool = False,
) -> Manifest:
    """Writes (record, payload, extension) triples to OUT/SPLIT-000000.tar ... with `index.json` and
    its sidecar.

    OUT is the folder of the split itself. A shard is closed before it would pass either bound.
    Raises ShardError for an OUT that already holds something (unless `overwrite`), a key that
    occurs twice, an extension that is not of the set's kind, no sample at all; RecordError for a
    bad record. On any error OUT is as it was before.
    """
    out = Path(out)
    settle(out)
    if out.exists() and not overwrite:
        if (out / INDEX).exists():
            raise ShardError(
                f"{out} already holds shards: choose another folder, or replace them with "
                "--overwrite"
            )
        if not out.is_dir() or any(out.iterdir()):
            raise ShardError(f"{out} is there and is not empty: choose another folder")
    with folder_beside(out) as beside:
        indexing = Indexing(kind, dataset, split)
        numbered = _numbered(samples, split, kind, max_shard_bytes, max_shard_samples)
        for number, members in groupby(numbered, key=itemgetter(0)):
            path = beside / f"{split}-{number:06d}.tar"
            _write_tar(path, members)
            indexing.add(str(path))
        if not indexing.shards:
            raise ShardError(f"there is no sample to write for {split}")
        assert not indexing.skipped, indexing.skipped[0]  # each was checked before it was written
        extra = sorted((extra_files or {}).items())
        files = tuple(write_whole(beside / name, data) for name, data in extra)
        made = indexing.finish(beside, encoder=encoder, files=files)
        manifest = replace(made, folder=str(out))
        write_index(manifest, beside)
        sync(beside)
        _put_in_place(beside, out)
    return manifest


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
    prefix = f".{out.name}.{os.uname().nodename}."
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        process = left.name.removeprefix(prefix).partition(".")[0]
        # not decimal: that of a machine whose name goes on
        if process.isdecimal() and not psutil.pid_exists(int(process)):
            shutil.rmtree(left)
    beside = out.with_name(f"{prefix}{os.getpid()}")
    beside.mkdir()
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)


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
        if extension not in PAYLOADS[kind]:
            raise ShardError(
                f"{record.key}: extension {extension!r} in a set of {kind}, expected "
                f"{', '.join(PAYLOADS[kind])}"
            )
        if len(record.key) + 1 + max(len(extension), 4) > MAX_NAME:
            raise ShardError(
                f"the key {record.key!r} makes a name of more than {MAX_NAME} characters"
            )
        keys.add(record.key)
        members = dict(sorted({extension: payload, "json": record.to_json()}.items()))
        size = sum(map(_size_in_tar, members.values()))
        if count and (count == max_samples or held + size > max_bytes):
            number += 1
            held = count = 0
        held += size
        count += 1
        yield number, record, members


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
