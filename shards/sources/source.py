"""What every source gives to the build: records by split, the place of their images, and the dirt
it found.

Official files -> Source. Images lie in a folder or in a zip, which is read where it is and never
extracted.
"""

from __future__ import annotations

import hashlib
import json
import os
import posixpath
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Protocol

from shards.files import ShardError
from shards.record import Record, Text

ImagesAt = Annotated[Path, "Folder of images, or a zip, which is not extracted."]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")

# The kinds of dirt, as `skipped.jsonl` names them; the build adds UNDECODABLE.
IMAGE_WITHOUT_TEXT = "image without text"
TEXT_WITHOUT_IMAGE = "text without image"
EMPTY_TEXT = "empty text"
NO_SPLIT = "in no split"
UNDECODABLE = "undecodable image"


@dataclass(frozen=True, slots=True)
class Item:
    """A record and the name of its image in `Source.images`."""

    record: Record
    image: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """One thing left out: its kind, its name (image or text), the texts that went with it, and
    why.
    """

    kind: str
    name: str
    reason: str
    split: str | None = None
    texts: int = 0


class ImageFiles(Protocol):
    """Images by name; reading is safe from several threads."""

    place: Path

    def read(self, name: str, /) -> bytes: ...

    def close(self) -> None: ...


@dataclass
class Source:
    """Records by split, and what was left out. `splits` keeps the order of the official files;
    `notes` counts what was kept but is odd.
    """

    dataset: str
    images: ImageFiles
    splits: dict[str, list[Item]] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    _found: set[str] = field(default_factory=set)

    def add(self, split: str, key: str, image_id: str, texts: Iterable[Text], image: str) -> None:
        record = Record(key, self.dataset, split, image_id, tuple(texts))
        self.splits.setdefault(split, []).append(Item(record, image))

    def add_captions(
        self, name: str, captions: list[str], split: str, key: str, image_id: str | None = None
    ) -> bool:
        """Adds the image called `name` with its captions, or says why not. `image_id`: by default
        the key.
        """
        path = self.find(name, split, len(captions))
        if path is None:
            return False
        targets = self.clean(captions, name, split)
        if targets:
            self.add(split, key, image_id or key, [Text(image_id or key, "caption", targets)], path)
        else:
            self.skip(IMAGE_WITHOUT_TEXT, path, "it has no caption, or only empty ones", split)
        return bool(targets)

    def find(self, name: str, split: str | None, texts: int, exact: bool = False) -> str | None:
        """Returns the image's path (`exact`: `name` is it, not a file name alone); else its texts
        are left out, and named.
        """
        path = name if exact else self.files.find(name)
        if path not in self.files.names:
            path = None
        if path is None:
            self.skip(
                TEXT_WITHOUT_IMAGE, name, f"no such image in {self.images.place.name}", split, texts
            )
        else:
            self._found.add(path)
        return path

    def skip_rest(
        self,
        reason: str,
        split: str | None = None,
        among: Callable[[str], bool] = lambda path: True,
    ) -> None:
        """Names the images that nothing asked for."""
        for path in self.files.names:
            if path not in self._found and among(path):
                self.skip(IMAGE_WITHOUT_TEXT, path, reason, split)

    def clean(self, captions: Iterable[str], name: str, split: str | None) -> tuple[str, ...]:
        """Returns captions without outer whitespace; empty ones are left out and named, odd ones
        kept and counted.
        """
        kept = []
        for caption in captions:
            trimmed = caption.strip()
            if not trimmed:
                self.skip(EMPTY_TEXT, name, "the caption is empty", split, texts=1)
                continue
            self.notes["captions with outer whitespace, trimmed"] += trimmed != caption
            self.notes["captions of one word, kept"] += len(trimmed.split()) == 1
            self.notes["captions that repeat another one of their image, kept"] += trimmed in kept
            kept.append(trimmed)
        return tuple(kept)

    @property
    def files(self) -> Images:
        """Returns its images, where they are files of a folder or zip that can be looked for by
        name.
        """
        assert isinstance(self.images, Images)  # a source of rows looks for none
        return self.images

    def check_text_ids(self, what: str) -> None:
        """Raises ShardError for an id that two texts have."""
        items = (item for split in self.splits.values() for item in split)
        unique((text.id for item in items for text in item.record.texts), what)

    def skip(
        self, kind: str, name: str, reason: str, split: str | None = None, texts: int = 0
    ) -> None:
        self.skipped.append(Skipped(kind, name, reason, split, texts))


