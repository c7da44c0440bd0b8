"""What a set of shards holds: `index.json` (the shards, their sizes and hashes) and its sidecar
`samples.bin`.

A folder or fsspec URL -> Manifest. The sidecar stays a file, one row a sample in shard order, so
that a set of any size is opened in little memory. Its columns: offset and size (bytes of the
sample in its tar, first header to last byte), texts, targets, characters, crc (zlib.crc32 over the
contents of its members in tar order); of payload and text (record or caption) offset and size of
the content, their extensions, and members_crc (payload, then text); key. A record without a picture
has 0 and "" for its payload. Format 1 (`index.bin`) has no columns of members: there a sample's
headers are walked.
"""

from __future__ import annotations

import builtins
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from shards.files import FileInfo, ShardError, UnreachableError, is_count, is_remote, join
from shards.layout import Layout
from shards.remote import Descriptor, Patience, Stream, fetch

if TYPE_CHECKING:
    from shards.cache import Cache

Kind = Literal["images", "features"]
FORMAT = 2
INDEX = "index.json"
SIDECAR = "samples.bin"
SIDECAR_1 = (
    "index.bin"  # of format 1: another name, so that a set is whole at any moment of an upgrade
)
SKIPPED = "skipped.jsonl"
STATISTICS = "statistics.bin"
MAX_KEY_BYTES = 255
_WINDOW = 4 << 20  # bytes of the sidecar that are read at a time
# Of a longer sidecar each shard's rows are fetched and checked when the first of them is read.
CHECKED_AT_ONCE = 64 << 20
_OPEN_BLOCKS = 32  # of a remote sidecar, a file each
# (path, inode, bytes, time of change) -> sha256: a process opens a set several times
_HASHED: dict[tuple[str, int, int, int], str] = {}
_FIGURES = [
    *((name, "<u8") for name in ("offset", "size")),
    *((name, "<u4") for name in ("texts", "targets", "characters", "crc")),
]
_MEMBERS = [
    *((name, "<u8") for name in ("payload_offset", "payload_size", "text_offset", "text_size")),
    ("members_crc", "<u4"),
    ("payload_extension", "S11"),
    ("text_extension", "S4"),
]


def sidecar_dtype(key_bytes: int, form: int = FORMAT) -> np.dtype:
    members = [] if form == 1 else _MEMBERS
    return np.dtype([*_FIGURES, *members, ("key", f"S{key_bytes}")])


@dataclass(frozen=True)
class ShardInfo(FileInfo):
    """One tar: what it holds."""

    samples: int
    texts: int


@dataclass(frozen=True)
class StatisticsInfo(FileInfo):
    """The file with the statistics of each sample's picture: little-endian float32, a row a sample
    in their order, with these columns.
    """

    columns: tuple[str, ...]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype([("row", "<f4", (len(self.columns),))])


