"""The `dataset_*.json` files of Karpathy's splits (Flickr8k, Flickr30k, COCO) -> one record an image.

Splits are train, val and test; `restval` (COCO) goes into train, as everybody trains on it, and is counted.
"""

from __future__ import annotations

from pathlib import Path

from shards.manifest import ShardError
from shards.record import Text
from shards.sources.source import (
    IMAGE_WITHOUT_TEXT,
    TEXT_WITHOUT_IMAGE,
    Images,
    Source,
    clean_captions,
    keys_of,
    read_json,
    rows_of,
    unique,
)

_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}


def load(images: str | Path, captions: str | Path) -> Source:
    """`captions` is dataset_flickr8k.json or its like. ShardError for another format or split, or a name twice."""
    where = f"--captions {captions}"
    document = read_json(captions, "--captions")
    rows = rows_of(document, "images", ("filename", "split", "sentences"), where)
    names = [str(row["filename"]) for row in rows]
    unique(names, f"{where}: the image")
    key_of = keys_of(names)

    source = Source(str(document.get("dataset", "karpathy")), Images(images))
    for name, row in zip(names, rows, strict=True):
        if row["split"] not in _SPLITS:
            raise ShardError(f"{where}: {name} is in the split {row['split']!r}, expected one of {', '.join(_SPLITS)}")
        split = _SPLITS[row["split"]]
        sentences = row["sentences"] if isinstance(row["sentences"], list) else [None]
        texts = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
        if not all(isinstance(text, str) for text in texts):
            raise ShardError(f"{where}: {name} has a sentence without the text 'raw'")
        path = source.images.find(name)
        if path is None:
            source.skip(TEXT_WITHOUT_IMAGE, name, f"no such image in {source.images.place.name}", split, len(texts))
            continue
        targets = clean_captions(source, texts, name, split)
        if not targets:
            source.skip(IMAGE_WITHOUT_TEXT, path, "it has no caption", split)
            continue
        source.notes["images of 'restval', put into 'train'"] += row["split"] == "restval"
        coco = row.get("cocoid")
        key = f"{coco:012d}" if isinstance(coco, int) else key_of[name]
        image_id = str(coco) if isinstance(coco, int) else key
        source.add(split, key, image_id, [Text(image_id, "caption", targets)], path)
    known = set(names)
    for path in source.images.names:
        if Path(path).name not in known:
            source.skip(IMAGE_WITHOUT_TEXT, path, "not in the list of images")
    return source
