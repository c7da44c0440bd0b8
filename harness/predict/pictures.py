"""The pictures that a model is asked about: a folder of them, a set of shards, or plain tars.

A place -> Pictures, each with a name that is its own and a function that reads it. Nothing is
decoded here. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from shards.cache import Cache
from shards.files import ShardError, is_remote, read_plain
from shards.images import SUFFIXES, is_image_name
from shards.manifest import INDEX, Manifest, splits_in
from shards.read import PAYLOADS, Reader, Sample
from shards.record import Record, Text
from shards.tar import Group, groups, open_shard


class Picture(NamedTuple):
    """One picture, not yet read."""

    name: str
    read: Callable[[], Sample]  # its bytes and what is asked; raises OSError, ShardError


@dataclass(frozen=True)
class Pictures:
    """All pictures of a place, in an order that is always the same."""

    place: str
    each: Iterable[Picture]  # once
    count: int | None = None  # None: of tars without an index
    manifest: Manifest | None = None  # of a set of shards
    has_texts: bool = False  # each brings its own, by which it is asked
    passed_over: Sequence[str] = ()  # files of a folder that are no pictures by their names


def pictures_at(place: str, prompt: str | None, cache: Cache | None = None) -> Pictures:
    """Returns the pictures of a folder and all below it, of a set of shards or of a folder of tars
    without an index.

    They are asked `prompt`; where that is None, a set is asked its own texts, and the pictures of
    the others are described. Raises ShardError for a place that holds none.
    """
    folder = Path(place)
    text = Text("", "vqa" if prompt else "caption", (), prompt)
    if is_remote(place) or (folder / INDEX).is_file():
        return _of_set(Manifest.open(place, cache), cache, text if prompt else None)
    if tars := sorted(folder.glob("*.tar")):
        return Pictures(place, _of_tars(tars, text))
    return _of_folder(folder, text)


def check_place(place: str) -> None:
    """Raises ShardError for a place that is neither a folder nor remote, before anything is
    loaded.
    """
    if not is_remote(place) and not Path(place).is_dir():
        raise ShardError(f"--images {place}: there is no such folder")


def kind_at(place: str) -> str:
    """Returns images, or features for a set of them. Raises ShardError."""
    if is_remote(place) or Path(place, INDEX).is_file():
        return Manifest.read_index(place).kind
    return "images"


def _of_folder(folder: Path, text: Text) -> Pictures:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    named = {_name(path.relative_to(folder).as_posix()): path for path in files}
    others = [name for name in named if not is_image_name(name)]
    if len(others) == len(named):
        splits = ", ".join(splits_in(folder))
        hint = f"; it holds the sets {splits}: name one of them" if splits else ""
        raise ShardError(
            f"--images {folder}: no file in it is a picture by its name ({', '.join(SUFFIXES)})"
            f"{hint}"
        )
    each = [
        Picture(name, partial(_of_file, name, path, text))
        for name, path in named.items()
        if is_image_name(name)
    ]
    return Pictures(str(folder), each, len(each), passed_over=others)


def _name(path: str) -> str:
    """Returns a path as it can be written and read again: it may be no UTF-8."""
    return path.encode("utf-8", "backslashreplace").decode()


def _of_file(name: str, path: Path, text: Text) -> Sample:
    return _sample(name, read_plain(path), path.suffix, text)


def _sample(name: str, data: bytes, extension: str, text: Text) -> Sample:
    return Sample(Record(name, "", "", name, (text,)), data, extension, 0, 0)


def _of_set(manifest: Manifest, cache: Cache | None, text: Text | None) -> Pictures:
    reader = Reader(manifest, cache, answered=False)

    def read(index: int) -> Sample:
        sample = reader.read(index)
        if text is None:
            return sample
        return replace(sample, record=replace(sample.known, texts=(text,)))

    each = (Picture(manifest.key(i), partial(read, i)) for i in range(manifest.samples))
    return Pictures(manifest.folder, each, manifest.samples, manifest, text is None)


def _of_tars(tars: Sequence[Path], text: Text) -> Iterator[Picture]:
    for tar in tars:
        with open_shard(str(tar)) as (read, size):
            try:
                for group in groups(read, size):
                    name = f"{tar.name}/{group.key}"
                    yield Picture(name, partial(_of_group, name, group, text))
            except ShardError as error:
                raise ShardError(f"{tar}: {error}") from error


def _of_group(name: str, group: Group, text: Text) -> Sample:
    extension = next((end for end in group.contents if end in PAYLOADS["images"]), None)
    if group.problem or extension is None:
        raise ShardError(group.problem or f"no picture among .{', .'.join(group.contents)}")
    return _sample(name, group.contents[extension], extension, text)
