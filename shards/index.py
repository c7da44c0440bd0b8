"""An index of ours for WebDataset shards made elsewhere, and a newer one for a set of format 1; the
tars stay as and where they are.

A folder, an fsspec URL or a pattern of tars -> `index.json` and its sidecar, in one pass over each
tar.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from braceexpand import braceexpand

from shards.files import ShardError, is_remote, join, write_whole
from shards.layout import Layout
from shards.manifest import FORMAT, INDEX, SIDECAR, SIDECAR_1, SKIPPED, Manifest
from shards.parts import Parts, Share
from shards.remote import Patience, patiently
from shards.sidecar import Indexing, Progress, hashes_by_shard, write_index

_COMPRESSED = re.compile(r"(.*)\.(?:tgz|tbz2|txz|tar\.(?:gz|bz2|xz|zst))")


class Job:
    """Tars to index, by this process or by several, each of which does its own."""

    def __init__(
        self,
        source: str | os.PathLike,
        dataset: str,
        split: str,
        *,
        layout: Layout | None = None,
        out: Path | str | None = None,
        overwrite: bool = False,
        on_progress: Progress = lambda samples: None,
        share: Share | None = None,
    ):
        """As `index_shards` says of each; share: which process of how many this is."""
        self._base, self._names = _find_tars(os.fspath(source).removeprefix("file://"))
        if out is None and is_remote(self._base):
            raise ShardError(
                f"{self._base} is remote: say with --out where its index is to be written"
            )
        self._folder = Path(self._base if out is None else out)
        self._overwrite = overwrite
        self._named: dict[str, Any] = {"dataset": dataset, "split": split, "layout": layout}
        self._on_progress = on_progress
        stamps = [_stamp(self._location(number)) for number in range(len(self._names))]
        made_of = [self._base, self._names, stamps, dataset, split, repr(layout)]
        self._parts = Parts(self._folder / "index", made_of, len(stamps), share or Share())

    def index_own(self) -> None:
        """Indexes the tars that are this process's, for the first one to write."""
        if self._overwrite or not self._is_there():
            self._parts.make_own(self._part)

    def write(self) -> Manifest:
        """Writes the index, of tars of its own and of the other processes."""
        if self._is_there() and not self._overwrite:
            raise ShardError(
                f"{self._folder / INDEX} is there already: index the shards again with --overwrite"
            )
        indexing = Indexing("images", on_progress=self._on_progress, **self._named)
        # Until a sample is understood one tar after the other: so that what is not understood is
        # told at once.
        begun = 0
        while begun < len(self._names) and not indexing.is_understood:
            indexing.add(self._location(begun))
            begun += 1
        if not indexing.is_understood:
            raise ShardError(f"{self._base}: {indexing.nothing_found()}")
        for number, part in self._parts.each(self._part, begun):
            indexing.take(part, self._location(number))
        made = self._finish(indexing)
        self._parts.remove()
        return made

    def _finish(self, indexing: Indexing) -> Manifest:
        folder = self._folder
        (folder / INDEX).unlink(missing_ok=True)
        if indexing.skipped:
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for line in indexing.skipped]
            write_whole(folder / SKIPPED, "".join(lines).encode())
        place = self._base if is_remote(self._base) else str(Path(self._base).resolve())
        beside = place == str(folder.resolve())
        manifest = indexing.finish(folder, base=None if beside else place)
        write_index(manifest, folder)
        return manifest

    def _part(self, number: int) -> bytes:
        one = Indexing("images", is_rest=True, **self._named)
        one.add(self._location(number))
        return one.part()

    def _location(self, number: int) -> str:
        return join(self._base, self._names[number])

    def _is_there(self) -> bool:
        return (self._folder / INDEX).exists()


def index_shards(source: str | os.PathLike, dataset: str, split: str, **options: Any) -> Manifest:
    """Makes `index.json` and its sidecar for WebDataset shards made elsewhere; the tars stay as and
    where they are.

    `source` is a folder or fsspec URL of tars, or a pattern like `s3://b/train-{0000..0042}.tar`.
    `options`: layout, out, overwrite and on_progress. `out` is where the index goes: needed for a
    remote source, else beside the tars. A sample is adjacent files of one key: an image with our
    record, or with a "caption" in .json, or with a caption in .txt; or what `layout` says. A sample
    without image or text is left out, counted in the index and named in `skipped.jsonl`. Raises
    ShardError, naming shard and offset, for a damaged tar or a key that occurs again, and naming
    the files of a sample where the first thousand are not understood.
    """
    return Job(source, dataset, split, **options).write()


