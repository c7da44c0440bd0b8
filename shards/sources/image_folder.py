"""Your own data: a folder (or zip) of images and a JSONL of texts -> one record an image with all
its texts.

A line: {"image": "cats/1.jpg", "text": "a cat"} or "captions": [...] or "question": "...",
"answers": [...], optionally "id" (unique) and "split" (default train). Several lines may name the
same image.
"""

from __future__ import annotations

import posixpath
from pathlib import Path
from typing import Annotated, Any

from shards.files import ShardError, decode, other_encoding
from shards.record import RecordError, Text, parse_json
from shards.sources.source import (
    IMAGE_WITHOUT_TEXT,
    UNUSABLE_TEXT,
    Images,
    ImagesAt,
    Source,
    keys_of,
    read_bytes,
)

_FIELDS = ("image", "text", "captions", "question", "answers", "id", "split")


def load(
    images: ImagesAt,
    jsonl: Annotated[Path, "A text a line: image, and caption, or question and answers."],
) -> Source:
    """Reads the lines, in which paths of images are relative to `images`. A line that is not of
    the form above is left out and named. ShardError, naming the line, for an id given twice and an
    image in two splits.
    """
    source = Source("image_folder", Images(images))
    lines_of: dict[str, list[tuple[int, dict[str, Any]]]] = {}  # (number, line) by image
    ids: dict[str, int] = {}
    data = read_bytes(jsonl, "--jsonl")
    if other_encoding(data):  # else each line would be left out, and named
        decode(data, f"--jsonl {jsonl}")
    for n, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        where = f"--jsonl {jsonl}, line {n}"
        try:
            row = _read_line(line)
        except RecordError as error:
            source.skip(UNUSABLE_TEXT, f"line {n}", str(error), texts=1)
            continue
        path = source.files.find(row["image"], exact=True) or posixpath.normpath(row["image"])
        split = row["split"]
        lines_of.setdefault(path, []).append((n, row))
        first, other = lines_of[path][0]
        if other["split"] != split:
            raise ShardError(
                f"{where}: {path} is in the split {split!r}, "
                f"and in {other['split']!r} in line {first}"
            )
        if "id" in row and ids.setdefault(str(row["id"]), n) != n:
            raise ShardError(
                f"{where}: the id {row['id']!r} occurs in line {ids[str(row['id'])]} already"
            )
        source.notes.update(f"field '{name}' ignored" for name in row if name not in _FIELDS)
    key_of = keys_of(lines_of)
    for path, lines in lines_of.items():
        key, split = key_of[path], lines[0][1]["split"]
        if source.find(path, split, len(lines), exact=True):
            if found := _texts(source, path, key, lines):
                source.add(split, key, key, found, path)
            else:
                source.skip(IMAGE_WITHOUT_TEXT, path, "all its texts are empty", split)
    source.check_text_ids(f"--jsonl {jsonl}: the id (given, or made from an image's name)")
    source.skip_rest("no line names it")
    return source


def _texts(
    source: Source, path: str, key: str, lines: list[tuple[int, dict[str, Any]]]
) -> list[Text]:
    """Returns all texts of an image. Captions without an id are one text (the key is its id); a
    question without an id is called KEY-NUMBER.
    """
    texts: list[Text] = []
    captions: list[str] = []
    questions = 0
    for n, row in lines:
        given = str(row.get("id", "")) or None
        if "question" not in row:
            many = _listed(row["captions" if "captions" in row else "text"])
            found = source.clean(many, path, row["split"])
            if given is None:
                captions.extend(found)
            elif found:
                texts.append(Text(given, "caption", found))
            continue
        answers = tuple(_listed(row["answers"]))
        text_id = given or f"{key}-{questions}"
        questions += 1
        if source.takes(row["question"], answers, f"{path}, line {n}", row["split"]):
            texts.append(Text(text_id, "vqa", answers, row["question"]))
    return ([Text(key, "caption", tuple(captions))] if captions else []) + texts


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _read_line(line: bytes) -> dict[str, Any]:
    """Returns its fields. Raises RecordError where it is not of the form above; whether the texts
    are texts is for the source to see.
    """
    row = parse_json(line)
    if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not row["image"]:
        raise RecordError("it has no field 'image' with the path of an image")
    row.setdefault("split", "train")
    if not isinstance(row["split"], str) or not isinstance(row.get("id", ""), str | int):
        raise RecordError("'split' must be a text, 'id' a text or a whole number")
    kinds = [name for name in ("text", "captions", "question") if name in row]
    if len(kinds) != 1 or ("answers" in row) != (kinds == ["question"]):
        raise RecordError(
            "it needs exactly one of 'text', 'captions', or 'question' with 'answers'; "
            f"found {', '.join(row)}"
        )
    return row
