"""Checkpoints as files: written whole or not at all, verified, found again, pruned. Knows no engine and no model.

OUT/checkpoints/step-000100/model/             what `VisionLanguageModel.save_pretrained` wrote
                            optimizer.safetensors  moments by parameter name: exp_avg/NAME, exp_avg_sq/NAME, step/NAME
                            state.json         step, stream state, scaler, config, MLflow run id
                            files.json         sha256 and size of every file above: the mark of a whole checkpoint
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

from harness.config import ConfigError

FOLDER = "checkpoints"
OPTIMIZER, STATE, FILES, MODEL = "optimizer.safetensors", "state.json", "files.json", "model"


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
        """sha256 over the list of files and their hashes: what a tracker logs."""
        return hashlib.sha256((self.path / FILES).read_bytes()).hexdigest()

    def optimizer(self) -> dict[str, torch.Tensor]:
        return load_file(self.path / OPTIMIZER)


def write(
    out: Path,
    step: int,
    save_model: Callable[[Path], None],
    optimizer: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
) -> Checkpoint:
    """Writes beside, verifies, renames; a process killed at any moment leaves the older checkpoints whole."""
    folder = out / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    final, beside = folder / f"step-{step:06d}", folder / f".writing-step-{step:06d}"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    save_model(beside / MODEL)
    save_file({k: v.cpu().contiguous() for k, v in optimizer.items()}, beside / OPTIMIZER)
    (beside / STATE).write_text(json.dumps(dict(state), indent=1))
    files = {str(p.relative_to(beside)): _fact(p) for p in sorted(beside.rglob("*")) if p.is_file()}
    (beside / FILES).write_text(json.dumps(files, indent=1))
    for path in beside.rglob("*"):
        _sync(path)
    if problem := problems(beside):
        raise OSError(f"{beside}: the checkpoint just written does not read back: {problem}")
    if final.exists():  # a step that is run again after a resume from an older checkpoint
        shutil.rmtree(final)
    os.replace(beside, final)
    _sync(folder)
    return Checkpoint(final, dict(state))


def problems(path: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint, as a sentence; None when nothing does."""
    if not (path / FILES).is_file():
        return f"it has no {FILES}"
    for name, fact in json.loads((path / FILES).read_text()).items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if _fact(path / name) != fact:
            return f"{name} is damaged: its size or sha256 differs from {FILES}"
    return None


def load(path: Path) -> Checkpoint:
    """Raises ConfigError, naming the file, for anything but a whole checkpoint."""
    if not path.is_dir():
        raise ConfigError(f"{path} is not a folder; a checkpoint is a folder such as OUT/{FOLDER}/step-000100")
    if problem := problems(path):
        raise ConfigError(f"{path} is not a whole checkpoint: {problem}")
    return Checkpoint(path, json.loads((path / STATE).read_text()))


def newest(out: Path, note: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """The newest whole checkpoint of a run; a damaged one is named through `note` and passed over."""
    for path in sorted((out / FOLDER).glob("step-*"), reverse=True):
        if problem := problems(path):
            note(f"{path} is passed over: {problem}")
        else:
            return load(path)
    return None


def find(out: Path, resume: str | None, note: Callable[[str], None] = lambda message: None) -> Checkpoint | None:
    """What `--resume auto|PATH` means: the newest of this run or None; the named checkpoint, or the newest of a run."""
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


def prune(out: Path, keep: int) -> None:
    """Removes all but the newest `keep` checkpoints, and what an interrupted write left."""
    paths = sorted((out / FOLDER).glob("step-*"))
    for path in [*paths[:-keep], *(out / FOLDER).glob(".writing-*")]:
        shutil.rmtree(path)


def _fact(path: Path) -> dict[str, Any]:
    with open(path, "rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