@dataclass(frozen=True)
class Manifest:
    """A set of shards as its index describes it. Picklable: a worker process opens the sidecar
    anew.
    """

    folder: str  # where the index lies: a path or an fsspec URL
    kind: Kind
    dataset: str
    split: str
    shards: tuple[ShardInfo, ...]
    sidecar_file: FileInfo
    key_bytes: int  # width of the sidecar's key field
    encoder: dict[str, Any] | None = None  # of a feature set: what made it
    files: tuple[FileInfo, ...] = ()
    base: str | None = None  # where the shards lie if not beside the index
    skipped: int = 0  # samples in the tars that are left out, each named in skipped.jsonl
    format: int = FORMAT
    format_1_digest: str | None = None  # what states of runs before format 2 call this set
    layout: Layout | None = None  # of shards of other makers: what was said of their files
    unanswered: int = 0  # records whose questions have no answers
    without_picture: int = 0  # records of texts alone
    # Outside the digest, which says what the samples are:
    # sha256 of each shard's rows of the sidecar; () in an index made before there were any
    rows_sha256: tuple[str, ...] = field(default=(), repr=False)
    statistics_file: StatisticsInfo | None = None  # None: of a set that stores none
    origin: str | None = None  # of a feature set: where the pictures lay that it was made from
    origin_relative: str | None = None  # the same from the set's own folder: both may be moved
    origin_digest: str | None = None  # of that set
    cache: Cache | None = field(default=None, repr=False, compare=False)
    patience: Patience = field(default=Patience(), repr=False, compare=False)

    @classmethod
    def open(
        cls,
        path_or_url: str | os.PathLike,
        cache: Cache | None = None,
        patience: Patience | None = None,
    ) -> Manifest:
        """Reads the index and checks the sidecar's hash and the size of every local file it names.

        The sidecar of a remote set is fetched into `cache`, or into a temporary file without one.
        Of one above 64 MiB, whose index says the hash of each shard's rows, these are checked (and
        fetched) when the first of them is read.
        `patience` is the cache's where it is not given. Raises ShardError for a folder that is
        missing, has no index, or does not match it. The shards' own hashes are for `verify` to
        check.
        """
        manifest = cls.read_index(path_or_url, cache, patience)
        if problems := manifest.file_problems():
            more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
            raise ShardError(problems[0] + more)
        _ = manifest.sidecar
        return manifest

    @classmethod
    def read_index(
        cls,
        path_or_url: str | os.PathLike,
        cache: Cache | None = None,
        patience: Patience | None = None,
    ) -> Manifest:
        """Reads `index.json` alone. Raises ShardError if it is missing, malformed or was changed by
        hand.
        """
        folder = os.fspath(path_or_url).removeprefix("file://")
        where = join(folder, INDEX)
        patience = patience or (cache.patience if cache else Patience())
        document = _document(folder, patience)
        try:
            manifest = cls(
                folder=folder,
                shards=tuple(_info(ShardInfo, shard) for shard in document["shards"]),
                sidecar_file=_info(FileInfo, document["sidecar"]),
                files=tuple(_info(FileInfo, file) for file in document["files"]),
                statistics_file=_statistics_info(document.get("statistics")),
                origin=document.get("origin"),
                origin_relative=document.get("origin_relative"),
                origin_digest=document.get("origin_digest"),
                cache=cache,
                patience=patience,
                format_1_digest=document.get("format_1_digest"),
                layout=Layout.from_json(document.get("layout")),
                rows_sha256=tuple(document.get("rows_sha256", ())),
                **{name: document.get(name, 0) for name in _COUNTS},
                **{name: document[name] for name in _PLAIN},
            )
            manifest._check_types()
            digest = document["digest"]
            expected = manifest.digest
            if manifest.format == 1:
                manifest = manifest.with_format_1_digest(manifest.sidecar_file)
                expected = manifest.format_1_digest or ""
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise ShardError(
                f"{where} is not a complete index: {error!r}; build or index the set again"
            ) from error
        if digest != expected:
            raise ShardError(
                f"{where} says digest {digest}, its content gives {expected}: "
                "it was changed by hand"
            )
        return manifest

    def _check_types(self) -> None:
        """Raises ValueError for a field that holds something else than an index does."""
        texts = (self.kind, self.dataset, self.split, self.base or "", self.format_1_digest or "")
        if not all(type(text) is str for text in texts) or self.kind not in ("images", "features"):
            raise ValueError("kind, dataset, split, base or format_1_digest is no text")
        if not all(type(getattr(self, name) or "") is str for name in _ORIGIN):
            raise ValueError(f"one of {', '.join(_ORIGIN)} is no text")
        if not isinstance(self.encoder, dict | None):
            raise ValueError("encoder is no mapping")
        counts = ("skipped", "key_bytes", *_COUNTS)
        if odd := [name for name in counts if not is_count(getattr(self, name))]:
            raise ValueError(f"{odd[0]} is no count")
        if not 1 <= self.key_bytes <= MAX_KEY_BYTES or "\0" in (self.base or ""):
            raise ValueError("key_bytes is not between 1 and 255, or base is no place")
        if len(self.rows_sha256) not in (0, len(self.shards)) or not all(
            type(text) is str for text in self.rows_sha256
        ):
            raise ValueError("rows_sha256 is no list of texts, one a shard")
        if "\0" in (self.origin or "") + (self.origin_relative or ""):
            raise ValueError("origin is no place")

    def check_texts(self) -> None:
        """Raises ShardError for a set whose records hold no text at all: nothing can be learnt."""
        if not self.texts:
            raise ShardError(
                f"{self.folder}: none of its {self.samples} records has a text: build or index the "
                "set again, with captions or questions"
            )

    def check_lanes(self, lanes: int) -> None:
        """Raises ShardError for a set that cannot give each lane a sample."""
        if self.samples < lanes:
            raise ShardError(
                f"{self.folder}: the set has {self.samples} samples, too few for {lanes} lanes: "
                "take fewer lanes (data.lanes)"
            )

    def check_answered(self) -> None:
        """Raises ShardError for a set with questions that nobody answered: what is learnt from them
        or scored on them would be made up.
        """
        if self.unanswered:
            raise ShardError(
                f"{self.folder}: {self.unanswered} of its {self.samples} records are questions "
                "without answers, from which nothing can be learnt and on which nothing can be "
                f"scored; `harness predict RUN --images {self.folder} --out FILE` answers them"
            )

    def file_problems(self) -> list[str]:
        """Returns a sentence for each local file that is missing or has another size than the index
        says.
        """
        problems = []
        for place, infos in (
            (self.base or self.folder, self.shards),
            (self.folder, (*self._beside, *self.files)),
        ):
            if is_remote(place):
                continue
            for info in infos:
                path = Path(place, info.name)
                if not path.is_file():
                    problems.append(f"{path} is missing: {join(self.folder, INDEX)} names it")
                elif (found := path.stat().st_size) != info.bytes:
                    problems.append(
                        f"{path} has {found} bytes, expected {info.bytes}: it is not the indexed "
                        "file"
                    )
        return problems

    @property
    def _beside(self) -> tuple[FileInfo, ...]:
        """Returns what describes the samples, beside the index."""
        return tuple(filter(None, (self.sidecar_file, self.statistics_file)))

    @property
    def described(self) -> dict[str, Any]:
        """Returns the arguments by which `parse_sample` reads a sample of this set."""
        return {name: getattr(self, name) for name in ("kind", "dataset", "split", "layout")}

    def _content(self) -> dict[str, Any]:
        # Another layout is another set: the same bytes give other texts.
        laid_out = {"layout": self.layout.to_json()} if self.layout else {}
        return {
            **laid_out,
            **{name: getattr(self, name) for name in ("kind", "dataset", "split", "encoder")},
            "shards": [asdict(shard) for shard in self.shards],
            "files": [asdict(file) for file in self.files],
        }

    def document(self) -> dict[str, Any]:
        """Returns the content of `index.json`."""
        return {
            **self._content(),
            "sidecar": asdict(self.sidecar_file),
            **{name: getattr(self, name) for name in _PLAIN},
            "digest": self.digest,
            "format_1_digest": self.format_1_digest,
            "rows_sha256": list(self.rows_sha256),
            "statistics": self.statistics_file and asdict(self.statistics_file),
            **{name: getattr(self, name) for name in _ORIGIN},
            **{name: count for name in _COUNTS if (count := getattr(self, name))},
        }

    @cached_property
    def digest(self) -> str:
        """Returns the sha256 over what the tars hold and their order, wherever they lie and
        whatever the format of their index: equal digests mean equal samples in equal order.
        """
        return _digest(self._content())

    def with_format_1_digest(self, sidecar: FileInfo) -> Manifest:
        """Completes it by the digest that format 1 gave this set, over its `sidecar` too."""
        content = {"format": 1, **self._content(), "sidecar": asdict(sidecar)}
        return replace(self, format_1_digest=_digest(content))

    @property
    def samples(self) -> int:
        return int(self.starts[-1])

    @property
    def has_pictures(self) -> bool:
        """Tells whether any of its records has a picture; one of texts alone goes with sets of
        images and of features alike.
        """
        return self.without_picture < self.samples

    @property
    def texts(self) -> int:
        return sum(shard.texts for shard in self.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.shards)

    @cached_property
    def starts(self) -> np.ndarray:
        """Returns int64, one more than shards: the first sample of each shard, and the number of
        samples.
        """
        return np.cumsum([0] + [shard.samples for shard in self.shards], dtype=np.int64)

    def location(self, shard: int) -> str:
        """Returns the path or URL of a shard."""
        return join(self.base or self.folder, self.shards[shard].name)

    @cached_property
    def sidecar(self) -> Rows:
        """Returns a row for each sample (see the module). Raises ShardError if it is that of
        another set.
        """
        dtype = sidecar_dtype(self.key_bytes, self.format)
        if not self.is_checked_by_shard:
            return self._rows(self.sidecar_file, dtype)
        where = self._must_have_rows(self.sidecar_file, dtype)
        if not is_remote(self.folder):
            file = Descriptor.open(where, self.patience)
            return Rows(dtype, self.starts, lambda shard: self._checked(shard, file, dtype))
        return Rows(
            dtype, self.starts, lambda shard: self._fetched(shard, where, dtype), _OPEN_BLOCKS
        )

    @property
    def is_checked_by_shard(self) -> bool:
        """Whether the sidecar is too long to be read whole when the set is opened."""
        has_place = self.cache is not None or not is_remote(self.folder)
        is_long = self.sidecar_file.bytes > CHECKED_AT_ONCE
        return bool(self.rows_sha256) and is_long and has_place

    def _checked(self, shard: int, file: Descriptor, dtype: np.dtype) -> tuple[Descriptor, int]:
        first = int(self.starts[shard]) * dtype.itemsize
        data = file.read(self.shards[shard].samples * dtype.itemsize, first)
        found = hashlib.sha256(data).hexdigest()
        if found != self.rows_sha256[shard]:
            raise UnreachableError(
                f"{file.path}: the rows of {self.shards[shard].name} have sha256 {found}, expected "
                f"{self.rows_sha256[shard]}: it is damaged, or of another set"
            )
        return file, first

    def _fetched(self, shard: int, where: str, dtype: np.dtype) -> tuple[Descriptor, int]:
        assert self.cache is not None  # or they would not be checked by shard
        size = self.shards[shard].samples * dtype.itemsize
        name = self.rows_sha256[shard]
        first = int(self.starts[shard]) * dtype.itemsize
        number = self.cache.open(where, size, name, first)
        return Descriptor(number, str(self.cache.folder / name), self.patience), 0

    def bytes_held(self, shard: int) -> int:
        """Returns the bytes that a cache holds of a shard and, where they come apart, its rows."""
        width = sidecar_dtype(self.key_bytes, self.format).itemsize
        info = self.shards[shard]
        return info.bytes + (width * info.samples if self.is_checked_by_shard else 0)

    @cached_property
    def statistics(self) -> Rows:
        """Returns a row for each sample, with `statistics_file.columns` in its one field "row".

        Raises ShardError where the set stores none, and where they are those of another set.
        """
        if self.statistics_file is None:
            raise ShardError(f"{join(self.folder, INDEX)} names no statistics of its samples")
        return self._rows(self.statistics_file, self.statistics_file.dtype)

    def _rows(self, info: FileInfo, dtype: np.dtype) -> Rows:
        """Opens a file of one row a sample, whose hash is checked first."""
        where = self._must_have_rows(info, dtype)
        if not is_remote(self.folder):
            file = Descriptor.open(where, self.patience)
        elif self.cache is not None:  # which checks the hash itself
            number = self.cache.open(where, info.bytes, info.sha256)
            kept = Descriptor(number, str(self.cache.folder / info.sha256), self.patience)
            return Rows.of_file(kept, dtype, self.samples)
        else:
            file = _copied(where, self.patience)
        _check_hash(where, _sha256(file, info.bytes), info)
        return Rows.of_file(file, dtype, self.samples)

    def _must_have_rows(self, info: FileInfo, dtype: np.dtype) -> str:
        """Returns where a file of one row a sample lies."""
        where = join(self.folder, info.name)
        if info.bytes != self.samples * dtype.itemsize:
            raise ShardError(
                f"{where} has {info.bytes} bytes, expected {self.samples} rows of {dtype.itemsize}"
            )
        return where

    def key(self, index: int) -> str:
        return self.sidecar[index]["key"].decode(errors="replace")

    def read_file(self, name: str) -> builtins.bytes:
        """Returns a small file of the set (`controls.safetensors`), whole. Raises ShardError if it
        is missing or damaged.
        """
        where = join(self.folder, name)
        info = next((file for file in (*self.files, *self._beside) if file.name == name), None)
        if info is None:
            raise ShardError(f"{join(self.folder, INDEX)} names no file {name}")
        try:
            data = fetch(where, self.patience)
        except FileNotFoundError as error:
            raise ShardError(f"{where} cannot be read: it does not exist") from error
        _check_hash(where, hashlib.sha256(data).hexdigest(), info)
        return data

    def __getstate__(self) -> dict[str, Any]:
        # An open file does not travel.
        opened = ("sidecar", "statistics")
        return {name: value for name, value in self.__dict__.items() if name not in opened}


