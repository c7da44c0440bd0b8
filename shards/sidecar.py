"""Tars -> the sidecar and the index of a set, in one pass over each tar: those just written, and
those made elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shards.files import ShardError, UnreachableError, file_info, write_whole
from shards.layout import Layout, what_would_help
from shards.manifest import (
    INDEX,
    MAX_KEY_BYTES,
    SIDECAR,
    SIDECAR_1,
    Kind,
    Manifest,
    Rows,
    ShardInfo,
    sidecar_dtype,
)
from shards.read import Parsed, parse_sample
from shards.record import RecordError
from shards.tar import Group, Member, groups, open_shard

Progress = Callable[[int], None]  # called with the number of samples done since the last call
# So many samples at the beginning of which none is understood: the rest will be like them.
NOT_UNDERSTOOD = 1_000


class Indexing:
    """The rows and entries of the tars that were added so far, some 200 bytes a sample: a key may
    occur but once, so all are kept.
    """

    def __init__(
        self,
        kind: Kind,
        dataset: str,
        split: str,
        on_progress: Progress = lambda samples: None,
        layout: Layout | None = None,
        is_rest: bool = False,
    ):
        """`is_rest`: of a set whose beginning was understood: what is not costs itself alone."""
        self._described: dict[str, Any] = {
            "kind": kind,
            "dataset": dataset,
            "split": split,
            "layout": layout,
        }
        self._layout = layout
        self._on_progress = on_progress
        self._is_rest = is_rest
        self.shards: list[ShardInfo] = []
        self.skipped: list[dict[str, Any]] = []  # what is no sample, with its place and the reason
        self.first: Group | None = None  # what was left out first though its files are sound
        self._seen: dict[str, int] = {}  # keys, with the offset where they came
        self._keys: list[bytes] = []
        self._rows = bytearray()

    def add(self, location: str) -> None:
        """Adds a tar. Raises ShardError for a damaged one and for a key that occurs again."""
        name = location.rpartition("/")[2]
        before = len(self._keys)
        texts = 0
        with open_shard(location) as (read, size):
            try:
                on_stray = partial(self._leave_out, name, "a file that a Mac adds to archives")
                for group in groups(read, size, on_stray=on_stray):
                    texts += self._add_sample(group, name)
                    if not self.is_understood and len(self.skipped) >= NOT_UNDERSTOOD:
                        raise ShardError(self.nothing_found())
            except UnreachableError:  # which names it
                raise
            except ShardError as error:
                raise ShardError(f"{location}: {error}") from error
            samples = len(self._keys) - before
            self.shards.append(ShardInfo(name, *read.finish(), samples, texts))

    @property
    def is_understood(self) -> bool:
        """Whether a sample was."""
        return self._is_rest or bool(self._keys)

    def part(self) -> bytes:
        """Returns all that was added of one tar, for another's `take`."""
        (shard,) = self.shards
        document = {
            "shard": asdict(shard),
            "seen": self._seen,
            "keys": [key.decode() for key in self._keys],
            "skipped": self.skipped,
        }
        return json.dumps(document).encode() + b"\n" + self._rows

    def take(self, part: bytes, location: str) -> None:
        """Adds a tar as `add` does, from what another found in it. Raises ShardError for a key that
        occurs again.
        """
        end_of_line = part.index(b"\n")
        document = json.loads(part[:end_of_line])
        for key, offset in document["seen"].items():
            try:
                self._must_be_new(key, offset)
            except ShardError as error:
                raise ShardError(f"{location}: {error}") from error
        self.shards.append(ShardInfo(**document["shard"]))
        self._keys += [key.encode() for key in document["keys"]]
        self.skipped += document["skipped"]
        self._rows += part[end_of_line + 1 :]
        self._on_progress(len(document["keys"]))

    def _add_sample(self, group: Group, shard: str) -> int:
        """Returns how many texts it has; 0 if it is left out."""
        self._must_be_new(group.key, group.start)
        key = group.key.encode()
        try:
            if group.problem:
                raise ShardError(group.problem)
            if len(key) > MAX_KEY_BYTES:
                raise ShardError(f"its key has {len(key)} bytes, at most {MAX_KEY_BYTES} can be")
            files = self._layout.applied(group) if self._layout else group
            parsed = parse_sample(group.key, files.contents, **self._described)
        except (ShardError, RecordError) as error:
            if not group.problem:
                self.first = self.first or group
            self._leave_out(shard, str(error), group)
            return 0
        if parsed.record.key != group.key:
            self._must_be_new(parsed.record.key, group.start)
        self._keys.append(key)
        self._rows += np.array((*row_of(files, parsed), b""), _ONE).tobytes()
        self._on_progress(1)
        return len(parsed.record.texts)

    def nothing_found(self) -> str:
        """Says why no sample was understood so far, and which options would help."""
        if not self.skipped:
            return "it holds no samples"
        why = "no sample with image and text: {shard}, {key}: {reason}".format(**self.skipped[0])
        return f"{why}; {what_would_help(self.first.contents)}" if self.first else why

    def _leave_out(self, shard: str, reason: str, what: Group | Member) -> None:
        where = {"shard": shard, "offset": what.start, "key": what.key}
        self.skipped.append({**where, "reason": reason})

    def _must_be_new(self, key: str, offset: int) -> None:
        if key in self._seen:
            raise ShardError(
                f"the key {key!r} occurs again at offset {offset}: keys must be unique, "
                "the files of a sample adjacent"
            )
        self._seen[key] = offset

    def finish(self, folder: Path, **further: Any) -> Manifest:
        """Writes the sidecar; the set is complete with `write_index`."""
        width = max(map(len, self._keys))
        rows = np.empty(len(self._keys), sidecar_dtype(width))
        rows[:] = np.frombuffer(self._rows, _ONE).astype(rows.dtype)
        rows["key"] = self._keys
        rows_1 = np.empty(len(rows), sidecar_dtype(width, 1))
        for name in rows_1.dtype.names or ():
            rows_1[name] = rows[name]
        manifest = Manifest(
            str(folder),
            shards=tuple(self.shards),
            sidecar_file=write_whole(folder / SIDECAR, rows.tobytes()),
            key_bytes=width,
            skipped=len(self.skipped),
            unanswered=int((rows["targets"] == 0).sum()),
            without_picture=int((rows["payload_extension"] == b"").sum()),
            **self._described,
            **further,
        )
        manifest = replace(manifest, rows_sha256=hashes_by_shard(rows, self.shards))
        info_1 = file_info(SIDECAR_1, rows_1.tobytes())
        return manifest.with_format_1_digest(info_1)