def upgrade_index(
    folder: str | os.PathLike, on_progress: Progress = lambda samples: None
) -> Manifest:
    """Rewrites the index of a set of format 1 in format 2, whole or not at all; what is in format 2
    already stays, and gets the hash of each shard's rows where it was made before there were any.

    The set keeps its identity: runs that were begun over it are resumed as before. Raises
    ShardError, and leaves the set as it was, where the tars are not as their index says.
    """
    old = Manifest.open(folder)
    if is_remote(old.folder):
        raise ShardError(f"{folder} is remote: only an index on this machine can be rewritten")
    place = Path(old.folder)
    if old.format == FORMAT:
        (place / SIDECAR_1).unlink(missing_ok=True)  # left by an upgrade that was killed
        if not old.rows_sha256:
            old = replace(old, rows_sha256=hashes_by_shard(old.sidecar, old.shards))
            write_index(old, place)
        return old
    indexing = Indexing(old.kind, old.dataset, old.split, on_progress)
    for shard in range(len(old.shards)):
        indexing.add(old.location(shard))
    new = indexing.finish(place, encoder=old.encoder, files=old.files, base=old.base)
    if new.format_1_digest != old.format_1_digest or new.skipped != old.skipped:
        (place / SIDECAR).unlink()
        raise ShardError(
            f"{folder}: the shards are not as their index says, so it was not upgraded: "
            f"`harness shards verify {folder}` names what is wrong"
        )
    write_index(new, place)
    return new


def how_read(manifest: Manifest) -> str:
    """Says where the pictures and the texts of a set's samples are read from."""
    if manifest.layout:
        return manifest.layout.told()
    ends = []
    for part in ("payload", "text"):
        found = np.unique(manifest.sidecar[f"{part}_extension"])
        ends.append(" or ".join(f".{end.decode()}" for end in found if end))
    what = 'records or their "caption"' if ".json" in ends[1] else "captions"
    pictures = f"pictures from {ends[0]}" if ends[0] else "no pictures"
    return f"{pictures}, {what} from {ends[1]}"


def _listed(folder: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(folder)
    return [entry.rstrip("/").rpartition("/")[2] for entry in system.ls(path, detail=False)]


def _stamp(location: str) -> list[int]:
    """Returns what changes when a tar does: its size, and of a local one the time; [] of none."""
    try:
        if is_remote(location):
            return [patiently(lambda: _size(location), location, Patience())]
        found = os.stat(location)
    except FileNotFoundError:  # told where it is to be read
        return []
    return [found.st_size, found.st_mtime_ns]


def _size(location: str) -> int:
    system_and_path = fsspec.core.url_to_fs(location)
    return int(system_and_path[0].size(system_and_path[1]) or 0)


def _find_tars(source: str) -> tuple[str, list[str]]:
    """Returns the folder and the sorted names of its tars."""
    if source.endswith(".tar"):
        locations = list(braceexpand(source))
        folders = {location.rpartition("/")[0] for location in locations}
        if len(folders) > 1:
            raise ShardError(
                f"{source} names tars of {len(folders)} folders: index one folder at a time"
            )
        return folders.pop() or ".", [location.rpartition("/")[2] for location in locations]
    try:
        found = patiently(lambda: _listed(source), source, Patience())
    except FileNotFoundError as error:
        raise ShardError(f"{source} cannot be listed: it does not exist") from error
    names = sorted(name for name in found if name.endswith(".tar"))
    # A tar that is there in both forms is read in the plain one.
    compressed = sorted(
        name
        for name in found
        if (match := _COMPRESSED.fullmatch(name)) and f"{match[1]}.tar" not in names
    )
    if compressed:
        raise ShardError(
            f"{source} holds {len(compressed)} compressed tars ({compressed[0]} ...), and a sample "
            "is read by its place in a plain one: unpack them first, as with `gunzip`"
        )
    if not names:
        raise ShardError(f"{source} holds no .tar files")
    return source.rstrip("/"), names