class Images:
    """The image files of a folder or of a zip, by their path relative to it; reading is safe from
    several threads.
    """

    def __init__(self, place: str | os.PathLike[str]):
        self.place = Path(place)
        self._zip: zipfile.ZipFile | None = None
        if self.place.is_dir():
            names = [
                Path(folder, name).relative_to(self.place).as_posix()
                for folder, _, files in os.walk(self.place, followlinks=True)
                for name in files
            ]
        elif self.place.is_file():
            try:
                self._zip = zipfile.ZipFile(self.place)
            except (zipfile.BadZipFile, OSError) as error:
                raise ShardError(
                    f"{place} is neither a folder of images nor a whole zip: {error}"
                ) from error
            names = self._zip.namelist()
        else:
            raise ShardError(f"there is no folder or zip of images at {place}")
        # `__MACOSX/._x.jpg` in the official Flickr8k zip is a resource fork, not an image.
        images = (name for name in names if name.lower().endswith(IMAGE_SUFFIXES))
        self.names = dict.fromkeys(
            sorted(name for name in images if not posixpath.basename(name).startswith("._"))
        )
        if not self.names:
            raise ShardError(f"{place} holds no image ({', '.join(IMAGE_SUFFIXES)})")
        self._by_basename: dict[str, list[str]] = {}
        for name in self.names:
            self._by_basename.setdefault(posixpath.basename(name), []).append(name)

    def find(self, filename: str) -> str | None:
        """Returns the path of the one file called `filename`, in whatever subfolder; ShardError if
        there are two.
        """
        found = self._by_basename.get(filename, [])
        if len(found) > 1:
            raise ShardError(
                f"{self.place} holds two images called {filename}: {found[0]} and {found[1]}"
            )
        return found[0] if found else None

    def read(self, path: str) -> bytes:
        return self._zip.read(path) if self._zip else (self.place / path).read_bytes()

    def close(self) -> None:
        if self._zip:
            self._zip.close()


def read_text(path: str | os.PathLike[str], flag: str) -> str:
    """Returns a whole UTF-8 file (a byte order mark is dropped); ShardError names `flag`, the
    option that gave the path.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ShardError(f"{flag} {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ShardError(
            f"{flag} {path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def read_json(
    path: str | os.PathLike[str], flag: str, hook: Callable[[dict], Any] | None = None
) -> Any:
    """Returns a JSON document, or ShardError; `hook` is json's object_hook."""
    try:
        return json.loads(read_text(path, flag), object_hook=hook)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ShardError(f"{flag} {path} is not JSON: {error}") from error


def rows_of(document: Any, name: str, keys: tuple[str, ...], where: str) -> list[dict[str, Any]]:
    """Returns the list `name` of an official JSON file, every element of which has `keys`, or
    ShardError.
    """
    rows = document.get(name) if isinstance(document, dict) else None
    if not isinstance(rows, list):
        raise ShardError(
            f"{where} has no list '{name}': it is not the official file this source reads"
        )
    for n, row in enumerate(rows):
        missing = [key for key in keys if not isinstance(row, dict) or key not in row]
        if missing:
            raise ShardError(f"{where}: {name}[{n}] has no field '{missing[0]}'")
    return rows


def unique(ids: Iterable[Any], what: str) -> None:
    """Raises ShardError naming the first id that occurs twice."""
    counts = Counter(ids)
    twice = [i for i, n in counts.items() if n > 1]
    if twice:
        raise ShardError(
            f"{what} {twice[0]} occurs {counts[twice[0]]} times ({len(twice)} such ids); ids "
            "must be unique"
        )


def is_empty(question: str, answers: Iterable[str]) -> bool:
    """Tells whether the question, or every answer to it, is blank."""
    return not question.strip() or not any(answer.strip() for answer in answers)


def check_limit(limit: int | None) -> None:
    if limit is not None and limit < 1:
        raise ShardError(f"--limit is {limit}: it is a number of images, 1 or more")


def order_of(seed: int | str, name: Any) -> bytes:
    """Returns what to sort by for a random draw, the same on every machine and in every set."""
    return hashlib.sha256(f"{seed}:{name}".encode()).digest()


def keys_of(paths: Iterable[str]) -> dict[str, str]:
    """Makes path -> key: the file's stem where that is clean and unique, else its path made clean,
    plus a hash of it.
    """
    paths = list(paths)
    stems = {path: posixpath.splitext(posixpath.basename(path))[0] for path in paths}
    counts = Counter(stems.values())
    keys = {}
    for path, stem in stems.items():
        if counts[stem] == 1 and re.fullmatch(r"[A-Za-z0-9_\-]{1,80}", stem):
            keys[path] = stem
        else:
            clean = re.sub(r"[^A-Za-z0-9_\-]+", "_", posixpath.splitext(path)[0]).strip("_")
            keys[path] = f"{clean[-60:]}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"
    return keys
