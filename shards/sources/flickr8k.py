"""Flickr8k: official `Flickr8k.token.txt` (or the `captions.txt` CSV) and split files -> one record
an image.

A record has one caption text, whose targets are the image's captions in the order of the file.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Annotated

from shards.files import ShardError
from shards.sources.source import (
    NO_SPLIT,
    TEXT_WITHOUT_IMAGE,
    Images,
    ImagesAt,
    Source,
    keys_of,
    read_text,
    unique,
)

_TOKEN_LINE = re.compile(r"(.+)#(\d+)\t(.*)")
_SPLIT_FILE = re.compile(r"(?:.*[._\-])?(train|dev|val|test)Images\.txt")


def load(
    images: ImagesAt,
    captions: Annotated[Path, "Flickr8k.token.txt or captions.txt."],
    splits: Annotated[Path | None, "Folder of Flickr_8k.trainImages.txt and the others."] = None,
) -> Source:
    """Reads the official files; `images` is the folder or the official zip, `splits` the folder of
    `Flickr_8k.trainImages.txt` and the others.

    Without `splits` everything goes to `train`. ShardError for a file that is missing or of another
    format, a caption number that occurs twice, an image that is in two splits.
    """
    captions_of = _read_captions(captions)
    split_of = _read_splits(splits) if splits else {}
    source = Source("flickr8k", Images(images))
    key_of = keys_of(captions_of)
    for name, texts in captions_of.items():
        split = split_of.get(name) if splits else "train"
        if split:
            source.add_captions(name, texts, split, key_of[name])
        elif source.find(name, None, len(texts)):
            source.skip(NO_SPLIT, name, "no file of --splits names it", texts=len(texts))
    if not splits:
        source.notes["images put into 'train', since no --splits was given"] = len(
            source.splits.get("train", ())
        )
    source.skip_rest("no caption names it")
    for name, split in split_of.items():
        if name not in captions_of and source.files.find(name) is None:
            source.skip(
                TEXT_WITHOUT_IMAGE,
                name,
                "named by the split file alone: no image and no caption",
                split,
            )
    return source


def _read_captions(path: str | Path) -> dict[str, list[str]]:
    text = read_text(path, "--captions")
    first = text.split("\n", 1)[0].strip()
    captions: dict[str, list[str]] = {}
    if first.lower().replace(" ", "") == "image,caption":
        rows = csv.reader(io.StringIO(text), strict=True)
        try:
            next(rows)
            for row in rows:
                if row and len(row) != 2:
                    raise ShardError(
                        f"--captions {path}, line {rows.line_num}: {len(row)} columns, not "
                        "image,caption"
                    )
                if row:
                    captions.setdefault(row[0].strip(), []).append(row[1])
        except csv.Error as error:
            raise ShardError(f"--captions {path}, line {rows.line_num}: {error}") from error
        return captions
    numbers = []
    for n, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        match = _TOKEN_LINE.fullmatch(line.rstrip("\r"))
        if not match:
            raise ShardError(
                f"--captions {path}, line {n} is {line[:60]!r}: expected "
                "'NAME.jpg#NUMBER<tab>CAPTION' (Flickr8k.token.txt), "
                "or a first line 'image,caption' (captions.txt)"
            )
        numbers.append(f"{match[1]}#{match[2]}")
        captions.setdefault(match[1], []).append(match[3])
    unique(numbers, f"--captions {path}: the caption")
    if not captions:
        raise ShardError(f"--captions {path} holds no caption")
    return captions


def _read_splits(folder: str | Path) -> dict[str, str]:
    if not Path(folder).is_dir():
        raise ShardError(
            f"--splits {folder} is no folder: it should hold Flickr_8k.trainImages.txt and the like"
        )
    split_of: dict[str, str] = {}
    for path in sorted(Path(folder).iterdir()):
        match = _SPLIT_FILE.fullmatch(path.name)
        if not match:
            continue
        for name in read_text(path, "--splits").split():
            if split_of.setdefault(name, match[1]) != match[1]:
                raise ShardError(
                    f"--splits {folder}: {name} is in the split {split_of[name]} and in {match[1]}"
                )
    if not split_of:
        raise ShardError(
            f"--splits {folder} holds no split file "
            "(Flickr_8k.trainImages.txt, .devImages.txt, ...)"
        )
    return split_of
