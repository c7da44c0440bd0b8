"""Checkpoints off the machine (`train.copy_to`): each whole one is copied from a thread, verified.

Spot nodes and Colab lose their disk. At the target as in OUT: checkpoints/step-N, best.json, the
journal and the run's id. A target that is slow or does not answer delays nothing and is told.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import fsspec

from harness import checkpoint as checkpoints
from harness.errors import ConfigError, install_command
from harness.tracking.journal import METRICS, RUN_ID
from shards import quarantine

SMALL = (METRICS, RUN_ID, quarantine.FILE, f"{checkpoints.FOLDER}/{checkpoints.BEST}")
RETRY_SECONDS = 30.0
EXTRAS = {"s3": "s3", "gs": "gcs", "gcs": "gcs"}


class Copies:
    """The thread that copies. Only the newest checkpoint waits for it: older ones are passed over.

    `keep`: so many of the newest stay at the target, and the best.
    """

    def __init__(
        self, out: Path, target: str, keep: int, wait: float, say: Callable[[str], None]
    ) -> None:
        self.out = out
        self.target = target
        self.keep = keep
        self.wait = wait
        self.say = say
        self._newest: Path | None = None
        self._is_copied = threading.Event()
        self._is_copied.set()
        self._came = threading.Event()
        self._has_failed = False
        self._thread = threading.Thread(target=self._work, name="copies", daemon=True)
        self._thread.start()

    def add(self, checkpoint: Path) -> None:
        """Asks for a copy of a checkpoint that was just written."""
        self._newest = checkpoint
        self._is_copied.clear()
        self._came.set()

    def close(self) -> None:
        """Waits for the newest, at most `wait` seconds, then says what is not there."""
        if not self._is_copied.wait(self.wait) and self._newest:
            self.say(
                f"{self._newest.name} is not at train.copy_to yet (waited {self.wait:g} s): "
                "--resume auto on this machine copies it"
            )

    def _work(self) -> None:
        while True:
            self._came.wait()
            self._came.clear()
            newest = self._newest
            if newest is None:
                continue
            try:
                self._copy(newest)
            except Exception as error:  # every fsspec back end has exceptions of its own
                if not self._has_failed:
                    self.say(
                        f"{newest.name} was not copied to train.copy_to ({error}): training goes "
                        "on, it is tried again"
                    )
                self._has_failed = True
                self._came.wait(RETRY_SECONDS)
                self._came.set()
                continue
            if self._has_failed:
                self.say(f"train.copy_to answers again: {newest.name} was copied")
            self._has_failed = False
            if newest == self._newest:
                self._is_copied.set()

    def _copy(self, checkpoint: Path) -> None:
        """Copies one checkpoint, its list of files last: that makes it whole there too."""
        there = opened(self.target)
        wanted = [checkpoint]
        best = checkpoints.best(self.out)
        if best is not None and best != checkpoint:
            wanted.append(best)
        for path in wanted:
            _copy_folder(there.system, path, there.place(checkpoints.FOLDER, path.name))
        for name in SMALL:
            if (self.out / name).is_file():
                _put(there.system, self.out / name, there.place(name))
        steps = steps_at(there)
        kept = {*steps[-self.keep :], *(path.name for path in wanted)}
        for name in steps:
            if name not in kept:
                there.system.rm(there.place(checkpoints.FOLDER, name), recursive=True)


class Target(NamedTuple):
    """A place for copies: a file system of fsspec, and the folder in it."""

    system: Any
    root: str

    def place(self, *names: str) -> str:
        return "/".join((self.root, *names))


def opened(target: str) -> Target:
    """Returns the place that `train.copy_to` names. Raises ConfigError."""
    scheme = target.partition("://")[0]
    try:
        found = fsspec.url_to_fs(target, **_options(target))
    except ImportError as error:
        extra = EXTRAS.get(scheme)
        remedy = install_command(extra) if extra else str(error)
        raise ConfigError(f"train.copy_to: {scheme}:// needs a package: {remedy}") from error
    except ValueError as error:
        raise ConfigError(f"train.copy_to: {scheme}:// is unknown: {error}") from error
    return Target(found[0], found[1].rstrip("/"))


def _options(target: str) -> dict[str, Any]:
    """Makes folders of a local target come into being; others know none."""
    is_local = "://" not in target or target.startswith("file://")
    return {"auto_mkdir": True} if is_local else {}


def steps_at(there: Target) -> list[str]:
    """Returns the names of the checkpoints at a target, oldest first."""
    there.system.invalidate_cache()
    folder = there.place(checkpoints.FOLDER)
    if not there.system.exists(folder):
        return []
    listed = there.system.ls(folder, detail=False)
    names = [str(path).rstrip("/").rpartition("/")[2] for path in listed]
    steps = [name for name in names if name.removeprefix("step-").isdecimal()]
    return sorted(steps, key=lambda name: int(name.removeprefix("step-")))


def fetch(out: Path, target: str, say: Callable[[str], None]) -> None:
    """Fetches a run's newest whole checkpoint into an empty folder, and what lies beside it.

    The best one comes too. Nothing is done where OUT has checkpoints, or the target has none.
    Raises ConfigError where all that are there are damaged.
    """
    if any((out / checkpoints.FOLDER).glob("step-*")):
        return
    there = opened(target)
    names = steps_at(there)
    for name in SMALL:
        if there.system.exists(there.place(name)):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            there.system.get_file(there.place(name), str(out / name))
    best = checkpoints.pointed_to(out)
    if best in names:
        _fetch(there, best, out)
    for name in reversed(names):
        problem = _fetch(there, name, out)
        if problem is None:
            say(f"fetched {name} from train.copy_to")
            return
        say(f"passed over: {name} at train.copy_to is not whole: {problem}")
    if names:
        raise ConfigError(f"train.copy_to: none of its {len(names)} checkpoints is whole")


def _fetch(there: Target, name: str, out: Path) -> str | None:
    """Fetches one checkpoint. Returns what keeps it from being whole; then it is not there."""
    final = out / checkpoints.FOLDER / name
    beside = final.with_name(f".writing-{name}")
    source = there.place(checkpoints.FOLDER, name)
    if final.is_dir():
        return checkpoints.problems(final)
    for file in there.system.find(source):
        local = beside / str(file).rstrip("/").removeprefix(source).lstrip("/")
        local.parent.mkdir(parents=True, exist_ok=True)
        there.system.get_file(file, str(local))
    problem = checkpoints.problems(beside)
    if problem is None:
        beside.rename(final)
    shutil.rmtree(beside, ignore_errors=True)
    return problem


def _copy_folder(system: Any, path: Path, target: str) -> None:
    files = json.loads((path / checkpoints.FILES).read_text())
    listed = f"{target}/{checkpoints.FILES}"
    if system.exists(listed) and system.cat_file(listed) == (path / checkpoints.FILES).read_bytes():
        return
    for name, fact in files.items():
        _put(system, path / name, f"{target}/{name}")
        found = _sha256(system, f"{target}/{name}")
        if found != fact["sha256"]:
            raise OSError(f"{name} of {path.name} came out with other bytes")
    _put(system, path / checkpoints.FILES, listed)


def _put(system: Any, local: Path, remote: str) -> None:
    system.makedirs(remote.rpartition("/")[0], exist_ok=True)
    system.put_file(str(local), remote)


def _sha256(system: Any, remote: str) -> str:
    digest = hashlib.sha256()
    with system.open(remote, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def set_aside(target: str) -> None:
    """Moves a target's checkpoints aside under a dated name, as --restart does in OUT.

    File by file: of a folder at S3, which is only a beginning of names, fsspec moves nothing.
    """
    there = opened(target)
    if not steps_at(there):
        return
    system = there.system
    folder = there.place(checkpoints.FOLDER)
    dated = there.place(f"before-{time.strftime('%Y%m%d-%H%M%S')}", checkpoints.FOLDER)
    for file in system.find(folder):
        place = f"{dated}{str(file).removeprefix(folder)}"
        system.makedirs(place.rpartition("/")[0], exist_ok=True)
        system.mv(file, place)
    system.invalidate_cache()
    if system.exists(folder) and not system.find(folder):  # empty folders, where there are such
        system.rm(folder, recursive=True)
