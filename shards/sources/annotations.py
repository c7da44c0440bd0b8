"""Annotation files of known sets and tools, told apart by their keys -> rows of one form.

VizWiz (questions; captions), OK-VQA and VQA, A-OKVQA, TextVQA, COCO captions, the lists of LAVIS,
the conversations of LLaVA, {image: captions}. The keys are those of the official files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.files import ShardError
from shards.images import is_image_name
from shards.sources.rows import NAMES, listed
from shards.sources.source import (
    FURTHER_TURN,
    REJECTED_CAPTION,
    TEXT_WITHOUT_IMAGE,
    UNUSABLE_TEXT,
    Source,
    read_json,
    rows_of,
    unique,
)

_KNOWN = (
    "known are VizWiz, OK-VQA and VQA, A-OKVQA, TextVQA, COCO captions, LAVIS, LLaVA, a list of "
    "{image, caption} or {image, question, answers}, and {image: captions}; of other lists name "
    "the fields with --image-column and --caption-column"
)
_ASKING = ("human", "user")
_ANSWERING = ("gpt", "assistant")


@dataclass(frozen=True)
class Annotations:
    """A file of a form that is known: what it is called, the set and the split it says it is of."""

    form: str
    rows: list[tuple[str, Any]]  # where it stands, its fields
    dataset: str | None = None  # None: no known one
    split: str | None = None


def read_annotations(
    path: Path, questions: Path | None, are_named: bool, source: Source
) -> Annotations:
    """Reads a JSON file whatever its form. `questions`: the second file of sets that have two.
    `are_named`: options name the fields, so that any list will do.

    Raises ShardError, with the keys found, for a form that is not known or could be two.
    """
    where = f"--json {path}"
    document = read_json(path, "--json")
    if isinstance(document, list):
        found = _of_list(document, where, are_named)
    elif isinstance(document, dict):
        found = _of_mapping(document, where, questions, source)
    else:
        raise ShardError(f"{where} holds neither a list nor a mapping: {_KNOWN}")
    if questions and not found.form.endswith("VQA annotations"):
        raise ShardError(
            f"--questions {questions}: {where} is read as {found.form}, which have their questions "
            "in them; leave it out"
        )
    source.dataset = found.dataset or source.dataset
    source.notes[f"rows read as {found.form}"] = len(found.rows)
    return found


def form_of(fields: Any) -> str | None:
    """Returns what a list is called whose elements are like this one; None: not known. Raises
    ShardError where it could be two.
    """
    keys = set(fields) if isinstance(fields, Mapping) else set()
    lowered = {str(key).lower() for key in keys}
    asks = "question" in keys and keys & {"answer", "answers"}
    knows = asks and (
        "answerable" in keys or "answer_confidence" in repr(fields.get("answers"))[:200]
    )
    forms = {
        "LLaVA conversations": keys & {"conversations", "messages"},
        "A-OKVQA annotations": "question" in keys and keys & {"direct_answers", "choices"},
        "VizWiz questions": knows,
        "a list of questions (as LAVIS has it)": asks and not knows,
        "a list of captions (as LAVIS has it)": lowered & set(NAMES["caption"]) and not asks,
    }
    found = [form for form, is_it in forms.items() if is_it]
    if len(found) > 1:
        raise ShardError(
            f"with the keys {_shown(keys)} it could be {' or '.join(found)}: take out the keys of "
            "one of them, or name the fields with --image-column and --caption-column, or "
            "--question-column and --answer-column"
        )
    return found[0] if found else None


def _of_list(document: list[Any], where: str, are_named: bool) -> Annotations:
    first = document[0] if document else None
    try:
        form = "a list with the columns that were named" if are_named else form_of(first)
    except ShardError as error:
        raise ShardError(f"{where}: {error}") from error
    if not form:
        keys = f"a list of elements with the keys {_shown(first)}"
        raise ShardError(
            f"{where} is {keys if isinstance(first, dict) else 'no list of mappings'}: {_KNOWN}"
        )
    rows = [(f"element {n}", fields) for n, fields in enumerate(document)]
    datasets = {"A-OKVQA annotations": "aokvqa", "VizWiz questions": "vizwiz"}
    return Annotations(form, rows, datasets.get(form))


def _of_mapping(
    document: dict[str, Any], where: str, questions: Path | None, source: Source
) -> Annotations:
    lists = {name: rows for name, rows in document.items() if isinstance(rows, list)}
    samples = {name: rows[0] for name, rows in lists.items() if rows and isinstance(rows[0], dict)}
    annotation = samples.get("annotations", {})
    forms: dict[str, tuple[bool, Callable[[], Annotations]]] = {
        "TextVQA": ("question" in samples.get("data", ()), lambda: _textvqa(document, where)),
        "VQA annotations": (
            "answers" in annotation and "question_id" in annotation,
            lambda: _vqa(document, where, questions, source),
        ),
        "captions": (
            "caption" in annotation and "images" in samples,
            lambda: _coco(document, where, source),
        ),
        "a mapping": (
            bool(document) and all(map(is_image_name, document)),
            lambda: _mapping(document),
        ),
    }
    found = [read for is_it, read in forms.values() if is_it]
    if len(found) == 1:
        return found[0]()
    if "sentences" in samples.get("images", ()):
        raise ShardError(
            f"{where} is a file of Karpathy's splits: harness shards build karpathy --captions FILE"
        )
    if "question" in samples.get("questions", ()):
        raise ShardError(
            f"{where} holds questions without answers: give it with --questions, and the "
            "annotations with --json"
        )
    inside = "".join(f"; {name} has elements with {_shown(row)}" for name, row in samples.items())
    raise ShardError(f"{where} has the keys {_shown(document)}{inside}: {_KNOWN}")


def _shown(keys: Any) -> str:
    names = [str(key) for key in keys or ()]
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") or "none"


def _textvqa(document: dict[str, Any], where: str) -> Annotations:
    rows = rows_of(document, "data", ("question", "image_id"), where)
    for row in rows:
        row["split"] = row.get("set_name")
    return Annotations("TextVQA", [(f"data[{n}]", row) for n, row in enumerate(rows)], "textvqa")


def _vqa(
    document: dict[str, Any], where: str, questions: Path | None, source: Source
) -> Annotations:
    """The form of VQA and OK-VQA: the questions are in a second file."""
    rows = rows_of(document, "annotations", ("question_id", "image_id", "answers"), where)
    is_okvqa = "raw_answer" in repr(rows[0]["answers"])[:300]
    if questions is None:
        raise ShardError(
            f"{where} holds annotations without questions: give with --questions the file of "
            "OpenEnded_..._questions.json that belongs to it"
        )
    asked_rows = rows_of(
        read_json(questions, "--questions"),
        "questions",
        ("question_id", "question"),
        f"--questions {questions}",
    )
    unique((row["question_id"] for row in asked_rows), f"--questions {questions}: question_id")
    asked = {row["question_id"]: row["question"] for row in asked_rows}
    joined = [
        (f"question {row['question_id']}", row | {"question": asked.get(row["question_id"])})
        for row in rows
    ]
    unanswered = asked.keys() - {row["question_id"] for row in rows}
    if len(unanswered) == len(asked):
        raise ShardError(f"--questions {questions} has no question that {where} answers")
    for number in sorted(unanswered):
        source.skip(UNUSABLE_TEXT, f"question {number}", f"{where} does not answer it", texts=1)
    form = "OK-VQA annotations" if is_okvqa else "VQA annotations"
    split = str(document.get("data_subtype", "")).rstrip("0123456789")
    return Annotations(form, joined, "okvqa" if is_okvqa else "vqa", split or None)


def _coco(document: dict[str, Any], where: str, source: Source) -> Annotations:
    """COCO's form of captions, and VizWiz's, which says of some that they were rejected."""
    images = rows_of(document, "images", ("id", "file_name"), where)
    rows = rows_of(document, "annotations", ("image_id", "caption"), where)
    is_vizwiz = "is_rejected" in rows[0]
    name_of = {str(row["id"]): row["file_name"] for row in images}
    kept = []
    for n, row in enumerate(rows):
        name = name_of.get(str(row["image_id"]))
        # As VizWiz's own evaluation does: ignore_rejected, ignore_precanned.
        reasons = [why for why in ("rejected", "precanned") if row.get(f"is_{why}")]
        if name is None:
            why = f"annotations[{n}]: its image_id is not in the list of images"
            source.skip(TEXT_WITHOUT_IMAGE, str(row["image_id"]), why, texts=1)
        elif reasons:
            source.skip(REJECTED_CAPTION, name, f"VizWiz says: {' and '.join(reasons)}", texts=1)
        else:
            kept.append((f"annotations[{n}]", {"image": name, "caption": row["caption"]}))
    form = "VizWiz captions" if is_vizwiz else "COCO captions"
    return Annotations(form, kept, "vizwiz" if is_vizwiz else "coco_captions")


def _mapping(document: dict[str, Any]) -> Annotations:
    rows = [(name, {"image": name, "captions": found}) for name, found in document.items()]
    return Annotations("a mapping of images to captions", rows)


# Rows


def plain_fields(fields: Any, where: str, source: Source, text_only: bool = False) -> Iterator[Any]:
    """Yields the fields as a row has them: of a conversation its first turn, of A-OKVQA the direct
    answers; what is left out of it is named. Other fields stay as they are. `text_only`: a
    conversation may have no image.
    """
    if not isinstance(fields, dict):
        yield fields
    elif turns := fields.get("conversations") or fields.get("messages"):
        yield from _first_turn(fields, turns, where, source, text_only)
    elif "question" in fields and {"direct_answers", "choices"} & fields.keys():
        yield _aokvqa(fields)
    else:
        yield fields


def _aokvqa(fields: dict[str, Any]) -> dict[str, Any]:
    """The direct answers are the targets, the right choice where there are none."""
    choices = fields.get("choices")
    at = fields.get("correct_choice_idx")
    correct = None
    if isinstance(choices, list) and isinstance(at, int) and 0 <= at < len(choices):
        correct = choices[at]
    answers = fields.get("direct_answers") or ([] if correct is None else [correct])
    names = ("image", "image_id", "question", "question_id", "split", "choices")
    kept = {name: fields[name] for name in names if name in fields}
    return kept | {"answers": answers, "correct_choice": correct}


def _first_turn(
    fields: dict[str, Any], turns: Any, where: str, source: Source, text_only: bool
) -> Iterator[dict[str, Any]]:
    images = listed(fields.get("image", fields.get("images")))
    images = [image for image in images if image not in (None, "")]
    said = [
        (turn.get("from", turn.get("role")), turn.get("value", turn.get("content")))
        for turn in listed(turns)
        if isinstance(turn, dict)
    ]
    said = [(who, text) for who, text in said if who != "system"]
    speakers = [who for who, _ in said[:2]]
    if not images and not text_only:
        why = "the conversation has no image (--text-only keeps it as a record without a picture)"
        source.skip(TEXT_WITHOUT_IMAGE, where, why, texts=1)
    elif len(images) > 1:
        why = f"the conversation is about {len(images)} images: a record has one"
        source.skip(UNUSABLE_TEXT, where, why, texts=1)
    elif len(said) < 2 or speakers[0] not in _ASKING or speakers[1] not in _ANSWERING:
        why = f"the conversation begins with {speakers}: expected human, gpt"
        source.skip(UNUSABLE_TEXT, where, why, texts=1)
    else:
        asked, answer = said[0][1], said[1][1]
        if further := sum(who in _ASKING for who, _ in said[2:]):
            why = "a record holds the first turn of a conversation"
            source.skip(FURTHER_TURN, where, why, fields.get("split"), further)
        prompt = asked.replace("<image>", "").strip() if isinstance(asked, str) else asked
        kept = {"image": next(iter(images), None), "split": fields.get("split")}
        text = {"question": prompt, "answers": [answer]} if prompt else {"caption": answer}
        yield kept | text
