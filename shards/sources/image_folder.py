"""Your own data: a folder (or zip) of images and their texts -> one record an image.

The texts stand in a JSONL, a CSV, a JSON of a known set, the metadata files of Hugging Face, or in
NAME.txt beside NAME.jpg. A line of JSONL: {"image": "cats/1.jpg", "caption": "a cat"} or
"captions": [...] or "question": "...", "answers": [...], optionally "id" (unique) and "split"
(default train). Several rows may name the same image. With --text-only a row may name none: it is
a record of its own, without a picture.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from shards.files import ShardError
from shards.images import is_image_name
from shards.record import RecordError, Text
from shards.sources.annotations import plain_fields, read_annotations
from shards.sources.readers import Fields, Reader
from shards.sources.rows import Columns, Row
from shards.sources.source import (
    IMAGE_WITHOUT_TEXT,
    UNUSABLE_TEXT,
    Images,
    Item,
    Source,
    keys_of,
    order_of,
)

_DATASET = "image_folder"
_PATTERN = re.compile(r"[^{}]*\{id(?::0?\d*d)?\}[^{}]*")
ALONE = "records without a picture, of rows that name no image"
_FILES = ("--jsonl", "--csv", "--json", "--metadata")


def load(
    images: Annotated[
        Path | None,
        "Folder or zip of images. Of files that give ids alone: DIR/COCO_{id:012d}.jpg.",
    ] = None,
    jsonl: Annotated[Path | None, "A text a line: image, caption or question, answers."] = None,
    csv: Annotated[Path | None, "A table, whose first line names its columns."] = None,
    json: Annotated[Path | None, "VizWiz, (A-)OK-VQA, TextVQA, COCO, LAVIS, LLaVA."] = None,
    questions: Annotated[Path | None, "With --json, where the questions are a second file."] = None,
    metadata: Annotated[bool, "Read metadata.csv or metadata.jsonl in --images."] = False,
    image_column: Annotated[str | None, "Without: image, file_name ..."] = None,
    caption_column: Annotated[str | None, "Without: caption, text ..."] = None,
    question_column: Annotated[str | None, "Without: question."] = None,
    answer_column: Annotated[str | None, "Without: answer, answers."] = None,
    split_column: Annotated[str | None, "Without: split."] = None,
    separator: Annotated[str | None, "Of --csv. Without: by its first line."] = None,
    encoding: Annotated[str | None, "Such as cp1252. Without: UTF-8."] = None,
    split: Annotated[str | None, "Its name. Without: as the file says, or train."] = None,
    dev_share: Annotated[float, "Of the images, drawn for dev: 0.1."] = 0.0,
    test_share: Annotated[float, "Of the images, drawn for test: 0.1."] = 0.0,
    seed: Annotated[int, "Of that draw."] = 0,
    text_only: Annotated[bool, "Keep rows that name no image; needs no --images."] = False,
) -> Source:
    """Reads the texts from the one file that is given, or without one from NAME.txt beside each
    image. A row that is not of its form is left out and named.

    ShardError for a file of no known form, an id given twice, an image in two splits.
    """
    columns = Columns(image_column, caption_column, question_column, answer_column, split_column)
    files = {"--jsonl": jsonl, "--csv": csv, "--json": json, "--metadata": metadata}
    given = {flag: value for flag, value in files.items() if value}
    _check_files(list(given), columns, separator, questions, encoding)
    _check_shares(dev_share, test_share)
    columns = replace(columns, text_only=text_only)
    pattern = _pattern_of(images) if images else None
    source = _source_at(images, pattern is not None, text_only, bool(given))
    if json:
        annotations = read_annotations(json, questions, columns.are_given, source)
        split = split or annotations.split
        found: Iterable[Fields] = annotations.rows
    else:
        found = Reader(source, columns, separator, encoding).read(jsonl, csv, metadata)
    what = " ".join(f"{flag} {value}" for flag, value in given.items()) or f"{images}"
    rows = _rows(source, columns, found, has_ids=jsonl is not None)
    _add_records(source, _by_image(source, rows, pattern, split, what))
    source.check_text_ids(f"{what}: the id (given, or made from an image's name)")
    source.skip_rest("no row names it" if given else "it has no NAME.txt beside it")
    if dev_share or test_share:
        _divide(source, {"dev": dev_share, "test": test_share}, seed)
    return source


def _source_at(images: Path | None, is_pattern: bool, text_only: bool, is_told: bool) -> Source:
    """Returns a source of these images, without a text yet. `is_pattern`: their place ends in one
    of names; `is_told`: a file says which text belongs to which. Raises ShardError.
    """
    if text_only and not is_told:
        raise ShardError(f"--text-only goes with {' or '.join(_FILES)}, which is not given")
    if images is None and not text_only:
        raise ShardError("image-folder needs --images, or --text-only for texts alone")
    return Source(_DATASET, Images(images.parent if images and is_pattern else images))


def _check_files(
    given: list[str],
    columns: Columns,
    separator: str | None,
    questions: Path | None,
    encoding: str | None,
) -> None:
    """Raises ShardError for options that do not go together."""
    if len(given) > 1:
        raise ShardError(f"{given[0]} and {given[1]} both say where the texts are: give one")
    for flag, value, those in (
        ("--...-column", columns != Columns(), _FILES),
        ("--separator", separator, ("--csv", "--metadata")),
        ("--questions", questions, ("--json",)),
    ):
        if value and not set(given) & set(those):
            raise ShardError(f"{flag} goes with {' or '.join(those)}, which is not given")
    if encoding and given == ["--json"]:
        raise ShardError("--encoding does not go with --json, which is UTF-8: save it as that")


def _check_shares(*shares: float) -> None:
    if min(shares) < 0 or sum(shares) >= 1:
        raise ShardError(
            f"--dev-share and --test-share are {shares[0]:g} and {shares[1]:g}: they are shares of "
            "the images, 0 or more, which leave some for training"
        )


def _pattern_of(images: str | Path) -> str | None:
    """Returns the pattern of names that ends the place of the images, if one does."""
    name = Path(images).name
    if "{" not in name:
        return None
    if not _PATTERN.fullmatch(name):
        raise ShardError(
            f"--images {images}: a pattern of names is one such as {{id:012d}}.jpg or x_{{id}}.png"
        )
    return name


def _rows(
    source: Source, columns: Columns, found: Iterable[Fields], has_ids: bool
) -> Iterator[Row]:
    """Yields rows; what is not of their form is left out and named."""
    is_own = source.dataset == _DATASET
    for where, fields in found:
        try:
            plain: Iterable[Any] = [fields]
            if not columns.are_given:
                plain = plain_fields(fields, where, source, columns.text_only)
            for row_fields in plain:
                yield columns.row(row_fields, where, has_ids)
                if is_own:  # of known sets we know what the other fields are
                    unused = columns.unused(row_fields)
                    source.notes.update(f"field '{name}' ignored" for name in unused)
        except RecordError as error:
            source.skip(UNUSABLE_TEXT, where, str(error), texts=1)


def _by_image(
    source: Source, rows: Iterable[Row], pattern: str | None, split: str | None, what: str
) -> dict[str, list[Row]]:
    """Returns the rows of each image, by its path, or by its name where it is not there; a row
    without an image alone, by a name of its own. Every row has its split. Raises ShardError for an
    image in two splits and for an id that comes again.

    `split`: that of rows which do not say theirs.
    """
    rows_of: dict[str, list[Row]] = defaultdict(list)
    where_of: dict[str, str] = {}
    alone = 0
    for row in rows:
        row.split = row.split or split or "train"
        if row.image is None:
            path = f"text-{alone:06d}"
            alone += 1
        else:
            path = _find(source, row.image, pattern)
        rows_of[path].append(row)
        first = rows_of[path][0]
        if first.split != row.split:
            raise ShardError(
                f"{what}, {row.where}: {path} is in the split {row.split!r}, "
                f"and in {first.split!r} in {first.where}"
            )
        if row.id is not None and (other := where_of.setdefault(row.id, row.where)) != row.where:
            raise ShardError(f"{what}, {row.where}: the id {row.id!r} occurs in {other} already")
    return rows_of


def _find(source: Source, image: str | int, pattern: str | None) -> str:
    """Returns the path of an image, or else its name without what is odd in it."""
    files = source.files
    name = str(image)
    if "://" in name:
        return name
    if pattern and not is_image_name(name):
        is_number = name.strip().isdecimal()
        if ":" in pattern and not is_number:
            return name
        name = pattern.format(id=int(name) if is_number else name)
        return files.find(name) or name
    if not is_image_name(name):
        return files.find_id(name) or name
    # Official files name images without their folder, and no two alike.
    return files.find(name, exact=source.dataset == _DATASET) or posixpath.normpath(name)


def _add_records(source: Source, rows_of: dict[str, list[Row]]) -> None:
    key_of = keys_of(rows_of)
    for path, rows in rows_of.items():
        key = key_of[path]
        split = rows[0].split or "train"
        if rows[0].image is None:
            if texts := _texts(source, rows[0].where, key, rows):  # else each is named already
                source.add(split, key, key, texts, None)
                source.notes[ALONE] += 1
        elif source.find(path, split, sum(row.texts for row in rows), exact=True):
            if texts := _texts(source, path, key, rows):
                source.add(split, key, key, texts, path)
            else:
                source.skip(IMAGE_WITHOUT_TEXT, path, "all its texts are empty", split)


def _texts(source: Source, path: str, key: str, rows: list[Row]) -> list[Text]:
    """Returns all texts of an image. Captions without an id are one text (the key is its id); a
    question without an id is called KEY-NUMBER.
    """
    texts: list[Text] = []
    captions: list[str] = []
    questions = 0
    for row in rows:
        if row.captions is not None:
            found = source.clean(row.captions, path, row.split)
            if row.id is None or row.answers is not None:
                captions.extend(found)
            elif found:
                texts.append(Text(row.id, "caption", found))
        if row.answers is not None:
            text_id = row.id or f"{key}-{questions}"
            questions += 1
            if source.takes(row.question, row.answers, f"{path}, {row.where}", row.split):
                texts.append(Text(text_id, "vqa", tuple(row.answers), row.question, row.meta))
    return ([Text(key, "caption", tuple(captions))] if captions else []) + texts


def _divide(source: Source, shares: dict[str, float], seed: int) -> None:
    """Moves shares of the images into splits of their own, drawn by a hash of their names; images
    of equal bytes stay together. Raises ShardError for images that are in several splits already.
    """
    if len(source.splits) > 1:
        raise ShardError(
            f"the images have splits of their own ({', '.join(source.splits)}): leave out "
            "--dev-share and --test-share, or name another --split-column"
        )
    for split, items in [*source.splits.items()]:  # one, or none where nothing was found
        groups = sorted(
            _alike(source, items).values(), key=lambda group: order_of(seed, group[0].name)
        )
        source.notes["images equal to another one, kept in its split"] = len(items) - len(groups)
        split_of: dict[str, str] = {}
        for name, share in shares.items():
            wanted = len(split_of) + round(share * len(items))
            while groups and len(split_of) < wanted:
                split_of.update((item.name, name) for item in groups.pop())
        asked = [split, *(name for name, share in shares.items() if share)]
        source.splits = {name: [] for name in asked}
        for item in items:
            name = split_of.get(item.name, split)
            record = replace(item.record, split=name)
            source.splits[name].append(replace(item, record=record))
        if empty := [name for name in asked if not source.splits[name]]:
            raise ShardError(
                f"{len(items)} images are too few for the shares "
                f"{shares['dev']:g} and {shares['test']:g}: none is left for {empty[0]}"
            )


def _alike(source: Source, items: list[Item]) -> dict[str, list[Item]]:
    """Returns the images in groups of equal bytes; only files of one size are read."""
    files = source.files
    size_of = {item.image: files.size(item.image) for item in items if item.image is not None}
    sizes = Counter(size_of.values())
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        name = item.name
        if item.image is not None and sizes[size_of[item.image]] > 1:
            name = hashlib.sha256(files.read(item.image)).hexdigest()
        groups[name].append(item)
    return groups
