"""Checkpoints as files: written whole or not at all, verified, found again, pruned.

Knows no engine and no model. In OUT/checkpoints/step-000100:

    model/                 what `VisionLanguageModel.save_pretrained` wrote
    optimizer.safetensors  moments by parameter name: exp_avg/NAME, exp_avg_sq/NAME, step/NAME
    state.json             format, step, stream state, scaler, config, MLflow run id
    files.json             sha256 and size of every file above: the mark of a whole checkpoint
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from harness import __version__
from harness.errors import ConfigError

FOLDER = "checkpoints"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
FILES = "files.json"
MODEL = "model"
FORMAT = 2  # of state.json and what it stands for; 1 was written without a number


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk."""

    path: Path
    state: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.path / MODEL

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def digest(self) -> str:
        """The sha256 over the list of files and their hashes: what a tracker logs."""
        return hashlib.sha256((self.path / FILES).read_bytes()).hexdigest()

    def optimizer(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / OPTIMIZER)


def place(out: Path, step: int) -> Path:
    return out / FOLDER / f"step-{step:06d}"


def write(
    out: Path,
    step: int,
    save_model: Callable[[Path], None],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> Checkpoint:
    """Writes beside, verifies, renames.

    A process killed at any moment leaves the older checkpoints whole.
    """
    final = place(out, step)
    beside = final.with_name(f".writing-{final.name}")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        save_model(beside / MODEL)
        save_file({k: v.cpu().contiguous() for k, v in optimizer.items()}, beside / OPTIMIZER)
        (beside / STATE).write_text(json.dumps({"format": FORMAT, **state}, indent=1))
        files = {str(p.relative_to(beside)): fact(p) for p in beside.rglob("*") if p.is_file()}
        (beside / FILES).write_text(json.dumps(files, indent=1, sort_keys=True))
        for path in (*beside.rglob("*"), beside):
            _sync(path)
        if problem := problems(beside):
            raise OSError(f"{beside}: the checkpoint just written does not read back: {problem}")
        if final.exists():  # it was damaged, or an older one was gone on from
            shutil.rmtree(final)
        os.replace(beside, final)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _sync(final.parent)
    return Checkpoint(final, dict(state))


def problems(path: Path) -> str | None:
    """Returns what keeps a folder from being a whole checkpoint; None when nothing does."""
    if not (path / FILES).is_file():
        return f"it has no {FILES}"
    try:
        files = dict(json.loads((path / FILES).read_text()))
    except ValueError:
        return f"{FILES} is damaged: it is not JSON"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if fact(path / name) != expected:
            return f"{name} is damaged: its size or sha256 differs from {FILES}"
    return None


def load(path: Path) -> Checkpoint:
    """Returns the checkpoint in a folder. Raises ConfigError where it is none that can be read."""
    if not path.is_dir():
        raise ConfigError(
            f"{path} is not a folder; a checkpoint is a folder such as OUT/{FOLDER}/step-000100"
        )
    if problem := problems(path):
        raise ConfigError(f"{path} is not a whole checkpoint: {problem}")
    return _read(path)


def newest(out: Path, note: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """Returns a run's newest whole checkpoint; names damaged ones to `note` and passes them over.

    Raises ConfigError for one of a later version: passed over, it would be trained again and
    removed.
    """
    for path in reversed(_by_step(out)):
        problem = problems(path)
        if problem is None:
            return _read(path)
        note(f"passed over: {path} is not a whole checkpoint: {problem}")
    return None


def _read(path: Path) -> Checkpoint:
    """Returns a whole checkpoint with its state. Raises ConfigError for an unknown format."""
    state = json.loads((path / STATE).read_text())
    found = state.pop("format", 1)
    if found not in (1, FORMAT):
        raise ConfigError(
            f"{path / STATE} has format {found!r}, harness {__version__} reads 1 to {FORMAT}: "
            "go on with the version of harness that wrote it, or a later one"
        )
    return Checkpoint(path, state)


def at(folder: Path | str) -> Checkpoint:
    """Returns a run's newest whole checkpoint, or the checkpoint that the folder is.

    Raises ConfigError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; expected the output folder of a training run")
    if (folder / STATE).is_file():
        return load(folder)
    if found := newest(folder):
        return found
    raise ConfigError(f"{folder} holds no whole checkpoint in {FOLDER}/; train the run first")


def model_folder(folder: Path) -> Path:
    """Returns the saved model that a run's folder, a checkpoint or the model itself stands for.

    Raises ConfigError.
    """
    return folder if (folder / "model.safetensors").is_file() else at(folder).model


def find(
    out: Path, resume: str | None, note: Callable[[str], None] = lambda message: None
) -> Checkpoint | None:
    """Returns what `--resume` means: for auto this run's newest or None, else what PATH names.

    PATH is a checkpoint, or a run whose newest is meant. Raises ConfigError.
    """
    if resume is None:
        return None
    if resume == "auto":
        return newest(out, note)
    path = Path(resume)
    if (path / FOLDER).is_dir():
        if found := newest(path, note):
            return found
        raise ConfigError(f"--resume {path}: {path / FOLDER} holds no whole checkpoint")
    return load(path)


def prune(out: Path, step: int, keep: int) -> None:
    """Removes all but the newest `keep` once `step` is written, and interrupted writes.

    A later step's belongs to a future that is being run again, from an older checkpoint or past a
    damaged one.
    """
    paths = _by_step(out)
    kept = [path for path in paths if _step(path) <= step][-keep:]
    for path in [*paths, *(out / FOLDER).glob(".writing-*")]:
        if path not in kept:
            shutil.rmtree(path)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _by_step(out: Path) -> list[Path]:
    found = (out / FOLDER).glob("step-*")
    return sorted((p for p in found if p.name.removeprefix("step-").isdecimal()), key=_step)


def fact(path: Path) -> dict[str, Any]:
    """Returns a file's size and sha256, as files.json holds them."""
    with open(path, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def _sync(path: Path) -> None:
    """Makes a file's bytes, or what was renamed into a folder, survive a crash of the machine."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
