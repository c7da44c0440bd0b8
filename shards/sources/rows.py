"""What a row of a table or a list says of one image, whatever its columns are called.

{column: value} of a line of CSV or JSONL, or of an element of a JSON list -> Row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shards.files import ShardError
from shards.record import RecordError

# What columns are called that are not named by an option. COCO's `image_id` is a number that a
# pattern of names needs: it stands for an image where no column of its name does.
_IMAGE_NAMES = "image image_name image_path image_file file_name filename file path filepath img"
NAMES = {
    "image": _IMAGE_NAMES.split(),
    "caption": ["caption", "captions", "text", "comment", "description"],
    "question": ["question"],
    "answer": ["answer", "answers"],
    "split": ["split"],
}
# What is known of a question beside its answers: kept, since scores are told by it.
META = ("answer_type", "question_type", "answerable", "choices", "correct_choice")
_IDS = ("id", "question_id", "image_id")


@dataclass(slots=True)
class Row:
    """One row: an image, by its path or its number (None: it has none), with captions, or a
    question and answers.
    """

    where: str
    image: str | int | None
    captions: list[Any] | None = None
    question: Any = None
    answers: list[Any] | None = None  # of a question
    id: str | None = None
    split: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def texts(self) -> int:
        """How many texts go with its image."""
        return len(self.captions or ()) + (self.answers is not None)


@dataclass(frozen=True)
class Columns:
    """The columns that options name (None: told by its name), and whether a row may name no
    image.
    """

    image: str | None = None
    caption: str | None = None
    question: str | None = None
    answer: str | None = None
    split: str | None = None
    text_only: bool = False

    @property
    def are_given(self) -> bool:
        return any((self.image, self.caption, self.question, self.answer))

    def of(self, role: str, names: Iterable[str]) -> str | None:
        """Returns which of `names` has this role. Raises RecordError where two could have it."""
        if given := getattr(self, role):
            return given if given in names else None
        found = [name for name in names if name.lower() in NAMES[role]]
        if len(found) > 1:
            raise RecordError(
                f"it needs exactly one of its columns {' and '.join(map(repr, found))} as {role}: "
                f"name it with --{role}-column"
            )
        return found[0] if found else None

    def check(self, names: list[str], what: str) -> None:
        """Raises ShardError, naming the columns there are, unless a table with these has an image
        and a text.
        """
        for role in NAMES:
            given = getattr(self, role)
            if given and given not in names:
                raise ShardError(f"{what} has no column {given!r}; it has {', '.join(names)}")
        try:
            roles = {role for role in NAMES if self.of(role, names)}
        except RecordError as error:
            raise ShardError(f"{what}: {error}") from error
        if self.text_only or "image" in roles or "image_id" in names:
            missing = None if roles & {"caption", "question"} else "caption"
            missing = "answer" if "question" in roles and "answer" not in roles else missing
        else:
            missing = "image"
        if missing:
            raise ShardError(
                f"{what} has no column of {missing}s that is known by its name: its first line is "
                f"{', '.join(names)!r:.200}; name it with --{missing}-column, or add a first line "
                "such as image,caption"
            )

    def row(self, fields: Any, where: str, has_ids: bool) -> Row:
        """Returns what these fields say; whether texts are texts is for the source to see.

        `has_ids`: its "id" names its text. Raises RecordError where it is not of the form.
        """
        named = isinstance(fields, Mapping)
        column = self.of("image", fields) or "image_id" if named else ""
        image = fields.get(column) if named else None
        if named and image in (None, ""):
            if not self.text_only:
                raise RecordError(
                    "it has no field 'image' with the path of an image (--text-only keeps such "
                    "rows as records without a picture)"
                )
            image = None
        elif not isinstance(image, str | int) or isinstance(image, bool):
            raise RecordError("it has no field 'image' with the path of an image")
        split = fields.get(self.of("split", fields) or "")
        given = fields.get("question_id", fields.get("id") if has_ids else None)
        if not isinstance(split, str | None) or not isinstance(given, str | int | None):
            raise RecordError("'split' must be a text, 'id' a text or a whole number")
        row = Row(where, image, id=None if given in (None, "") else str(given))
        row.split = (split or "").strip() or None
        row.meta = {name: fields[name] for name in META if fields.get(name) not in (None, "")}
        caption = self.of("caption", fields)
        question = self.of("question", fields)
        answer = self.of("answer", fields)
        if bool(question) != bool(answer) or not (caption or question):
            raise RecordError(
                "it needs exactly one of 'text', 'caption' and 'captions', or 'question' with "
                f"'answers'; found {', '.join(map(str, fields))}"
            )
        if question and (fields[question] not in (None, "") or not caption):
            row.question = fields[question]
            row.answers = [_answer(value) for value in listed(fields[answer])]
        if caption and (row.answers is None or fields[caption] not in (None, "")):
            row.captions = listed(fields[caption])
        return row

    def unused(self, fields: Mapping[str, Any]) -> list[str]:
        """Returns the fields that `row` makes nothing of."""
        used = {self.of(role, fields) for role in NAMES}
        return [name for name in fields if name not in used and name not in META + _IDS]


def listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _answer(value: Any) -> Any:
    """Returns what an annotator of VQAv2, OK-VQA or VizWiz said: {"answer": text, ...}."""
    return value["answer"] if isinstance(value, Mapping) and "answer" in value else value
