"""Checkpoints as files: written whole or not at all, verified, found again, pruned.

Knows no engine and no model. In OUT/checkpoints/step-000100:

    model/                 what `VisionLanguageModel.save_pretrained` wrote
    optimizer.safetensors  moments by parameter name: exp_avg/NAME, exp_avg_sq/NAME, step/NAME
    state.json             format, step, stream state, scaler, config, data sets, MLflow run id
    files.json             sha256 and size of every file above: the mark of a whole checkpoint

Beside them best.json, which names the best one by `train.keep_best`, and folders with a date in
their name for what was moved aside. Only checkpoints that are whole are ever removed, by `prune`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harness import __version__
from harness.errors import ConfigError

FOLDER = "checkpoints"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
FILES = "files.json"
MODEL = "model"
BEST = "best.json"
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
    def home(self) -> Path:
        """The output folder of its run, where that lies now."""
        return self.path.parent.parent

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

    A process killed at any moment leaves the older checkpoints whole. Raises OSError, for a full
    disk and for whatever else keeps it from being whole.
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
        if final.exists():  # damaged: what is whole is never written again
            set_aside([final], "replaced")
        os.replace(beside, final)
    except SafetensorError as error:  # a full disk, in words of its own
        raise OSError(f"{beside} cannot be written: {error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    _sync(final.parent)
    return Checkpoint(final, dict(state))


def problems(path: Path, *, by_size: bool = False) -> str | None:
    """Returns what keeps a folder from being a whole checkpoint; None when nothing does.

    `by_size`: files are not read, only their sizes are compared.
    """
    if not (path / FILES).is_file():
        return f"it has no {FILES}"
    files = _json(path / FILES)
    if not isinstance(files, dict):
        return f"{FILES} is damaged: it is not a list of files in JSON"
    if missing := [name for name in (STATE, OPTIMIZER) if name not in files]:
        return f"{FILES} is damaged: it does not name {missing[0]}"
    for name, expected in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        found = {"bytes": (path / name).stat().st_size} if by_size else fact(path / name)
        if not isinstance(expected, dict) or {**expected, **found} != expected:
            return f"{name} is damaged: its size or sha256 differs from {FILES}"
    state = _json(path / STATE)
    if not isinstance(state, dict) or type(state.get("step")) is not int:
        return f"{STATE} is damaged: it does not say after which step it was written"
    return None


def _json(path: Path) -> Any:
    """Returns what a JSON file holds; None for what is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError):
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


def at(folder: Path | str, which: str | None = None) -> Checkpoint:
    """Returns a run's newest whole checkpoint, or the checkpoint that the folder is.

    `which` of a run's: newest, best or a step. Raises ConfigError.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; expected the output folder of a training run")
    if which not in (None, "newest"):
        return _named(folder, str(which))
    if (folder / STATE).is_file():
        return load(folder)
    if found := newest(folder):
        return found
    raise ConfigError(f"{folder} holds no whole checkpoint in {FOLDER}/; train the run first")


def _named(out: Path, which: str) -> Checkpoint:
    """Returns the checkpoint `best`, `400` or `step-000400` of a run. Raises ConfigError."""
    if which == "best":
        if path := best(out):
            return load(path)
        raise ConfigError(
            f"--checkpoint best: {out / FOLDER} holds no {BEST}; a run keeps its best checkpoint "
            "with train.keep_best, for instance train.keep_best=dev/CIDEr"
        )
    there = {path.name: path for path in _by_step(out)}
    step = which.removeprefix("step-")
    path = place(out, int(step)) if step.isdecimal() else out
    if path.name not in there:
        raise ConfigError(
            f"--checkpoint {which}: {out} holds {', '.join(there) or 'no checkpoint'}; expected "
            "newest, best or one of these"
        )
    return load(path)


def best(out: Path) -> Path | None:
    """Returns the checkpoint that best.json names; None where it names none that is there."""
    name = pointed_to(out)
    return next((path for path in _by_step(out) if path.name == name), None)


def pointed_to(out: Path) -> str | None:
    """Returns the name that best.json has, whether that is there or not."""
    file = out / FOLDER / BEST
    pointer = _json(file) if file.is_file() else None
    return pointer.get("checkpoint") if isinstance(pointer, dict) else None


def point_to_best(out: Path, step: int, metric: str, value: float) -> None:
    """Writes best.json, whole or not at all."""
    file = out / FOLDER / BEST
    beside = file.with_name(f".writing-{BEST}")
    named = {"checkpoint": place(out, step).name, "metric": metric, "value": value}
    beside.write_text(json.dumps(named, indent=1))
    _sync(beside)
    os.replace(beside, file)
    _sync(file.parent)


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
        if (found := newest(out, note)) is None and (damaged := _by_step(out)):
            raise ConfigError(
                f"--resume auto: none of the {len(damaged)} checkpoints in {out / FOLDER} is whole "
                f"({damaged[-1].name}: {problems(damaged[-1])}): go on from a copy of one with "
                "--resume PATH, or begin anew with --restart, which moves them aside"
            )
        return found
    path = Path(resume)
    if (path / FOLDER).is_dir():
        if found := newest(path, note):
            return found
        raise ConfigError(f"--resume {path}: {path / FOLDER} holds no whole checkpoint")
    return load(path)


def settle(out: Path, found: Checkpoint, note: Callable[[str], None]) -> None:
    """Makes `found` the newest in a run's folder that is about to go on from it.

    What is damaged, and what stands later than `found` or belongs to another run, is moved aside,
    so that `newest` cannot mean it, and told to `note`.
    """
    there = _by_step(out)
    paths = [path for path in there if not path.samefile(found.path)]
    is_own = len(paths) < len(there)
    damaged = [path for path in paths if problems(path)]
    later = [p for p in paths if p not in damaged and not (is_own and _step(p) < found.step)]
    for left, why in ((damaged, "damaged"), (later, "earlier-future")):
        if left:
            names = ", ".join(path.name for path in left)
            note(f"moved aside, to {set_aside(left, why)}: {names}")


def set_aside(paths: list[Path], why: str) -> Path:
    """Moves files or folders that lie side by side into a new folder there, with a date in its
    name, and returns that.
    """
    parent = paths[0].parent
    name = f"{why}-{time.strftime('%Y%m%d-%H%M%S')}"
    number = sum(1 for _ in parent.glob(f"{name}*"))
    aside = parent / (f"{name}-{number + 1}" if number else name)
    aside.mkdir()
    for path in paths:
        os.replace(path, aside / path.name)
    _sync(parent)
    return aside


def prune(out: Path, step: int, keep: int) -> None:
    """Removes checkpoints beside the newest `keep`, and what interrupted writes left.

    Never the one of `step`, which was just written, nor the best one. What is damaged is moved
    aside and not counted.
    """
    paths = _by_step(out)
    damaged = [path for path in paths if problems(path, by_size=True)]
    if damaged:
        set_aside(damaged, "damaged")
    whole = [path for path in paths if path not in damaged]
    kept = [*whole[-keep:], place(out, step), best(out)]
    for path in whole:
        if path not in kept:  # renamed first: one that is half removed would look damaged
            os.replace(path, path.with_name(f".removing-{path.name}"))
    for left in (out / FOLDER).glob(".[rw]*ing-*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


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
