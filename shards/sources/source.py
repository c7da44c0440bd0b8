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
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

from shards.files import ShardError, decode, read_plain
from shards.images import SUFFIXES, is_image_name
from shards.record import Record, Text, is_text

ImagesAt = Annotated[Path, "Folder of images, or a zip, which is not extracted."]

_HEIC = (".heic", ".heif")

# The parts of COCO that are in the names of its images; COCO 2017 has none.
COCO_PARTS = ("train2014", "val2014", "test2015")

# The kinds of dirt, as `skipped.jsonl` names them; the build adds UNDECODABLE.
IMAGE_WITHOUT_TEXT = "image without text"
TEXT_WITHOUT_IMAGE = "text without image"
EMPTY_TEXT = "empty text"
UNUSABLE_TEXT = "unusable text"  # no text at all: a number, a list, half a character
NO_SPLIT = "in no split"
UNDECODABLE = "undecodable image"
REJECTED_CAPTION = "rejected caption"  # by the makers of its set
FURTHER_TURN = "further turn"  # of a conversation: a record has its first one


@dataclass(frozen=True, slots=True)
class Item:
    """A record and the name of its image in `Source.images`; None: the record has no picture."""

    record: Record
    image: str | None

    @property
    def name(self) -> str:
        """What `skipped.jsonl` calls it."""
        return self.record.key if self.image is None else self.image


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
    """Images by name. Reading is safe from several threads."""

    place: Path

    def read(self, name: str, /) -> bytes: ...

    def stamp(self, name: str, /) -> str: ...  # changes with the file

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

    def add(
        self, split: str, key: str, image_id: str, texts: Iterable[Text], image: str | None
    ) -> None:
        record = Record(key, self.dataset, split, image_id, tuple(texts), image is not None)
        self.splits.setdefault(split, []).append(Item(record, image))

    def add_captions(
        self, name: str, captions: list[Any], split: str, key: str, image_id: str | None = None
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
        """Returns the image's path (see `Images.find`); else its texts are left out, and named."""
        path = self.files.find(name, exact)
        if path is None:
            self.skip(TEXT_WITHOUT_IMAGE, name, self.files.why_not(name), split, texts)
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
        for path in filter(among, self.files.others):
            if path.lower().endswith(_HEIC):  # what phones make would be missed in silence
                self.skip(UNDECODABLE, path, "HEIC is not read: save it as JPEG", split)

    def clean(self, captions: Iterable[Any], name: str, split: str | None) -> tuple[str, ...]:
        """Returns captions without outer whitespace; empty ones and what is no text are left out
        and named, odd ones kept and counted.
        """
        kept: list[str] = []
        for caption in captions:
            if not is_text(caption):
                why = f"the caption is {caption!r:.60}, not a text"
                self.skip(UNUSABLE_TEXT, name, why, split, texts=1)
                continue
            trimmed = caption.strip()
            if not trimmed:
                self.skip(EMPTY_TEXT, name, "the caption is empty", split, texts=1)
                continue
            self.notes["captions with outer whitespace, trimmed"] += trimmed != caption
            self.notes["captions of one word, kept"] += len(trimmed.split()) == 1
            self.notes["captions that repeat another one of their image, kept"] += trimmed in kept
            kept.append(trimmed)
        return tuple(kept)

    def takes(
        self, question: Any, answers: Iterable[Any] | None, name: str, split: str | None
    ) -> bool:
        """Tells whether there are a question and an answer; else they are left out, and named.
        `answers` is None where they are withheld.
        """
        is_withheld = answers is None
        answers = list(answers or ())
        odd = [text for text in (question, *answers) if not is_text(text)]
        if odd:
            why = f"its question or an answer is {odd[0]!r:.60}, not a text"
            self.skip(UNUSABLE_TEXT, name, why, split, texts=1)
        elif not question.strip():
            self.skip(EMPTY_TEXT, name, "its question is empty", split, texts=1)
        elif not (is_withheld or any(answer.strip() for answer in answers)):
            self.skip(EMPTY_TEXT, name, "all its answers are empty", split, texts=1)
        else:
            return True
        return False

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
    """The image files of a folder or of a zip, by their path relative to it; of None there are
    none.
    """

    def __init__(self, place: str | os.PathLike[str] | None):
        self.place = Path(place or ".")
        self._zip: zipfile.ZipFile | None = None
        names: list[str] = []
        if place is None:
            pass
        elif self.place.is_dir():
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
        names = sorted(name for name in names if not posixpath.basename(name).startswith("._"))
        self.names = dict.fromkeys(name for name in names if is_image_name(name))
        self.others = dict.fromkeys(name for name in names if not is_image_name(name))
        if place is not None and not self.names:
            raise ShardError(f"{place} holds no image ({', '.join(SUFFIXES)})")
        self._own = (_folded(self.place.resolve().name), _folded(self.place.stem))
        tops = {name.partition("/")[0] for name in self.names}
        self._top = f"{tops.pop()}/" if len(tops) == 1 else ""  # the one folder that holds all
        self._by_path: dict[str, list[str]] = {}
        self._by_basename: dict[str, list[str]] = {}
        for name in self.names:
            self._by_path.setdefault(_folded(name), []).append(name)
            self._by_basename.setdefault(_folded(posixpath.basename(name)), []).append(name)

    def find(self, name: str, exact: bool = False) -> str | None:
        """Returns the path of the image that is called `name`; ShardError if there are two.

        `exact`: a path in the folder; the place of the folder may stand before it. Else a file's
        name may be enough, in whatever subfolder. Upper and lower case, and the two ways to write
        an accent in Unicode, are told apart only where both are there.
        """
        wanted = posixpath.normpath(name.replace("\\", "/"))
        tries = []
        if exact or "/" in wanted:
            if name in self.names:
                return name
            parts = wanted.split("/")
            tails = [
                "/".join(parts[n + 1 :])
                for n, part in enumerate(parts[:-1])
                if _folded(part) in self._own
            ]
            paths = [top + path for path in (wanted, *tails) for top in ("", self._top)]
            tries += [self._by_path.get(_folded(path), []) for path in paths]
        if not exact:
            tries.append(self._by_basename.get(_folded(posixpath.basename(wanted)), []))
        found = next(filter(None, tries), [])
        same = [path for path in found if path.endswith(wanted)]
        return self._only(name, same or found)

    def find_id(self, number: str) -> str | None:
        """Returns the path of the image that is called as this id is, whatever it ends in; a whole
        number is looked for as COCO writes it, too. ShardError if there are two.
        """
        stems = [number]
        if number.isdecimal():
            stems.append(f"{int(number):012d}")  # COCO 2017
            stems += [f"COCO_{part}_{int(number):012d}" for part in COCO_PARTS]
        tries = (self._by_stem.get(_folded(stem), []) for stem in stems)
        return self._only(number, next(filter(None, tries), []))

    @cached_property
    def _by_stem(self) -> dict[str, list[str]]:
        by_stem: dict[str, list[str]] = {}
        for name in self.names:
            stem = posixpath.splitext(name)[0]
            for called in {stem, posixpath.basename(stem)}:
                by_stem.setdefault(_folded(called), []).append(name)
        return by_stem

    def _only(self, name: str, found: list[str]) -> str | None:
        if len(found) > 1:
            raise ShardError(
                f"{self.place} holds two images called {name}: {found[0]} and {found[1]}"
            )
        return found[0] if found else None

    def why_not(self, name: str) -> str:
        """Returns why there is no image of this name, in words for `skipped.jsonl`."""
        if "://" in name:
            return "it is a web address: download the pictures, and give their folder with --images"
        why = f"no such image in {self.place.name}"
        if name in self.others:
            return f"{why}: a file of another kind (read are {', '.join(SUFFIXES)})"
        base = posixpath.basename(name.replace("\\", "/"))
        if like := self._by_basename.get(_folded(base)):
            return f"{why}; {like[0]} has its file name: names are paths in the folder"
        if not is_image_name(name):
            return f"{why}: its names may be said as --images DIR/NAME_{{id:012d}}.jpg"
        return why

    def read(self, path: str) -> bytes:
        return self._zip.read(path) if self._zip else read_plain(self.place / path)

    def size(self, path: str) -> int:
        """Returns the bytes of a file."""
        if self._zip:
            return self._zip.getinfo(path).file_size
        return os.stat(self.place / path).st_size

    def stamp(self, path: str) -> str:
        """Returns what another file of this name would not have."""
        if self._zip:
            return f"{self.size(path)} {self._zip.getinfo(path).CRC}"
        found = os.stat(self.place / path)
        return f"{found.st_size} {found.st_mtime_ns}"

    def close(self) -> None:
        if self._zip:
            self._zip.close()


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name.casefold())


