"""How a run begins in its output folder: alone, anew or where it stood, over the same data.

Lock -> what was moved aside or fetched -> the checkpoint to go on from. On rank 0; what the others
need of it is sent to them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from harness import checkpoint as checkpoints
from harness.checkpoint import Checkpoint
from harness.checks import check_resume
from harness.config.schema import Config
from harness.errors import ConfigError
from harness.machine.lock import RunLock
from harness.redact import masked
from harness.tracking.journal import METRICS, RUN_ID
from harness.train import copies
from harness.train.copies import Copies
from shards import quarantine
from shards.loader import Loader
from shards.stream import StreamState

# What --restart moves aside: an earlier run's results, not the database of all runs.
OF_A_RUN = (checkpoints.FOLDER, METRICS, RUN_ID, quarantine.FILE, "answers", "evaluation")
ANSWER_SECONDS = 30.0  # that a new run waits to hear whether its place for copies is empty


class OutFolder:
    """The output folder of a run, held from `begin` to `release`; on rank 0 alone."""

    def __init__(
        self, config: Config, resume: str | None, restart: bool, say: Callable[[str], None]
    ) -> None:
        self.config = config
        self.resume = resume
        self.restart = restart
        self.say = say
        self.lock: RunLock | None = None
        self.copies: Copies | None = None

    def begin(self) -> Checkpoint | None:
        """Returns the checkpoint to go on from; None: the run is new.

        Raises ConfigError where another run holds the folder, an earlier one would be written over,
        or none that can be gone on from is left.
        """
        config = self.config
        out = config.out_dir
        waits = self.restart or self.resume is not None
        self.lock = RunLock.take(out, "a run of harness train", waits=waits, say=self.say)
        if self.restart:
            self._move_aside()
        check_resume(config, self.resume)
        if config.train.copy_to:
            self._use_copies(config.train.copy_to)
        found = checkpoints.find(out, self.resume, self.say)
        if found is not None:
            checkpoints.settle(out, found, self.say)
            if self.copies and found.path.is_relative_to(out):
                self.copies.add(found.path)
        return found

    def release(self) -> None:
        """Gives it free, whatever has happened."""
        if self.lock:
            self.lock.release()

    def _move_aside(self) -> None:
        out = self.config.out_dir
        there = [out / name for name in OF_A_RUN if (out / name).exists()]
        if there:
            self.say(f"--restart: the earlier run is in {checkpoints.set_aside(there, 'before')}")
        if self.config.train.copy_to:
            copies.set_aside(self.config.train.copy_to)

    def _use_copies(self, target: str) -> None:
        """Fetches what is needed from the place for copies, and begins to copy."""
        out = self.config.out_dir
        if self.resume == "auto":
            try:
                copies.fetch(out, target, self.say)
            except ConfigError:
                raise
            except Exception as error:  # every fsspec back end has exceptions of its own
                raise ConfigError(
                    f"train.copy_to cannot be read ({error}), and {out} holds no checkpoint: "
                    "whether the run has one there is not known; without --resume it begins anew"
                ) from error
        elif self.resume is None and _answer(lambda: copies.steps_at(copies.opened(target))):
            raise ConfigError(
                f"train.copy_to: {masked(target)} holds checkpoints of an earlier run: go on with "
                "--resume auto, move them aside with --restart, or choose another place"
            )
        train = self.config.train
        self.copies = Copies(out, target, train.keep_checkpoints, train.copy_wait, self.say)


def _answer(ask: Callable[[], Any]) -> Any:
    """Returns what `ask` returns, None where that takes long or fails. Raises its ConfigError."""
    came: list[Any] = []

    def work() -> None:
        try:
            came.append(ask())
        except Exception as error:  # a target that is absent is told when it is copied to
            came.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    answer = came[0] if came else None
    if isinstance(answer, ConfigError):
        raise answer
    return None if isinstance(answer, Exception) else answer


def data_facts(loader: Loader) -> list[dict[str, Any]]:
    """Returns what a checkpoint says of the data it was trained on, by set."""
    return [
        {
            "path": masked(manifest.folder),
            "digest": manifest.digest,
            "images": manifest.samples,
            "shards": len(manifest.shards),
            "bytes": manifest.bytes,
        }
        for manifest in loader.manifests
    ]


def stream_now(
    found: Checkpoint, loader: Loader, config: Config, say: Callable[[str], None]
) -> StreamState:
    """Returns where the run goes on in its data.

    Raises ConfigError, naming set and difference, where these are not the data that the checkpoint
    was trained on, unless `train.resume_data` is changed: then it is the start of the next epoch.
    """
    state = StreamState.from_json(found.state["train"]["stream"])
    if state.digest in loader.digests:
        return state
    difference = f"data.lanes was {state.lanes}, it is {loader.lanes}"
    if state.lanes == loader.lanes:
        difference = _difference(found.state.get("data") or [], data_facts(loader))
    if config.train.resume_data == "changed":
        epoch = state.epoch + (state.position > 0)
        say(
            f"train.resume_data=changed: {difference}; going on at the start of epoch {epoch + 1}, "
            f"{state.position} images of epoch {state.epoch + 1} had been used"
        )
        return loader.at(epoch, 0)
    raise ConfigError(
        f"{found.path} was trained on other data: {difference}. Give the same data, or go on over "
        "these at the start of the next epoch with train.resume_data=changed"
    )


def _difference(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> str:
    """Returns in words the first set that is another one, and how it differs."""
    if before and len(before) != len(now):
        return f"data.train had {len(before)} sets, it has {len(now)}"
    for old, new in zip(before, now, strict=False):
        if old["digest"] == new["digest"]:
            continue
        counts = [
            f"{old[unit]:,} {unit}, now {new[unit]:,}"
            for unit in ("images", "shards", "bytes")
            if old[unit] != new[unit]
        ]
        where = new["path"] if new["path"] == old["path"] else f"{new['path']} (was {old['path']})"
        return f"{where} had {'; '.join(counts) or 'as many images and bytes, but others'}"
    return (
        "the same sets, weights, seed, data.window_shards and data.train_images make the order of "
        "the images, and one of them is another now"
    )
