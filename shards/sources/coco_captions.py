"""COCO captions: official `captions_train2014.json` and the like -> one record an image with all
its captions.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

from shards.files import ShardError
from shards.sources.source import (
    TEXT_WITHOUT_IMAGE,
    Images,
    ImagesAt,
    Source,
    read_json,
    rows_of,
    unique,
)


def load(
    images: ImagesAt,
    captions: Annotated[Path, "captions_train2014.json and the like."],
    split: Annotated[str, "train or val."],
) -> Source:
    """Reads the official files; `split` names what the file holds (train, val). ShardError for
    another format and for duplicate ids.
    """
    where = f"--captions {captions}"
    document = read_json(captions, "--captions")
    files = rows_of(document, "images", ("id", "file_name"), where)
    rows = rows_of(document, "annotations", ("id", "image_id", "caption"), where)
    if not all(type(row["id"]) is int for row in files):  # to isinstance a bool is one too
        raise ShardError(f"{where}: an image's id must be a whole number")
    unique((row["id"] for row in files), f"{where}: the image id")
    unique((row["id"] for row in rows), f"{where}: the caption id")
    captions_of: dict[int, list[Any]] = defaultdict(list)
    for row in rows:
        if type(row["image_id"]) is not int:
            raise ShardError(f"{where}: caption {row['id']} must have a whole number as image_id")
        captions_of[row["image_id"]].append(row["caption"])

    source = Source("coco_captions", Images(images))
    for row in files:
        name = Path(str(row["file_name"])).name
        texts = captions_of.pop(row["id"], [])
        source.add_captions(name, texts, split, f"{row['id']:012d}", str(row["id"]))
    for image_id, texts in captions_of.items():
        source.skip(
            TEXT_WITHOUT_IMAGE,
            str(image_id),
            "its image_id is not in the list of images",
            split,
            len(texts),
        )
    # Beside train2014 may lie val2014: the images of another split's folder are not this one's
    # dirt.
    folders = {Path(item.name).parent for item in source.splits.get(split, ())}
    source.skip_rest(
        "not in the list of images", split, among=lambda path: Path(path).parent in folders
    )
    return source