class Rows:
    """The rows of a sidecar, read where they are asked for and never mapped: a file that was cut
    short meanwhile is an error then, and no SIGBUS.
    """

    def __init__(
        self,
        dtype: np.dtype,
        starts: np.ndarray,
        open_block: Callable[[int], tuple[Descriptor, int]],
        max_open: int | None = None,
    ):
        """Takes the first row of each block and how many rows there are; `open_block` gives the
        file of a block and the place of its first byte there, once the block is known to be right.
        """
        self.dtype = dtype
        self._starts = starts
        self._count = int(starts[-1])
        self._open_block = open_block
        self._max_open = max_open
        self._opened: dict[int, tuple[Descriptor, int]] = {}  # the earliest first

    @classmethod
    def of_file(cls, file: Descriptor, dtype: np.dtype, count: int) -> Rows:
        """Returns those of a file that was checked whole."""
        return cls(dtype, np.array([0, count]), lambda _: (file, 0))

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> np.void: ...
    @overload
    def __getitem__(self, index: slice | str) -> np.ndarray: ...
    def __getitem__(self, index: int | slice | str) -> np.void | np.ndarray:
        """Returns a row, the rows [start, stop), or a column of all rows.

        Raises UnreachableError where the file has become shorter: no sample is to blame for that.
        """
        if isinstance(index, str):
            return self._column(index)
        if isinstance(index, slice):
            start, stop, _ = index.indices(self._count)
            return self._read(start, max(0, stop - start))
        return self._read(range(self._count)[index], 1)[0]

    def _read(self, start: int, count: int) -> np.ndarray:
        width = self.dtype.itemsize
        parts = [b""]
        while count:
            block = int(self._starts.searchsorted(start, side="right")) - 1
            first = int(self._starts[block])
            here = min(count, int(self._starts[block + 1]) - start)
            parts.append(self._of_block(block, here * width, (start - first) * width))
            start += here
            count -= here
        return np.frombuffer(b"".join(parts), self.dtype)

    def _of_block(self, block: int, size: int, offset: int) -> bytes:
        opened = self._opened.get(block)
        if opened is None:
            if self._max_open:  # a list, since several threads may be here
                for earlier in list(self._opened)[: 1 - self._max_open]:
                    self._opened.pop(earlier, None)
            opened = self._open_block(block)
            self._opened[block] = opened
        file, first = opened
        try:
            return file.read(size, first + offset)
        except UnreachableError:
            raise
        except ShardError as error:
            raise UnreachableError(
                f"{file.path} was changed while it was in use: {error}"
            ) from error

    def _column(self, name: str) -> np.ndarray:
        column = np.empty(self._count, self.dtype[name])
        step = max(1, _WINDOW // self.dtype.itemsize)
        for start in range(0, self._count, step):
            column[start : start + step] = self[start : start + step][name]
        return column


_ORIGIN = ("origin", "origin_relative", "origin_digest")
_COUNTS = ("unanswered", "without_picture")  # in the index where there are some
_PLAIN = ("format", "kind", "dataset", "split", "key_bytes", "encoder", "base", "skipped")


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _document(folder: str, patience: Patience) -> dict[str, Any]:
    where = join(folder, INDEX)
    try:
        data = fetch(where, patience)
    except FileNotFoundError as error:
        raise ShardError(_no_index(folder)) from error
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ShardError(f"{where} cannot be read as JSON: {error}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found not in (1, FORMAT):
        raise ShardError(
            f"{where} has format {found!r}, expected 1 or {FORMAT}: build the set again"
        )
    return document


def _sha256(file: Descriptor, size: int) -> str:
    """Returns the hash of a file's bytes, read once in a process while the file stays as it is."""
    stat = os.fstat(file.number)
    key = (file.path, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    if key not in _HASHED:
        digest = hashlib.sha256()
        for start in range(0, size, _WINDOW):
            digest.update(file.read(min(_WINDOW, size - start), start))
        _HASHED[key] = digest.hexdigest()
    return _HASHED[key]


def _copied(location: str, patience: Patience) -> Descriptor:
    """Returns a remote file as a temporary one, which has no name and goes with its descriptor."""
    try:
        with Stream(location, patience) as stream, tempfile.TemporaryFile() as file:
            shutil.copyfileobj(stream, file, _WINDOW)
            file.flush()
            return Descriptor(os.dup(file.fileno()), location, patience)
    except FileNotFoundError as error:
        raise ShardError(f"{location} cannot be read: it does not exist") from error


def _check_hash(where: str, found: str, info: FileInfo) -> None:
    if found != info.sha256:
        raise ShardError(
            f"{where} has sha256 {found}, expected {info.sha256}: it is damaged, or of another set"
        )


def _info(cls: type, entry: Mapping[str, Any]) -> Any:
    info = cls(**entry)
    for item in fields(cls):
        value = getattr(info, item.name)
        if item.type == "int" and not is_count(value):
            raise ValueError(f"{item.name} is {value!r}, not a count")
        if item.type == "str" and type(value) is not str:
            raise ValueError(f"{item.name} is {value!r}, not a string")
    if "/" in info.name or "\0" in info.name or info.name in ("", ".", ".."):
        raise ValueError(f"the file name {info.name!r} leads out of the folder")
    return info


def _statistics_info(entry: Any) -> StatisticsInfo | None:
    if entry is None:
        return None
    columns = entry["columns"]
    if not isinstance(columns, list) or not all(type(column) is str for column in columns):
        raise ValueError(f"the columns of the statistics are {columns!r:.60}, not a list of names")
    return _info(StatisticsInfo, {**entry, "columns": tuple(columns)})


def splits_in(folder: str | os.PathLike) -> list[str]:
    """Returns the names of the sets that lie in a folder of splits."""
    return sorted(index.parent.name for index in Path(folder).glob(f"*/{INDEX}"))


def _no_index(folder: str) -> str:
    """Says why a folder without an index cannot be opened, and what to do."""
    if is_remote(folder):
        where = join(folder, INDEX)
        return f"{where} does not exist: index the shards there with `harness shards index`"
    path = Path(folder)
    if not path.is_dir():
        replaced = path.absolute().with_name(f".{path.name}.replaced")
        if replaced.is_dir():
            return (
                f"{folder} was being replaced when its process was killed: the old set lies at "
                f"{replaced}; run the same command again, or move it back"
            )
        return f"there is no folder of shards at {folder}: build one with `harness shards build`"
    if splits := splits_in(path):
        first = join(folder, splits[0])
        return f"{folder} holds the splits {', '.join(splits)}: name one of them, as in {first}"
    if any(path.glob("*.tar")):
        return f"{folder} holds tars and no {INDEX}: make one with `harness shards index {folder}`"
    return f"{folder} holds no shards (no {INDEX}): build them with `harness shards build`"
