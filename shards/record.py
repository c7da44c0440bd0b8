"""A Record is one image and every text that belongs to it: what the sources make and what a shard
stores.

Official files -> Record -> `{key}.json` in a shard -> Record. The image itself lies beside it as
`{key}.jpg`.
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


class RecordError(ValueError):
    """A record that breaks the format; the message names the key and the field."""

    is_for_user = True  # as ShardError


@dataclass(frozen=True, slots=True)
class Text:
    """One text of an image: all its captions, or one question with its answers in the order given.

    caption: `prompt` is None and every element of `targets` is a training target of its own.
    vqa: `prompt` is the question and `targets` the annotators' answers (ten in VQAv2).
    """

    id: str
    task: Task
    targets: tuple[str, ...]
    prompt: str | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Record:
    """One image and all its texts. `key` names its files in the shard and is unique in a split."""

    key: str
    dataset: str
    split: str
    image_id: str
    texts: tuple[Text, ...]

    @property
    def targets(self) -> int:
        return sum(len(text.targets) for text in self.texts)

    @property
    def characters(self) -> int:
        return sum(len(text.prompt or "") + sum(map(len, text.targets)) for text in self.texts)

    def to_json(self) -> bytes:
        """Returns UTF-8 JSON, the same bytes for the same record."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, data: bytes) -> Record:
        """Raises RecordError, naming the key and the field, for anything that is not a record."""
        try:
            document = json.loads(data)
            texts = tuple(
                Text(t["id"], t["task"], tuple(t["targets"]), t.get("prompt"), t.get("meta") or {})
                for t in document["texts"]
            )
            record = cls(
                document["key"], document["dataset"], document["split"], document["image_id"], texts
            )
        except KeyError as error:
            raise RecordError(f"the record {data[:80]!r} has no field {error}") from error
        except (ValueError, TypeError) as error:
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
        seen: set[str] = set()
        for text in self.texts:
            where = f"record {self.key}, text {text.id!r}"
            if not isinstance(text.id, str) or text.id in seen:
                raise RecordError(
                    f"{where}: the id must be a string that occurs once in the record"
                )
            seen.add(text.id)
            if text.task not in TASKS:
                raise RecordError(
                    f"{where}: task is {text.task!r}, expected one of {', '.join(TASKS)}"
                )
            if text.task == "vqa" and not (isinstance(text.prompt, str) and text.prompt.strip()):
                raise RecordError(
                    f"{where}: a vqa text needs its question in 'prompt', found {text.prompt!r}"
                )
            filled = [isinstance(t, str) and bool(t.strip()) for t in text.targets]
            # An annotator of VQAv2 may have left an answer empty: it is kept, since the scores
            # count all ten.
            if not (any(filled) if text.task == "vqa" else filled and all(filled)):
                raise RecordError(f"{where}: 'targets' holds an empty text or none at all")
