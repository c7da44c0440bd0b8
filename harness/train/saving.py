"""The checkpoints of a run: when one is due, written beside training, what that costs, the best.

All ranks gather and copy; the main process then writes from a thread, while training goes on.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from harness import checkpoint as checkpoints
from harness.config.load import for_disk
from harness.errors import ConfigError
from harness.machine.hardware import hardware
from harness.machine.heartbeat import SAVING
from harness.machine.lock import RunLock
from harness.train.best import Best
from harness.train.copies import Copies
from harness.train.resume import data_facts
from harness.train.state import Run

MOST_OF_THE_TIME = 0.035  # that saving by the clock may cost a run; else it comes less often
RETRY_SECONDS = 60.0  # after a checkpoint that could not be written


class Saver:
    """The saver of a run's checkpoints; on every rank, and the main process's writes."""

    def __init__(self, run: Run, lock: RunLock | None, copies: Copies | None) -> None:
        self.run = run
        self.lock = lock
        self.copies = copies
        self.best = Best(run)
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._written_seconds = 0.0  # what the last one took the thread, and of a processor
        self._cpu_seconds = 0.0
        self._began = time.monotonic()
        self._blocked = 0.0  # seconds that training has waited for all of them
        self._minutes = run.config.train.save_minutes
        self._put_off(60 * (self._minutes or 0))
        self.best.point()  # where an earlier process was killed before it could

    def is_due(self) -> bool:
        """Tells whether the time for one has come; the main process's clock decides."""
        is_asked = self._minutes is not None and self.run.engine.is_main
        return is_asked and not self._is_writing() and time.monotonic() >= self._next

    def save(self, at_once: bool = False) -> None:
        """Writes the run as it stands; all ranks alike.

        `at_once`: it is whole when this returns, or an error is raised. Else it is written beside
        training, and one that cannot be written is told and tried again.
        """
        run = self.run
        run.engine.heart.doing(f"saves step {run.state.step}", alone=run.engine.is_main)
        began = time.monotonic()
        self._join()
        self.check()
        with run.clock.during("saving"):
            weights = _copied(run.engine.trained_state())
            optimizer = _copied(run.engine.optimizer_state())
        if run.engine.is_main:
            self._error = None
            write = partial(
                self._write, run.state.step, weights, optimizer, _document(run), at_once
            )
            self._thread = threading.Thread(target=write, name=SAVING)
            self._thread.start()
            if at_once:
                self._join()
                self.check(is_last=True)
        self._note_cost(time.monotonic() - began)
        if at_once:
            with run.clock.during("saving"):
                run.engine.wait()

    def save_once(self) -> None:
        """Saves at once, unless this step is saved; all ranks alike."""
        self._join()
        run = self.run
        is_saved = checkpoints.place(run.config.out_dir, run.state.step).exists()
        if not run.engine.sum([run.engine.is_main and is_saved])[0]:
            self.save(at_once=True)

    def keep_as_best(self, is_saved: bool) -> None:
        """Has best.json name this step, saving it where that was not done; all ranks alike."""
        if not is_saved:
            return self.save()  # which points too
        self._join()
        self.best.point()

    def check(self, is_last: bool = False) -> None:
        """Raises what makes it useless to train on: a folder that is gone, or another run's.

        `is_last`: also what kept the last one from being written.
        """
        if isinstance(self._error, ConfigError) or (self._error and is_last):
            raise self._error

    def close(self) -> None:
        """Waits for what is being written, and not for long for what is being copied."""
        self._join()
        if self.copies:
            self.copies.close()

    def _join(self) -> None:
        """Waits for what is being written."""
        if self._thread:
            with self.run.clock.during("saving"):
                self._thread.join()

    def _is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def _put_off(self, seconds: float) -> None:
        self._next = time.monotonic() + seconds

    def _write(
        self,
        step: int,
        weights: Mapping[str, torch.Tensor],
        optimizer: Mapping[str, torch.Tensor],
        document: Mapping[str, Any],
        is_last: bool,
    ) -> None:
        """Does what the thread does for one checkpoint. Raises nothing."""
        run = self.run
        out = run.config.out_dir
        began = time.monotonic()
        try:
            if self.lock:
                self.lock.check()
            save_model = partial(run.model.save_pretrained, state=weights)
            written = checkpoints.write(out, step, save_model, optimizer, document)
            self.best.point()
            checkpoints.prune(out, step, run.config.train.keep_checkpoints)
            run.tracker.checkpoint(written.path, written.digest, written.step)
            if self.copies:
                self.copies.add(written.path)
        except ConfigError as error:
            self._error = error
        except Exception as error:
            self._error = error
            self._put_off(RETRY_SECONDS)
            goes_on = f"training goes on, the next is tried in {RETRY_SECONDS:.0f} seconds"
            run.terminal.say(
                f"the checkpoint of step {step} could not be written ({error}): the one before "
                f"stays{'' if is_last else f', {goes_on}'}"
            )
        self._written_seconds = time.monotonic() - began
        self._cpu_seconds = 0.0 if is_last else time.thread_time()  # training waited for a last one

    def _note_cost(self, blocked: float) -> None:
        """Logs what saving costs, and makes it rarer where that is too much.

        A writing thread takes a CPU run's own processors: there its time counts too.
        """
        run = self.run
        on_cpu = run.engine.device.type == "cpu"
        cost = blocked + (self._cpu_seconds if on_cpu else 0.0)
        self._blocked += cost
        share = self._blocked / max(time.monotonic() - self._began, 1e-9)
        figures = {
            "blocked_seconds": blocked,
            "last_write_seconds": self._written_seconds,
            "share_of_time": share,
        }
        run.track("save", figures)
        if self._minutes is None:
            return
        least = cost / MOST_OF_THE_TIME / 60
        if least > self._minutes:
            run.terminal.say(
                f"a checkpoint costs {cost:.1f} s: from here on one by the clock comes every "
                f"{least:.1f} minutes in place of {self._minutes:g}, so that saving takes at most "
                f"{MOST_OF_THE_TIME:.1%} of the time"
            )
            self._minutes = least
        if self._error is None:
            self._put_off(60 * self._minutes)


def _copied(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Returns it in main memory, untouched by the steps that follow."""
    return {name: value.detach().to("cpu", copy=True) for name, value in state.items()}


def _document(run: Run) -> dict[str, Any]:
    """Returns what state.json holds: with the tensors, all that a resumed run needs."""
    return {
        "step": run.state.step,
        "train": asdict(run.state),
        "scaler": run.engine.scaler_state(),
        "config": for_disk(run.config),
        "data": data_facts(run.loader),
        "run_id": run.tracker.run_id,
        "world_size": run.engine.world_size,
        "hardware": hardware(),
    }
