"""Records -> tar shards, atomically: the folder of a set appears whole, under its name, or not at all.

Equal input gives equal bytes (fixed time and owner), so a set that is built twice has one digest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from webdataset import TarWriter

from shards.manifest import INDEX, Kind, Manifest, ShardError, ShardInfo, SidecarWriter, write_index, write_whole
from shards.read import PAYLOADS
from shards.record import Record

BLOCK = 512
MAX_NAME = 100  # characters of a member's name that every tar reader takes without an extended header


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
    """Writes (record, payload, extension) triples to OUT/SPLIT-000000.tar ... with `index.json` and its sidecar.

    OUT is the folder of the split itself. A shard is closed before it would pass either bound. Raises ShardError for
    an OUT that already holds something (unless `overwrite`), a key that occurs twice, an extension that is not of the
    set's kind, no sample at all; RecordError for a bad record. On any error OUT is as it was before.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        if (out / INDEX).exists():
            raise ShardError(f"{out} already holds shards: choose another folder or allow it to be overwritten")
        if not out.is_dir() or any(out.iterdir()):
            raise ShardError(f"{out} is there and is not empty: choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}.writing")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        shards, sidecar = _write_tars(samples, beside, split, kind, max_shard_bytes, max_shard_samples)
        files = tuple(write_whole(beside / name, [data]) for name, data in sorted((extra_files or {}).items()))
        manifest = Manifest(str(beside), kind, dataset, split, shards, *sidecar, encoder=encoder, files=files)
        write_index(manifest, beside)
        _sync_folder(beside)
        _swap_in(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return replace(manifest, folder=str(out))


def _write_tars(samples, folder: Path, split: str, kind: Kind, max_bytes: int, max_samples: int):
    """Gives the shards' infos, and the sidecar's info with its key width."""
    sidecar = SidecarWriter(folder / "index.bin")
    shards: list[ShardInfo] = []
    keys: set[str] = set()  # grows by some 100 bytes a sample: the price of naming a duplicate at once
    shard: _Shard | None = None
    try:
        for record, payload, extension in samples:
            record.check()
            if record.key in keys:
                raise ShardError(f"the key {record.key!r} occurs twice in {split}: keys must be unique in a split")
            if extension not in PAYLOADS[kind]:
                raise ShardError(
                    f"{record.key}: extension {extension!r} in a set of {kind}, expected {', '.join(PAYLOADS[kind])}"
                )
            if len(record.key) + 1 + max(len(extension), 4) > MAX_NAME:
                raise ShardError(f"the key {record.key!r} makes a name of more than {MAX_NAME} characters")
            keys.add(record.key)
            members = {extension: payload, "json": record.to_json()}
            size = sum(BLOCK + _padded(len(data)) for data in members.values())
            if shard and (shard.samples == max_samples or shard.offset + size > max_bytes):
                shards.append(shard.close())
                shard = None
            shard = shard or _Shard(folder / f"{split}-{len(shards):06d}.tar")
            shard.add(record, members, sidecar)
        if shard is None:
            raise ShardError(f"there is no sample to write for {split}")
        shards.append(shard.close())
        return tuple(shards), sidecar.finish()
    finally:
        sidecar.discard()
        if shard:
            shard.abandon()


class _Shard:
    """One tar being written, with the hash of its bytes. TarWriter sees it as its file."""

    def __init__(self, path: Path):
        self.path, self.offset, self.samples, self.texts, self.bytes = path, 0, 0, 0, 0
        self.file: BinaryIO = open(path, "wb")  # noqa: SIM115 - closed by close, or by _write_tars on an error
        self.sha256 = hashlib.sha256()
        self.tar = TarWriter(self, user="harness", group="harness", mtime=0, encoder=False, compress=False)

    def write(self, data: bytes) -> int:
        self.sha256.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def add(self, record: Record, members: Mapping[str, bytes], sidecar: SidecarWriter) -> None:
        crc = size = end = 0
        self.tar.write({"__key__": record.key, **members})
        for extension in sorted(members):  # the order of TarWriter
            content = members[extension]
            crc = zlib.crc32(content, crc)
            end = size + BLOCK + len(content)
            size += BLOCK + _padded(len(content))
        counts = len(record.texts), record.targets, record.characters
        sidecar.append(self.offset, end, *counts, crc, record.key)
        self.offset += size
        self.samples += 1
        self.texts += len(record.texts)

    def close(self) -> ShardInfo:
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return ShardInfo(self.path.name, self.bytes, self.sha256.hexdigest(), self.samples, self.texts)

    def abandon(self) -> None:
        """After an error; does nothing to a shard that was closed. Left open, tarfile would write when collected."""
        with suppress(OSError):
            self.tar.close()
        self.file.close()


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _swap_in(beside: Path, out: Path) -> None:
    """Renames the finished folder to its name; what was there before goes only when the new one stands."""
    if not out.exists():
        os.rename(beside, out)
    else:
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        os.rename(out, old)
        os.rename(beside, out)
        shutil.rmtree(old)
    _sync_folder(out.parent)
