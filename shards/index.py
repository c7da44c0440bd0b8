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

import fsspec
import numpy as np
from braceexpand import braceexpand

from shards.files import ShardError, is_remote, join, write_whole
from shards.layout import Layout
from shards.manifest import FORMAT, INDEX, SIDECAR, SIDECAR_1, SKIPPED, Manifest
from shards.remote import Patience, patiently
from shards.sidecar import Indexing, Progress, hashes_by_shard, write_index

_COMPRESSED = re.compile(r"(.*)\.(?:tgz|tbz2|txz|tar\.(?:gz|bz2|xz|zst))")


def index_shards(
    source: str | os.PathLike,
    dataset: str,
    split: str,
    *,
    layout: Layout | None = None,
    out: Path | str | None = None,
    overwrite: bool = False,
    on_progress: Progress = lambda samples: None,
) -> Manifest:
    """Makes `index.json` and its sidecar for WebDataset shards made elsewhere; the tars stay as and
    where they are.

    `source` is a folder or fsspec URL of tars, or a pattern like `s3://b/train-{0000..0042}.tar`.
    `out` is where the index goes: needed for a remote source, else beside the tars. A sample is
    adjacent files of one key: an image with our record, or with a "caption" in .json, or with a
    caption in .txt; or what `layout` says. A sample without image or text is left out, counted in
    the index and named in `skipped.jsonl`. Raises ShardError, naming shard and offset, for a
    damaged tar or a key that occurs again, and naming the files of a sample where the first
    thousand are not understood.
    """
    base, names = _find_tars(os.fspath(source).removeprefix("file://"))
    if out is None and is_remote(base):
        raise ShardError(f"{base} is remote: say with --out where its index is to be written")
    folder = Path(base if out is None else out)
    if (folder / INDEX).exists() and not overwrite:
        raise ShardError(
            f"{folder / INDEX} is there already: index the shards again with --overwrite"
        )
    indexing = Indexing("images", dataset, split, on_progress, layout)
    for name in names:
        indexing.add(join(base, name))
    skipped = indexing.skipped
    if not any(shard.samples for shard in indexing.shards):
        raise ShardError(f"{base}: {indexing.nothing_found()}")
    (folder / INDEX).unlink(missing_ok=True)
    if skipped:
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped)
        write_whole(folder / SKIPPED, lines.encode())
    place = base if is_remote(base) else str(Path(base).resolve())
    beside = place == str(folder.resolve())
    manifest = indexing.finish(folder, base=None if beside else place)
    write_index(manifest, folder)
    return manifest


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
    ends = [
        " or ".join(f".{end.decode()}" for end in np.unique(manifest.sidecar[f"{part}_extension"]))
        for part in ("payload", "text")
    ]
    what = 'records or their "caption"' if ".json" in ends[1] else "captions"
    return f"pictures from {ends[0]}, {what} from {ends[1]}"


def _listed(folder: str) -> list[str]:
    system, path = fsspec.core.url_to_fs(folder)
    return [entry.rstrip("/").rpartition("/")[2] for entry in system.ls(path, detail=False)]


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
