"""What a picture is without a look at its content: brightness, colours, sizes. The gate's floors
and its matched exchange stand on these.

A set and sample numbers -> statistics_SK: from the set's `statistics.bin`; for a set without one
from its own pictures; for a feature set from those it was made from. Legend: S samples, K columns.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from PIL import Image

from shards.cache import Cache
from shards.files import ShardError, UnreachableError
from shards.images import on_white, upright
from shards.manifest import Manifest
from shards.origin import indices_at_source, source_of
from shards.read import Reader

BINS = 8
_CHANNELS = ("red", "green", "blue")
COLUMNS: tuple[str, ...] = (
    "brightness",
    *(f"{channel}_{step}" for channel in _CHANNELS for step in range(BINS)),
    "width",
    "height",
    "bytes",
)
_GREY = (0.299, 0.587, 0.114)  # shares of red, green and blue in a grey level: ITU-R BT.601


def picture_statistics(image: Image.Image, size: int) -> np.ndarray:
    """Returns the statistics of an upright RGB picture in its stored size, float32.

    Brightness is the mean grey level (ITU-R BT.601) in [0, 1]; a colour's 8 columns are the shares
    of pixels whose level of it (0 to 255) lies in each of 8 equal bins; then width and height in
    pixels and `size`, the bytes of the stored file. All pixels count: no thumbnail stands for them.
    """
    counts_of_level = np.array(image.histogram(), np.float64).reshape(len(_CHANNELS), 256)
    shares_of_level = counts_of_level / (image.width * image.height)
    brightness = _GREY @ (shares_of_level @ np.arange(256)) / 255
    shares = shares_of_level.reshape(len(_CHANNELS) * BINS, -1).sum(axis=1)
    return np.array([brightness, *shares, image.width, image.height, size], np.float32)


def statistics_of(payload: bytes) -> np.ndarray:
    """Returns those of an encoded picture as (K,); NaN for one that cannot be decoded."""
    try:
        return picture_statistics(on_white(upright(payload)[0]), len(payload))
    except Exception:  # Pillow's decoders raise what they like; whoever reads the sample says it
        return unknown(1)[0]


def unknown(samples: int) -> np.ndarray:
    """Returns (S, K) of NaN: the rows of samples without a picture that can be read."""
    return np.full((samples, len(COLUMNS)), np.nan, np.float32)


def rows_of(
    manifest: Manifest, indices_S: Iterable[int], cache: Cache | None = None
) -> np.ndarray | None:
    """Returns the statistics of these samples as (S, K), float32, or None where nothing tells them:
    the set stores none, and the pictures that its features were made from are gone.

    The row of a sample without a picture that can be read is NaN. `cache`: for remote sets, the
    set's own where it is not given. Raises ShardError for a damaged `statistics.bin`,
    UnreachableError for data that do not answer.
    """
    indices = [int(index) for index in indices_S]
    info = manifest.statistics_file
    if info is not None and info.columns == COLUMNS:
        stored = manifest.statistics
        return _filled(len(indices), (stored[index]["row"] for index in indices))
    source = source_of(manifest, cache)
    if source is None:
        return None
    if manifest.kind == "images":
        reader = Reader(manifest, cache, answered=False)
        return _filled(len(indices), (_of_sample(reader, index) for index in indices))
    places = indices_at_source(manifest, source, indices)
    is_there = places >= 0
    rows_SK = unknown(len(indices))
    found = rows_of(source, places[is_there], cache)
    assert found is not None  # a set of pictures has them itself
    rows_SK[is_there] = found
    return rows_SK


def _filled(samples: int, rows: Iterable[np.ndarray]) -> np.ndarray:
    rows_SK = unknown(samples)
    for place, row_K in enumerate(rows):
        rows_SK[place] = row_K
    return rows_SK


def _of_sample(reader: Reader, index: int) -> np.ndarray:
    try:
        sample = reader.read(index)
    except UnreachableError:
        raise
    except ShardError:  # the loader names what it cannot read
        return unknown(1)[0]
    return statistics_of(sample.payload) if sample.known.has_picture else unknown(1)[0]
