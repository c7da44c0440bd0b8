"""The set of pictures that features were made from: where it lies now, and its pictures.

A feature set remembers the place, from its own folder too, and the digest of what lay there. What
needs pixels (reports, floors, pages of answers) reads them there by key.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from functools import lru_cache

import numpy as np

from shards.cache import Cache
from shards.files import ShardError, UnreachableError, is_remote
from shards.manifest import Manifest
from shards.read import Reader, record_key

logger = logging.getLogger(__name__)


def source_of(manifest: Manifest, cache: Cache | None = None) -> Manifest | None:
    """Returns the set of pictures that a feature set was made from, of pictures the set itself.

    It is looked for where it lay, then where it would lie if both were moved together. None, with
    the reason in the log, where that cannot be opened or read any more, or is another set by now;
    None too for features that do not remember it (made before sets did).
    """
    if manifest.kind == "images":
        return manifest
    problems = []
    for place in _places(manifest):
        try:
            source = Manifest.open(place, cache or manifest.cache)
            Reader(
                source, cache, answered=False
            )  # one that is remote cannot be read without a cache
        except ShardError as error:
            problems.append(f"the pictures that {manifest.folder} was made from are gone: {error}")
            continue
        if source.kind == "images" and source.digest == manifest.origin_digest:
            return source
        problems.append(
            f"{place} is no longer the set of pictures that {manifest.folder} was made from: its "
            f"digest is {source.digest}, expected {manifest.origin_digest}"
        )
    if problems:
        _warn("; ".join(problems))
    return None


def remembered(source: Manifest | None, out: str | os.PathLike) -> dict[str, str]:
    """Returns what the index of a feature set in the folder `out` tells of the set of pictures
    that it was made from, and how that is reached from `out`.
    """
    if source is None:
        return {}
    known = {"origin_digest": source.digest}
    if is_remote(source.folder):
        return known | {"origin": source.folder}
    way = os.path.relpath(os.path.realpath(source.folder), os.path.realpath(out))
    return known | {"origin": os.path.abspath(source.folder), "origin_relative": way}


def _places(manifest: Manifest) -> list[str]:
    places = [] if manifest.origin is None else [manifest.origin]
    if manifest.origin_relative is not None and not is_remote(manifest.folder):
        beside = os.path.join(os.path.realpath(manifest.folder), manifest.origin_relative)
        places.append(os.path.normpath(beside))
    return list(dict.fromkeys(places))


@lru_cache
def _warn(sentence: str) -> None:
    """Warns once in a process: a run looks for the same pictures after every epoch."""
    logger.warning("%s", sentence)


def indices_at_source(manifest: Manifest, source: Manifest, indices_S: Iterable[int]) -> np.ndarray:
    """Returns which samples of `source` have the keys of these samples, int64; -1 where none."""
    return indices_of(source, [manifest.key(int(index)) for index in indices_S])


def indices_of(manifest: Manifest, keys_S: Sequence[str]) -> np.ndarray:
    """Returns which samples of a set have the records of these keys, int64; -1 where none has."""
    needed = set(keys_S)
    places = {
        key: place
        for place, raw in enumerate(manifest.sidecar["key"])
        if (key := record_key(raw.decode(errors="replace"))) in needed
    }
    return np.array([places.get(key, -1) for key in keys_S], np.int64)


def pictures_of(
    manifest: Manifest, indices_S: Iterable[int], cache: Cache | None = None
) -> list[bytes | None]:
    """Returns the encoded pictures of these samples, of features those that they were made from;
    None for each that is not there or cannot be read. Raises UnreachableError.
    """
    indices = [int(index) for index in indices_S]
    source = source_of(manifest, cache)
    if source is None:
        return [None] * len(indices)
    if source is not manifest:
        indices = indices_at_source(manifest, source, indices).tolist()
    reader = Reader(source, cache, answered=False)
    return [_payload(reader, index) if index >= 0 else None for index in indices]


def _payload(reader: Reader, index: int) -> bytes | None:
    try:
        return reader.read(index).payload
    except UnreachableError:
        raise
    except ShardError:  # the loader names what it cannot read
        return None