def read_bytes(path: str | os.PathLike[str], flag: str) -> bytes:
    """Returns a whole file; ShardError names `flag`, the option that gave the path."""
    try:
        return read_plain(Path(path))
    except OSError as error:
        why = error.strerror or "it is no plain file"
        raise ShardError(f"{flag} {path} cannot be read: {why}") from error


def read_text(path: str | os.PathLike[str], flag: str) -> str:
    """Returns a whole UTF-8 file (a byte order mark is dropped), as `read_bytes` does."""
    return decode(read_bytes(path, flag), f"{flag} {path}")


def read_json(
    path: str | os.PathLike[str], flag: str, hook: Callable[[dict], Any] | None = None
) -> Any:
    """Returns a JSON document, or ShardError; `hook` is json's object_hook."""
    try:
        return json.loads(read_text(path, flag), object_hook=hook)
    except (ValueError, RecursionError) as error:
        if isinstance(error, ShardError):
            raise
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
    """Raises ShardError naming the first id that occurs twice, or is a list or a mapping."""
    ids = list(ids)
    if odd := [i for i in ids if isinstance(i, list | dict)]:
        raise ShardError(f"{what} {odd[0]!r:.60} is neither a number nor a text")
    counts = Counter(ids)
    twice = [i for i, n in counts.items() if n > 1]
    if twice:
        raise ShardError(
            f"{what} {twice[0]} occurs {counts[twice[0]]} times ({len(twice)} such ids); ids "
            "must be unique"
        )


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
            unique_bytes = path.encode("utf-8", "backslashreplace")
            keys[path] = f"{clean[-60:]}-{hashlib.sha256(unique_bytes).hexdigest()[:8]}"
    return keys
