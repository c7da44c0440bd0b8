"""What the ranks of a run share before and between steps: rank 0's checkpoint, one config, the same
data, one list of what could not be read.

The output folder need not be one that every rank sees: rank 0 alone reads and writes it, and sends
the others what they lack. What is sent is bytes and JSON, never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import distributed

from harness import __version__
from harness import checkpoint as checkpoints
from harness.checkpoint import FILES, Checkpoint
from harness.config.keys import flatten
from harness.config.schema import Config
from harness.errors import ConfigError, explain
from harness.train.engine import Engine
from shards.loader import Loader

CHUNK = 2**26  # bytes of a file that are sent at a time
NAMED = 3  # differences that are told of
# Where a run writes and reports to is rank 0's alone.
MAY_DIFFER = ("out", "tracking.")


def sent_by(source: int, data: bytes, engine: Engine) -> bytes:
    """Returns on every rank the bytes that rank `source` has given."""
    if engine.world_size == 1:
        return data
    size = torch.tensor([len(data)], device=engine.device)
    with engine.heart.waiting():
        distributed.broadcast(size, source)
    sent = torch.zeros(int(size), dtype=torch.uint8)
    if engine.rank == source and data:
        sent = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    sent = sent.to(engine.device)
    with engine.heart.waiting():
        distributed.broadcast(sent, source)
    return sent.cpu().numpy().tobytes()


def gathered(value: Any, engine: Engine) -> list[Any]:
    """Returns the JSON values that the ranks have given, by rank, on every rank."""
    data = json.dumps(value).encode()
    return [json.loads(sent_by(rank, data, engine)) for rank in range(engine.world_size)]


def by_rank_0(make: Callable[[], Any], engine: Engine) -> Any:
    """Returns on every rank the JSON value that `make` gives on rank 0, where alone it is called.

    Raises what `make` raises, on the other ranks ConfigError with the same sentence.
    """
    if engine.world_size == 1:
        return make()
    error: Exception | None = None
    sent: dict[str, Any] = {}
    if engine.is_main:
        try:
            sent = {"value": make()}
        except Exception as raised:
            error = raised
            sent = {"error": explain(raised) or repr(raised)}
    came = json.loads(sent_by(0, json.dumps(sent).encode(), engine))
    if error is not None:
        raise error
    if "error" in came:
        raise ConfigError(came["error"])
    return came["value"]


@contextmanager
def checkpoint_of_rank_0(
    find: Callable[[], Checkpoint | None], engine: Engine
) -> Iterator[Checkpoint | None]:
    """Yields on every rank the checkpoint that `find` finds on rank 0, to be read inside.

    A rank that does not see it where rank 0 does gets a copy in a temporary folder.
    """
    found: list[Checkpoint | None] = []  # rank 0's own

    def described() -> Any:
        found.append(find())
        return found[0] and [str(found[0].path), found[0].state, found[0].digest]

    about = by_rank_0(described, engine)
    if engine.is_main or about is None:
        here = found[0] if found else None
        if here is not None and any(gathered(False, engine)):
            _send(here.path, engine)
        yield here
        return
    path, state, digest = about
    seen = Checkpoint(Path(path), state)
    lacks = not (seen.path / FILES).is_file() or seen.digest != digest
    lacks = lacks or checkpoints.problems(seen.path) is not None
    if not any(gathered(lacks, engine)):
        yield seen
        return
    with TemporaryDirectory(prefix="harness-checkpoint-") as folder:
        _receive(Path(folder) if lacks else None, engine)
        yield Checkpoint(Path(folder), state) if lacks else seen


def _send(folder: Path, engine: Engine) -> None:
    """Sends all files of a folder: their names and sizes, then their bytes."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    listed = [[path.relative_to(folder).as_posix(), path.stat().st_size] for path in files]
    sent_by(0, json.dumps(listed).encode(), engine)
    for path in files:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK):
                sent_by(0, chunk, engine)


def _receive(folder: Path | None, engine: Engine) -> None:
    """Takes part in `_send`, and writes what comes into the folder; None: it is not needed."""
    for name, size in json.loads(sent_by(0, b"", engine)):
        chunks = (sent_by(0, b"", engine) for _ in range(0, size, CHUNK))
        if folder is None:
            for _ in chunks:
                pass
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.writelines(chunks)


def check_alike(config: Config, loader: Loader, engine: Engine) -> None:
    """Raises ConfigError on every rank where some rank has another config, other data or another
    harness than rank 0.
    """
    facts = {k: v for k, v in flatten(config).items() if not k.startswith(MAY_DIFFER)}
    for position, manifest in enumerate(loader.manifests):
        facts[f"the digest of data.train.{position}"] = manifest.digest
    facts["the version of harness"] = __version__
    told = gathered(facts, engine)
    found = [
        difference
        for rank, theirs in enumerate(told)
        for difference in differences(told[0], theirs, rank)
    ]
    if found:
        more = f", and {len(found) - NAMED} more differ" if len(found) > NAMED else ""
        raise ConfigError(
            f"the ranks of this run do not agree: {'; '.join(found[:NAMED])}{more}. Start all of "
            "them with the same command, and give every machine the same files"
        )


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], rank: int) -> list[str]:
    """Returns a sentence for each fact of rank 0 that is another one on `rank`."""
    return [
        f"{key} is {ours.get(key)!r} on rank 0 and {theirs.get(key)!r} on rank {rank}"
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key) != theirs.get(key)
    ]


class SharedQuarantine:
    """What the ranks could not read, written down by rank 0 for all of them."""

    def __init__(self, loader: Loader, engine: Engine) -> None:
        self.loader = loader
        self.engine = engine
        self._sent = 0  # of this rank's
        self._total = 0.0

    def share(self, total: float) -> None:
        """Sends what is new, where `total`, the count over all ranks, has grown."""
        if self.engine.world_size == 1 or total == self._total:
            return
        self._total = total
        named = list(self.loader.quarantined.items())
        new = [[*place, error] for place, error in named[self._sent :]]
        self._sent = len(named)
        for rank, entries in enumerate(gathered(new, self.engine)):
            for entry in entries if rank and self.engine.is_main else ():
                self.loader.write_down(*entry)
