"""The `dataset_*.json` files of Karpathy's splits (Flickr8k, Flickr30k, COCO) -> one record an
image.

Splits are train, val and test; `restval` (COCO) goes into train, as everybody trains on it, and is
counted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from shards.files import ShardError
from shards.sources.source import Images, ImagesAt, Source, keys_of, read_json, rows_of, unique

_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def load(
    images: ImagesAt, captions: Annotated[Path, "dataset_flickr8k.json, _flickr30k or _coco."]
) -> Source:
    """Reads one file; `captions` is dataset_flickr8k.json or its like. ShardError for another
    format or split, or a name twice.
    """
    where = f"--captions {captions}"
    document = read_json(captions, "--captions")
    rows = rows_of(document, "images", ("filename", "split", "sentences"), where)
    names = [str(row["filename"]) for row in rows]
    unique(names, f"{where}: the image")
    key_of = keys_of(names)

    source = Source(str(document.get("dataset", "karpathy")), Images(images))
    for name, row in zip(names, rows, strict=True):
        if str(row["split"]) not in _SPLITS:
            raise ShardError(
                f"{where}: {name} is in the split {row['split']!r}, expected one of "
                f"{', '.join(_SPLITS)}"
            )
        split = _SPLITS[row["split"]]
        sentences = row["sentences"] if isinstance(row["sentences"], list) else [None]
        texts: list[Any] = [
            sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences
        ]
        coco = row.get("cocoid")
        numbered = isinstance(coco, int)
        key = f"{coco:012d}" if numbered else key_of[name]
        added = source.add_captions(name, texts, split, key, str(coco) if numbered else None)
        source.notes["images of 'restval', put into 'train'"] += added and row["split"] == "restval"
    source.skip_rest("not in the list of images")
    return source
