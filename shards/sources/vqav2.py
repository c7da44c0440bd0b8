"""VQAv2: official questions, annotations and image folders -> one record an image with all its
questions.

Answers stay as they are given, ten in order; those of the official test splits are withheld, and
their questions alone are taken. `limit` draws images; `pair_id` names the complementary question.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

from shards.files import ShardError
from shards.record import Text
from shards.sources.source import (
    IMAGE_WITHOUT_TEXT,
    Images,
    ImagesAt,
    Source,
    check_limit,
    order_of,
    read_json,
    rows_of,
    unique,
)

WITHHELD = ("test", "test-dev")  # the official splits without annotations


def load(
    images: ImagesAt,
    questions: Annotated[Path, "v2_OpenEnded_..._questions.json"],
    split: Annotated[str, "train, val, test or test-dev."],
    annotations: Annotated[Path | None, "v2_..._annotations.json; test has none."] = None,
    pairs: Annotated[Path | None, "v2_..._complementary_pairs.json"] = None,
    limit: Annotated[int | None, "Draw this many images; pairs stay together."] = None,
    seed: Annotated[int, "Of the draw."] = 0,
) -> Source:
    """Reads the official files; `pairs` is the official list of [question id, question id] of
    complementary pairs. Without `annotations` the questions of test or test-dev become records
    without answers, which a model can only answer.

    `limit` images are drawn by a hash of (`seed`, image id) among those on disk. ShardError for a
    question without annotation, an annotation without question, duplicate question ids, files of
    another split.
    """
    _check_given(annotations, split)
    check_limit(limit)
    asked, year = _read_questions(questions, split)
    answered = _read_annotations(annotations, asked, questions) if annotations else None
    joined = _read_pairs(pairs) if pairs else []
    partner = {a: b for pair in joined for a, b in (pair, pair[::-1])}

    source = Source("vqav2", Images(images))
    pictures = f"COCO_{'test' if split in WITHHELD else split}"  # test-dev is a part of test
    of_image = _by_image(asked)
    found: dict[int, str] = {}
    for image_id, rows in of_image.items():
        if path := source.find(f"{pictures}{year}_{image_id:012d}.jpg", split, len(rows)):
            found[image_id] = path
    drawn = _drawn(source, set(found), asked, joined, limit, seed)
    for image_id, path in found.items():
        if image_id not in drawn:
            continue
        made = (
            _text(source, q, answered and answered[q["question_id"]], partner, asked, split)
            for q in of_image[image_id]
        )
        if texts := [text for text in made if text]:
            source.add(split, f"{image_id:012d}", str(image_id), texts, path)
        else:
            why = "none of its questions has a text and an answer"
            source.skip(IMAGE_WITHOUT_TEXT, path, why, split)
    # One folder may hold train2014 and val2014: the other split's images are not this one's dirt.
    why = "no question asks about it"
    source.skip_rest(why, split, lambda path: Path(path).name.startswith(pictures))
    return source


def _check_given(annotations: Path | None, split: str) -> None:
    if annotations is None and split not in WITHHELD:
        known = " and ".join(WITHHELD)
        raise ShardError(
            f"vqav2 --split {split} needs --annotations: only those of {known} are withheld"
        )


def _by_image(asked: dict[int, dict]) -> dict[int, list[dict]]:
    of_image: dict[int, list[dict]] = defaultdict(list)
    for question in asked.values():
        of_image[question["image_id"]].append(question)
    return of_image


def _text(
    source: Source,
    question: dict,
    annotation: dict | None,
    partner: dict,
    asked: dict,
    split: str,
) -> Text | None:
    number = question["question_id"]
    answers = tuple(annotation["answers"]) if annotation else ()
    prompt = question["question"]
    if not source.takes(prompt, answers if annotation else None, str(number), split):
        return None
    if annotation:
        source.notes["questions with other than ten answers, kept"] += len(answers) != 10
    else:
        source.notes["questions without answers, which can only be predicted"] += 1
    other = partner.get(number)
    source.notes["questions whose complementary question is not in --questions"] += (
        bool(other) and other not in asked
    )
    meta = {
        **{name: (annotation or {}).get(name) for name in ("answer_type", "question_type")},
        "pair_id": str(other) if other in asked else None,
    }
    return Text(str(number), "vqa", answers, prompt, meta)


def _read_questions(path: str | Path, split: str) -> tuple[dict[int, dict], str]:
    where = f"--questions {path}"
    document = read_json(path, "--questions")
    rows = rows_of(document, "questions", ("question_id", "image_id", "question"), where)
    subtype = str(document.get("data_subtype", f"{split}2014"))
    if not subtype.startswith(split) or not subtype[len(split) :].isdigit():
        raise ShardError(f"{where} are of {subtype}, but --split is {split}")
    for row in rows:
        for name in ("question_id", "image_id"):
            if type(row[name]) is not int:  # to isinstance a bool is one too
                raise ShardError(f"{where}: {name} {row[name]!r} is not a whole number")
    unique((row["question_id"] for row in rows), f"{where}: question_id")
    return {row["question_id"]: row for row in rows}, subtype[len(split) :]


def _answer(row: dict) -> Any:
    """Keeps ten million answers of the full set as shared strings in place of dictionaries: a fifth
    of the memory.
    """
    return (
        sys.intern(row["answer"])
        if "answer_id" in row and isinstance(row.get("answer"), str)
        else row
    )


def _read_annotations(
    path: str | Path, asked: dict[int, dict], questions: str | Path
) -> dict[int, dict]:
    where = f"--annotations {path}"
    document = read_json(path, "--annotations", _answer)
    rows = rows_of(document, "annotations", ("question_id", "image_id", "answers"), where)
    unique((row["question_id"] for row in rows), f"{where}: question_id")
    answered = {row["question_id"]: row for row in rows}
    for ids, what, missing in (
        (asked.keys() - answered.keys(), "question", f"no annotation in --annotations {path}"),
        (answered.keys() - asked.keys(), "annotation", f"no question in --questions {questions}"),
    ):
        if ids:
            raise ShardError(
                f"{what} {min(ids)} has {missing} ({len(ids)} such); both files must be of the "
                "same split"
            )
    for number, row in answered.items():
        if row["image_id"] != asked[number]["image_id"]:
            raise ShardError(
                f"question {number} is about image {asked[number]['image_id']} in --questions "
                f"{questions} and about image {row['image_id']} in --annotations {path}"
            )
        if not isinstance(row["answers"], list):
            raise ShardError(f"{where}: the answers of question {number} are no list")
    return answered


def _read_pairs(path: str | Path) -> list[tuple[int, int]]:
    rows = read_json(path, "--pairs")
    for n, row in enumerate(rows if isinstance(rows, list) else [None]):
        if not (isinstance(row, list) and len(row) == 2 and all(isinstance(q, int) for q in row)):
            raise ShardError(
                f"--pairs {path}: element {n} is not [question id, question id], as in the "
                "official file"
            )
    unique((q for row in rows for q in row), f"--pairs {path}: the question")
    return [(a, b) for a, b in rows]


def _drawn(
    source: Source,
    found: set[int],
    asked: dict[int, dict],
    joined: list[tuple[int, int]],
    limit: int | None,
    seed: int,
) -> set[int]:
    """Returns the images that --limit leaves, with notes of what it did not take."""
    if limit is None or limit >= len(found):
        return found
    pairs = [
        (asked[a]["image_id"], asked[b]["image_id"]) for a, b in joined if a in asked and b in asked
    ]
    drawn = _draw(found, pairs, limit, seed)
    source.notes["images not drawn by --limit"] = len(found) - len(drawn)
    cut = sum((a in drawn) != (b in drawn) for a, b in pairs)
    source.notes[
        "complementary pairs cut by --limit, their images being too many to stay together"
    ] = cut
    return drawn


def _draw(images: set[int], pairs: list[tuple[int, int]], limit: int, seed: int) -> set[int]:
    """Draws at most `limit` images in the order of a hash; what complementary pairs join comes
    along whole or not at all.

    In the full set nearly all images hang together, so a group larger than what is left is not
    taken whole: there an image brings the partners of its own questions, or is passed over.
    """
    joined: dict[int, set[int]] = {image: set() for image in images}
    for a, b in pairs:
        if a in joined and b in joined and a != b:
            joined[a].add(b)
            joined[b].add(a)
    group_of = _groups(joined)
    drawn: set[int] = set()
    for image in sorted(images, key=lambda image: order_of(seed, image)):
        if image in drawn:
            continue
        group = group_of[image]
        if len(group) > limit - len(drawn):
            group = ({image} | joined[image]) - drawn
        if len(group) <= limit - len(drawn):
            drawn |= group
        if len(drawn) == limit:
            break
    if not drawn:
        raise ShardError(
            f"--limit {limit} is too small: every image is joined to others by complementary pairs"
        )
    return drawn


def _groups(joined: dict[int, set[int]]) -> dict[int, set[int]]:
    group_of: dict[int, set[int]] = {}
    for image in joined:
        if image in group_of:
            continue
        group, edge = {image}, [image]
        while edge:
            new = joined[edge.pop()] - group
            group |= new
            edge.extend(new)
        group_of.update(dict.fromkeys(group, group))
    return group_of
