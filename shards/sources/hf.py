"""A data set of the package `datasets` (id on the hub, parquet, folder) -> one record an image with
all its texts.

Rows are streamed, so that --limit ends a download; their images wait in a temporary file (in
TMPDIR), byte by byte as they were stored, until the build reads them. Rows that show one image are
one record: those of one --id-column, or of equal bytes.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from shards.files import ShardError
from shards.record import Text, is_text
from shards.sources.source import (
    IMAGE_WITHOUT_TEXT,
    TEXT_WITHOUT_IMAGE,
    Source,
    check_limit,
    keys_of,
)

_FILES = {
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".json": "json",
    ".jsonl": "json",
}
HUB_ANSWERS_WITHIN = 5.0  # seconds
_HUB_ID = re.compile(r"[\w\-]+(/[\w.\-]+)?")
_KEPT = ("question_id", "answer_type", "question_type")  # columns of VQAv2


def load(
    dataset: Annotated[
        str, "Id on the hub; a parquet, arrow, csv or json file; a folder of them, or of images."
    ],
    split: Annotated[str, "One of its splits. A single file has no splits: what to call it."],
    image_column: Annotated[str, "Image feature, bytes, {bytes, path} or a path."] = "image",
    text_columns: Annotated[
        list[str] | None, "Captions: a text or a list. Several: with commas between them."
    ] = None,
    question_column: Annotated[str | None, "A question a row."] = None,
    answer_column: Annotated[
        str | None, "A text, a list of texts, or VQAv2's list of {answer}."
    ] = None,
    id_column: Annotated[
        str | None, "Names the image. None: the number of the first row that shows it."
    ] = None,
    config: Annotated[str | None, "Of the data set, where it has several."] = None,
    limit: Annotated[int | None, "Stop after this many images: the first ones."] = None,
) -> Source:
    """Reads the rows. VQAv2's columns `question_id`, `answer_type` and `question_type` are kept
    where they exist.

    ShardError for a data set, split or column that is not there, a value that is no text, one id
    for two images.
    """
    captions = [name.strip() for name in ",".join(text_columns or ()).split(",") if name.strip()]
    if bool(question_column) != bool(answer_column):
        raise ShardError(
            "--question-column and --answer-column belong together: one of them was not given"
        )
    if not captions and not question_column:
        raise ShardError("hf needs --text-columns, or --question-column and --answer-column")
    check_limit(limit)
    where = f"--dataset {dataset}"
    rows = _open(dataset, config, split)
    names = rows.column_names or list(next(_numbered(rows, where), (0, {}))[1])
    kept = [name for name in _KEPT if question_column and name in names]
    columns = _Columns(where, image_column, captions, question_column, answer_column, id_column)
    rows = rows.select_columns(list(dict.fromkeys([*columns.checked(names), *kept])))
    images = RowImages(Path(dataset).expanduser())
    source = Source(re.sub(r"[^A-Za-z0-9_\-]+", "_", Path(dataset).stem), images)
    groups: dict[str | bytes, _Group] = {}
    for number, row in _numbered(_undecoded(rows, image_column), where):
        if not _add_row(number, row, columns, kept, source, images, split, groups, limit):
            break
    images.complete()
    _add_groups(source, groups.values(), split)
    source.check_text_ids(f"{where}: the question_id")
    return source


@dataclass(frozen=True)
class _Columns:
    """The columns that were asked for, by their use."""

    where: str
    image: str
    captions: list[str]
    question: str | None
    answer: str | None
    id: str | None

    def checked(self, names: list[str]) -> list[str]:
        """Returns them all. Raises ShardError for one that is not among `names`."""
        flags: dict[str, Sequence[str | None]] = {
            "--image-column": [self.image],
            "--text-columns": self.captions,
            "--question-column": [self.question],
            "--answer-column": [self.answer],
            "--id-column": [self.id],
        }
        wanted = [(flag, name) for flag, given in flags.items() for name in given if name]
        for flag, name in wanted:
            if name not in names:
                raise ShardError(
                    f"{flag} {name}: {self.where} has no such column; {_offer(name, names)}"
                )
        return [name for _, name in wanted]


def _add_row(
    number: int,
    row: dict[str, Any],
    columns: _Columns,
    kept: list[str],
    source: Source,
    images: RowImages,
    split: str,
    groups: dict[str | bytes, _Group],
    limit: int | None,
) -> bool:
    """Adds what a row says to the group of its image. Returns False where --limit is reached."""
    captions = [text for name in columns.captions for text in _strings(row[name])]
    try:
        image, digest = images.add(number, row[columns.image])
    except ValueError as error:
        texts = len(captions) + bool(columns.question)
        source.skip(TEXT_WITHOUT_IMAGE, f"row {number}", str(error), split, texts)
        return True
    name = str(row[columns.id]) if columns.id else f"{number:08d}"
    identity = name if columns.id else digest
    if identity not in groups and len(groups) == limit:
        source.notes[
            f"rows read before --limit {limit} stopped; "
            "what later rows say of these images is not in"
        ] = number
        return False
    source.notes["rows that show the image of an earlier one, joined with it"] += identity in groups
    group = groups.setdefault(identity, _Group(name, image, digest))
    if group.digest != digest:
        raise ShardError(
            f"{columns.where}, row {number}: {columns.id} {identity!r} came before, "
            "with another image"
        )
    group.captions += source.clean(captions, f"row {number}", split)
    if columns.question and columns.answer:
        answers = tuple(_strings(row[columns.answer]))
        asked = _strings(row[columns.question])
        question: Any = " ".join(asked) if all(map(is_text, asked)) else asked
        if source.takes(question, answers, f"row {number}", split):
            group.questions.append((question, answers, {name: row[name] for name in kept}))
    return True


def _add_groups(source: Source, groups: Collection[_Group], split: str) -> None:
    key_of = keys_of(group.name for group in groups)
    for group in groups:
        key = key_of[group.name]
        if texts := group.texts(key):
            source.add(split, key, group.name, texts, group.image)
        else:
            source.skip(
                IMAGE_WITHOUT_TEXT, group.image, "it has no text, or only empty ones", split
            )


def _offer(name: str, names: Collection[str]) -> str:
    """Says what there is in place of a name that is not, the nearest first."""
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}It has {', '.join(names) or 'none'}"


@dataclass
class _Group:
    """One image, and what its rows say: captions; question, answers and what is kept beside
    them.
    """

    name: str
    image: str
    digest: str | bytes
    captions: list[str] = field(default_factory=list)
    questions: list[tuple[str, tuple[str, ...], dict[str, Any]]] = field(default_factory=list)

    def texts(self, key: str) -> list[Text]:
        texts = [Text(key, "caption", tuple(self.captions))] if self.captions else []
        for number, (question, answers, kept) in enumerate(self.questions):
            meta = {name: value for name, value in kept.items() if name != "question_id"}
            texts.append(
                Text(
                    str(kept.get("question_id", f"{key}-{number}")), "vqa", answers, question, meta
                )
            )
        return texts


class RowImages:
    """Images in the place of `source.Images`: that of each row, from a temporary file, or from
    where its path points.

    `place` is a file or folder, or an id of the hub.
    """

    def __init__(self, place: Path):
        self.place = place
        self._local = place.exists()
        self._folder = place if place.is_dir() else place.parent
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  `close` closes it
        self._named: dict[bytes, str] = {}
        self._digest_of: dict[str, str] = {}
        self._spans: dict[str, tuple[int, int]] = {}

    def add(self, number: int, value: Any) -> tuple[str, str | bytes]:
        """Returns the name to read it by, and what equal images share. ValueError with the reason
        where there is no image.
        """
        path, data = value, None
        if isinstance(value, Mapping):
            path = value.get("path")
            data = value.get("bytes")
        if isinstance(path, bytes):
            path, data = None, path
        if data:
            digest = hashlib.sha256(data).digest()
            if digest not in self._named:
                self._named[digest] = f"row {number}"
                self._digest_of[f"row {number}"] = digest.hex()
                self._spans[f"row {number}"] = (self._file.tell(), len(data))
                self._file.write(data)
            return self._named[digest], digest
        if not path:
            raise ValueError("its image is empty")
        if not isinstance(path, str):
            raise ValueError(f"its image is {value!r:.60}: neither bytes nor a path")
        # A data set of the hub may name no file of this machine, and a local one no server.
        if "://" in path and not self._local and path.rpartition("::")[2].startswith("hf://"):
            return path, path
        file = self._folder / path
        if not self._local or not file.is_file():
            raise ValueError(f"its image {path} is not there")
        return str(file), str(file)

    def complete(self) -> None:
        """Must be called once, after the last `add` and before the first `read`."""
        self._file.flush()

    def stamp(self, name: str) -> str:
        """Returns what another image of this name would not have."""
        if name in self._spans:
            return self._digest_of[name]
        return name if "://" in name else f"{os.stat(name).st_mtime_ns}"

    def read(self, name: str) -> bytes:
        if name in self._spans:
            start, size = self._spans[name]
            return os.pread(self._file.fileno(), size, start)
        if "://" not in name:
            return Path(name).read_bytes()
        import fsspec

        with fsspec.open(name, "rb") as file:
            return file.read()

    def close(self) -> None:
        self._file.close()


def _open(dataset: str, config: str | None, split: str) -> Any:
    """Returns the rows of one split, as a `datasets.IterableDataset` or, of a folder made by
    `save_to_disk`, a `Dataset`.
    """
    import datasets  # from version 4 on it runs no script of a repository, whatever it is told

    place = Path(dataset).expanduser()
    where = f"--dataset {dataset}"
    if place.is_file() and place.suffix not in _FILES:
        raise ShardError(
            f"{where}: a file must be one of {', '.join(_FILES)}; tars: harness shards index"
        )
    if not place.exists() and not _HUB_ID.fullmatch(dataset):
        raise ShardError(
            f"{where}: there is no such file or folder, and an id of the hub is OWNER/NAME"
        )
    try:
        if (place / "dataset_dict.json").is_file() or (place / "state.json").is_file():
            found = datasets.load_from_disk(str(place))
        elif place.is_file():
            found = datasets.load_dataset(
                _FILES[place.suffix], data_files={split: str(place)}, streaming=True
            )
        else:
            if not place.is_dir():
                _without_patience()
            found = datasets.load_dataset(
                str(place.absolute()) if place.is_dir() else dataset, config, streaming=True
            )
    except Exception as error:  # the network, a format, a config: `datasets` raises nearly anything
        what = (
            "cannot be opened"
            if place.exists()
            else "is no file or folder here, and as an id of the hub"
        )
        raise ShardError(f"{where} {what}: {_reason(error)}") from error
    if isinstance(found, datasets.Dataset):
        return found
    if split not in found:
        raise ShardError(f"--split {split}: {where} has no such split; {_offer(split, found)}")
    return found[split]


def _without_patience() -> None:
    """Makes `datasets` look here alone where the hub cannot be reached; by itself it tries for half
    a minute.
    """
    from datasets import config
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_ANSWERS_WITHIN)
    except Exception:  # of any HTTP library
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True


def _undecoded(rows: Any, image_column: str) -> Any:
    """Keeps the image as it was stored: its bytes, not pixels encoded anew."""
    import datasets

    if isinstance((rows.features or {}).get(image_column), datasets.Image):
        return rows.cast_column(image_column, datasets.Image(decode=False))
    return rows


def _numbered(rows: Any, where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    number = -1
    try:
        for number, row in enumerate(rows):
            yield number, row
    except Exception as error:
        raise ShardError(
            f"{where}: what follows row {number} cannot be read: {_reason(error)}"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _strings(value: Any) -> list[Any]:
    """Returns as a list a text, a list of texts, or VQAv2's {"answer": text} of each annotator;
    None is no text. What else there is stays, for the source to name.
    """
    if value is None:
        return []
    if isinstance(value, Mapping) and "answer" in value:
        return _strings(value["answer"])
    if isinstance(value, list | tuple):
        return [text for element in value for text in _strings(element)]
    return [value]
