"""How shards of other makers lay a sample out: which of its files is the picture, which holds the
text, and where in it.

Names of members -> the contents that `parse_sample` reads as if they were of our own. An index
keeps what was said of its set, so that training, scoring and verifying read it alike.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from shards.files import ShardError
from shards.images import EXTENSIONS, FORMATS
from shards.record import RecordError, parse_json
from shards.tar import Group

TEXTS = ("txt", "text", "caption", "json", "cls")
FIELDS = ("caption", "captions", "text", "TEXT")  # of JSON, as makers of shards name them
NAMED = 8  # members and fields that a refusal lists


@dataclass(frozen=True)
class Layout:
    """What was said of a set: the names of members are the ends of their file names, behind the
    first dot. None: as `parse_sample` finds it by itself.

    image: picture files, the first that is there. text: the file with the text. field: of JSON,
    where the text or the list of texts stands. classes: the names that the numbers in `text` stand
    for, the first that of 0.
    """

    image: tuple[str, ...] = ()
    text: str | None = None
    field: str | None = None
    classes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        image: Iterable[str] = (),
        text: str | None = None,
        field: str | None = None,
        class_names: Path | None = None,
    ) -> Layout | None:
        """Returns what these options say together; None where none is given. Raises ShardError."""
        classes: tuple[str, ...] = ()
        if class_names is not None:
            try:
                lines = class_names.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, ValueError) as error:
                raise ShardError(f"{class_names} is no list of class names: {error}") from error
            classes = tuple(map(str.strip, lines))
            if not all(classes):
                raise ShardError(
                    f"{class_names}: expected a name on each line, found {len(lines)} lines, "
                    f"{sum(not name for name in classes)} of them empty"
                )
        if field and classes:
            raise ShardError("a text is a field of JSON or the name of a class: give one of them")
        text = text or ("json" if field else "cls" if classes else None)
        if text and text.endswith("json"):
            field = field or FIELDS[0]
        image = tuple(map(_name, image))
        if not image and text is None:
            return None
        return cls(image, text and _name(text), field, classes)

    @classmethod
    def from_json(cls, document: Any) -> Layout | None:
        """Reads it from an index. Raises ValueError or TypeError for what is none."""
        if document is None:
            return None
        found = cls(**{**document, **{n: tuple(document[n]) for n in ("image", "classes")}})
        texts = (*found.image, found.text or "", found.field or "", *found.classes)
        if not all(type(text) is str for text in texts):
            raise ValueError("layout holds something else than texts")
        return found

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def end(self) -> str:
        """The end that the text's file gets in the index."""
        if self.classes:
            return "cls"
        return "json" if self.field else "txt"

    def names(self, members: Iterable[str]) -> dict[str, str]:
        """Returns the members that count, by the names that `parse_sample` knows; all others of
        the sample are none of its own. A text that was not described keeps its name.
        """
        there = list(members)
        found: dict[str, str] = {}
        for name in self.image or EXTENSIONS:
            if name in there:
                end = name.rpartition(".")[2]
                found[end if end in EXTENSIONS else "jpg"] = name
                break
        if self.text is None:
            return found | {name: name for name in ("json", "txt") if name in there}
        return found | ({self.end: self.text} if self.text in there else {})

    def applied(self, group: Group) -> Group:
        """Returns the sample with the files that count alone; its place and crc stay."""
        names = self.names(group.members)
        return replace(
            group,
            members={name: group.members[member] for name, member in names.items()},
            contents=self.contents(group.contents),
        )

    def contents(self, members: Mapping[str, bytes]) -> dict[str, bytes]:
        return {name: members[member] for name, member in self.names(members).items()}

    def captions(self, contents: Mapping[str, bytes]) -> list[str]:
        """Returns the texts of a sample, from where they are said to be. Raises ShardError,
        RecordError.
        """
        data = contents.get(self.end)
        if data is None:
            raise ShardError(f"no file .{self.text}, which holds the texts")
        if self.field:
            return field_texts(data, self.field)
        try:
            text = data.decode("utf-8-sig").strip()
        except ValueError as error:
            raise ShardError(f"its .{self.text} cannot be read as text: {error}") from error
        if not self.classes:
            return [text]
        number = int(text) if text.isdecimal() else -1
        if not 0 <= number < len(self.classes):
            raise ShardError(
                f"its .{self.text} holds {text[:40]!r}, expected a number from 0 to "
                f"{len(self.classes) - 1}, one for each class name"
            )
        return [self.classes[number]]

    def told(self) -> str:
        """Says where pictures and texts are read from."""
        picture = " or ".join(f".{name}" for name in self.image) or "the first picture file"
        where = f".{self.text}" if self.text else '"caption" of .json, or .txt'
        if self.field:
            where = f'"{self.field}" of .{self.text}'
        if self.classes:
            where += f", the names of its {len(self.classes)} classes"
        return f"pictures from {picture}, texts from {where}"


def _name(given: str) -> str:
    """A tar's members are known by the lower-case end of their names."""
    return given.removeprefix(".").lower()


def field_texts(data: bytes, field: str) -> list[str]:
    """Returns the text or the list of texts that a field of a JSON file holds; [] where it is
    absent or null. Raises RecordError.
    """
    document = parse_json(data)
    found = document.get(field) if isinstance(document, dict) else None
    if found is None:
        return []
    for text in (texts := found if isinstance(found, list) else [found]):
        if not isinstance(text, str):
            raise RecordError(f'its "{field}" is {found!r:.60}, expected a text or a list of texts')
    return list(filter(None, texts))


def what_would_help(members: Mapping[str, bytes]) -> str:
    """Names the files of a sample that is not understood, and the options that would help."""
    listed = ", ".join(f".{name}" for name in list(members)[:NAMED])
    pictures = [name for name, data in members.items() if _is_picture(data)]
    texts = [name for name in members if name.rpartition(".")[2] in TEXTS and name not in pictures]
    options = (
        [f"--image-member {pictures[0]}"] if pictures and pictures[0] not in EXTENSIONS else []
    )
    for text in texts[:1]:
        options += _text_options(text, members[text])
    found = f"a sample's files are {listed}"
    if not pictures:
        return f"{found}: none of them is a picture that can be read"
    if not texts:
        return f"{found}: name the one with the text with --text-member, if there is one"
    if not options:
        return found
    further = f" (or another text of {', '.join(texts)})" if len(texts) > 1 else ""
    return f"{found}: say {' '.join(options)}{further}"


def _text_options(name: str, data: bytes) -> list[str]:
    end = name.rpartition(".")[2]
    member = [] if name in ("txt", "json", "cls") else [f"--text-member {name}"]
    if end == "cls":
        return [*member, "--class-names FILE with a name for each class on a line"]
    if end != "json":
        return member
    try:
        document = parse_json(data)
    except RecordError:
        return member
    fields = list(document) if isinstance(document, dict) else []
    known = sorted((f for f in fields if f in FIELDS), key=FIELDS.index)
    if known:
        return [*member, f"--text-field {known[0]}"]
    return [*member, f"--text-field with one of its fields {', '.join(fields[:NAMED])}"]


def _is_picture(data: bytes) -> bool:
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS):
            return True
    except Exception:  # Pillow raises at least six types
        return False
