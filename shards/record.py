"""A Record is one image and every text that belongs to it, or texts without any image: what the
sources make and what a shard stores.

Official files -> Record -> `{key}.json` in a shard -> Record. The image itself lies beside it as
`{key}.jpg`; beside a record that says `"has_picture": false` lies none.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Task = Literal["caption", "vqa"]
TASKS: tuple[str, ...] = ("caption", "vqa")

# WebDataset splits a member's name at the first dot, and a slash would make folders: neither may be
# in a key.
_KEY = re.compile(r"[A-Za-z0-9_\-]+")
_HALF = re.compile("[\ud800-\udfff]")  # of a character: a lone surrogate
_ESCAPED_HALF = re.compile(r"\\u[dD][89a-fA-F]")


class RecordError(ValueError):
    """A record that breaks the format; the message names the key and the field."""

    is_for_user = True  # as ShardError


def parse_json(data: bytes) -> Any:
    """Returns what a JSON file of a sample says. Raises RecordError where nothing can be made of
    it: no UTF-8, no JSON, nested too deep, or a text with half of a character in it, which can be
    neither tokenized nor written.
    """
    try:
        text = data.decode("utf-8-sig")
        document = json.loads(text)
        if _ESCAPED_HALF.search(text):  # mostly a sound pair: only the whole document can tell
            _as_json(document)
    except (ValueError, RecursionError) as error:
        raise RecordError(f"its JSON {data[:80]!r} cannot be read: {error}") from error
    return document


def is_text(value: object) -> bool:
    """Tells whether it is a string of whole characters."""
    return isinstance(value, str) and not _HALF.search(value)


def _as_json(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


@dataclass(frozen=True, slots=True)
class Text:
    """One text of an image: all its captions, or one question with its answers in the order given.

    caption: `prompt` is None and every element of `targets` is a training target of its own.
    vqa: `prompt` is the question and `targets` the annotators' answers (ten in VQAv2); () where
    nobody gave any, as in a test split whose answers are withheld: "targets": null in JSON.
    """

    id: str
    task: Task
    targets: tuple[str, ...]
    prompt: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One image and all its texts. `key` names its files in the shard and is unique in a split.

    `has_picture`: False for texts that no image belongs to, said in so many words: a sample whose
    image was merely lost must stay an error. Their `image_id` names nothing but the record.
    """

    key: str
    dataset: str
    split: str
    image_id: str
    texts: tuple[Text, ...]
    has_picture: bool = True

    @property
    def targets(self) -> int:
        return sum(len(text.targets) for text in self.texts)

    @property
    def is_answered(self) -> bool:
        """Tells whether its texts have targets: of a record all have, or none."""
        return bool(self.targets)

    @property
    def characters(self) -> int:
        return sum(len(text.prompt or "") + sum(map(len, text.targets)) for text in self.texts)

    def to_json(self) -> bytes:
        """Returns UTF-8 JSON, the same bytes for the same record. Raises RecordError for a `meta`
        that JSON cannot hold, and for half a character in any text.
        """
        try:
            document = asdict(self)
            if self.has_picture:  # as records were written before there were others
                del document["has_picture"]
            for text in document["texts"]:
                text["targets"] = text["targets"] or None
            return _as_json(document)
        except (ValueError, TypeError, RecursionError) as error:
            raise RecordError(f"record {self.key} cannot be written as JSON: {error}") from error

    @classmethod
    def from_json(cls, data: bytes) -> Record:
        """Raises RecordError, naming the key and the field, for anything that is not a record."""
        document = parse_json(data)
        try:
            texts = tuple(map(_text, document["texts"]))
            record = cls(
                *(document["key"], document["dataset"], document["split"], document["image_id"]),
                texts,
                has_picture=document.get("has_picture", True),
            )
        except KeyError as error:
            raise RecordError(f"the record {data[:80]!r} has no field {error}") from error
        except TypeError as error:
            raise RecordError(f"the record {data[:80]!r} cannot be read: {error}") from error
        record.check()
        return record

    def check(self) -> None:
        """Raises RecordError unless every field has its type and every text has something to
        learn.
        """
        if not isinstance(self.key, str) or not _KEY.fullmatch(self.key):
            raise RecordError(
                f"key {self.key!r}: a key is made of letters, digits, '_' and '-' alone"
            )
        for name in ("dataset", "split", "image_id"):
            if not isinstance(getattr(self, name), str):
                raise RecordError(
                    f"record {self.key}: {name} is {getattr(self, name)!r}, not a string"
                )
        if not isinstance(self.has_picture, bool):
            raise RecordError(
                f"record {self.key}: has_picture is {self.has_picture!r:.60}, not true or false"
            )
        if not self.texts:
            raise RecordError(f"record {self.key}: 'texts' is empty")
        seen: set[str] = set()
        for text in self.texts:
            where = f"record {self.key}, text {text.id!r}"
            if not isinstance(text.id, str) or text.id in seen:
                raise RecordError(
                    f"{where}: the id must be a string that occurs once in the record"
                )
            seen.add(text.id)
            _check_text(text, where)
        if self.is_answered and not all(text.targets for text in self.texts):
            raise RecordError(f"record {self.key}: 'targets' is null in some of its texts alone")


def _check_text(text: Text, where: str) -> None:
    """Raises RecordError unless its fields have their types and there is something to learn."""
    if text.task not in TASKS:
        raise RecordError(f"{where}: task is {text.task!r}, expected one of {', '.join(TASKS)}")
    if not isinstance(text.meta, dict):
        raise RecordError(f"{where}: 'meta' is {text.meta!r:.60}, expected a mapping")
    if not isinstance(text.prompt, str | None):
        raise RecordError(f"{where}: 'prompt' is {text.prompt!r:.60}, expected a text")
    if text.task == "vqa" and not (text.prompt and text.prompt.strip()):
        raise RecordError(
            f"{where}: a vqa text needs its question in 'prompt', found {text.prompt!r}"
        )
    for target in text.targets:
        if not isinstance(target, str):
            raise RecordError(f"{where}: 'targets' holds {target!r:.60}, which is no text")
    if text.task == "vqa" and not text.targets:
        return
    filled = [bool(target.strip()) for target in text.targets]
    # An annotator of VQAv2 may have left an answer empty: it is kept, since the scores count all
    # ten.
    if not (any(filled) if text.task == "vqa" else filled and all(filled)):
        raise RecordError(f"{where}: 'targets' holds an empty text or none at all")


def _text(fields: Any) -> Text:
    """Reads a text of `to_json`'s document. Raises KeyError, TypeError or RecordError."""
    targets = fields["targets"]
    # A string would be taken for a list of letters; an empty list is none of unanswered questions.
    if targets is not None and not (isinstance(targets, list) and targets):
        raise RecordError(f"'targets' is {targets!r:.60}, expected a list of texts")
    meta = {} if fields.get("meta") is None else fields["meta"]
    return Text(fields["id"], fields["task"], tuple(targets or ()), fields.get("prompt"), meta)