_ONE = sidecar_dtype(1)  # keys are filled in when the longest is known


def hashes_by_shard(rows: np.ndarray | Rows, shards: Sequence[ShardInfo]) -> tuple[str, ...]:
    """Returns the sha256 of each shard's rows of the sidecar."""
    starts = np.cumsum([0] + [shard.samples for shard in shards]).tolist()
    parts = (rows[first:after].tobytes() for first, after in pairwise(starts))
    return tuple(hashlib.sha256(part).hexdigest() for part in parts)


def row_of(group: Group, parsed: Parsed) -> tuple[int | bytes, ...]:
    """Returns the sidecar's columns of one sample, but for its key (see `manifest`)."""
    record, payload, text = parsed
    places: list[int] = []
    crc = 0
    for name in (payload, text):
        member = group.members.get(name)  # of a record without a picture: no payload
        places += (member.offset, member.size) if member else (0, 0)
        crc = zlib.crc32(group.contents.get(name, b""), crc)
    figures = (len(record.texts), record.targets, record.characters, group.crc)
    names = (payload.encode(), text.encode())
    return (group.start, group.end - group.start, *figures, *places, crc, *names)


def write_index(manifest: Manifest, folder: Path) -> None:
    """Writes `index.json`: from then on the folder is a set. What format 1 left there goes."""
    text = json.dumps(manifest.document(), indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / INDEX, text.encode())
    (folder / SIDECAR_1).unlink(missing_ok=True)
