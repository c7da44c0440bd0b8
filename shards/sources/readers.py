"""The files that hold the texts of a folder of images -> what they say, row by row.

JSONL, CSV, metadata files of Hugging Face, NAME.txt beside NAME.jpg -> ("line 3", fields); JSON of
known sets is read by `annotations`.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.files import ShardError, decode, other_encoding
from shards.record import RecordError, parse_json
from shards.sources.rows import Columns
from shards.sources.source import TEXT_WITHOUT_IMAGE, UNUSABLE_TEXT, Source, read_bytes
from shards.sources.tables import read_table

Fields = tuple[str, Any]  # where they stand, and what stands there

METADATA = ("metadata.csv", "metadata.jsonl")
# A metadata file in such a folder is of that split.
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")


@dataclass(frozen=True)
class Reader:
    """Reads files of rows; a row that is not of its file's form is left out and named."""

    source: Source
    columns: Columns
    separator: str | None  # of tables; None: told by the first line
    encoding: str | None  # None: UTF-8

    def read(self, jsonl: Path | None, csv: Path | None, metadata: bool) -> Iterator[Fields]:
        """Reads the one that is given; without one NAME.txt beside each image."""
        if csv:
            return self.table(read_bytes(csv, "--csv"), f"--csv {csv}")
        if jsonl:
            return self.jsonl(read_bytes(jsonl, "--jsonl"), f"--jsonl {jsonl}")
        return self.metadata() if metadata else self.beside()

    def table(self, data: bytes, what: str) -> Iterator[Fields]:
        def is_image(name: str) -> bool:
            return name != "" and self.source.files.find(name, exact=True) is not None

        text = self._text(data, what)
        yield from read_table(text, what, self.columns, self.separator, self.source, is_image)

    def jsonl(self, data: bytes, what: str) -> Iterator[Fields]:
        if self.encoding or other_encoding(data):  # else each line would be left out, and named
            data = self._text(data, what).encode()
        if data.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            raise ShardError(f"{what} is one JSON list, not an object a line: give it with --json")
        for n, line in enumerate(data.splitlines(), 1):
            if not line.strip():
                continue
            try:
                yield f"line {n}", parse_json(line)
            except RecordError as error:
                self.source.skip(UNUSABLE_TEXT, f"line {n}", str(error), texts=1)

    def metadata(self) -> Iterator[Fields]:
        """Reads every metadata file of the folder; the names in it are relative to it."""
        files = self.source.files
        paths = [path for path in files.others if posixpath.basename(path) in METADATA]
        if not paths:
            raise ShardError(f"--metadata: {files.place} holds no {' or '.join(METADATA)}")
        for path in paths:
            folder = posixpath.dirname(path)
            top = folder.partition("/")[0]
            read = self.table if path.endswith(".csv") else self.jsonl
            for where, fields in read(files.read(path), f"--metadata {path}"):
                if isinstance(fields, dict):
                    column = self.columns.of("image", fields) or "file_name"
                    if fields.get(column) not in (None, ""):
                        fields[column] = posixpath.join(folder, str(fields[column]))
                    if top in _SPLITS and not self.columns.of("split", fields):
                        fields["split"] = top
                yield f"{path}, {where}", fields

    def beside(self) -> Iterator[Fields]:
        """Reads NAME.txt of each NAME.jpg: each of its lines is a caption."""
        files = self.source.files
        texts = {
            posixpath.splitext(path)[0]: path
            for path in files.others
            if path.lower().endswith(".txt")
        }
        images = {posixpath.splitext(path)[0] for path in files.names}
        if not images & texts.keys():
            raise ShardError(
                f"{files.place}: no image has a NAME.txt beside it; say where the texts are with "
                "--jsonl, --csv, --json or --metadata"
            )
        for path in files.names:
            name = texts.get(posixpath.splitext(path)[0])
            if name is None:
                continue
            try:
                lines = self._text(files.read(name), name).splitlines()
            except ShardError as error:
                self.source.skip(UNUSABLE_TEXT, name, str(error), texts=1)
            else:
                captions = [line for line in lines if line.strip()]
                yield name, {"image": path, "captions": captions or [""]}
        for stem in texts.keys() - images:
            self.source.skip(TEXT_WITHOUT_IMAGE, texts[stem], "no image has its name", texts=1)

    def _text(self, data: bytes, what: str) -> str:
        try:
            if self.encoding:
                data = data.decode(self.encoding).encode()
            return decode(data, what)
        except (LookupError, UnicodeError) as error:
            raise ShardError(f"{what} cannot be read as --encoding says: {error}") from error
        except ShardError as error:
            raise ShardError(f"{error}, or name its encoding with --encoding") from error
