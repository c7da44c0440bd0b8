"""Toy runs in processes of their own, to be broken: what benchmarks/faults.py and soak.py share.

A `Toy` has tiny models, sets and the digest of a run that nothing interrupted; `start` forks a
process that trains (imports are done once, so that a start takes a second), or one that launches
several ranks, with a fault in one of them: as a program this module is what they run.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed
import yaml
from safetensors.torch import load_file

from harness import checkpoint as checkpoints
from harness.machine.launcher import launch
from harness.train import __main__ as program
from harness.train.run import run
from same_runs import AtStep
from tiny_models import tiny_clip, tiny_t5
from toy_runs import make_config

SECONDS = 300  # a toy run that takes longer hangs
SUPPORT = Path(__file__).resolve().parent
RANK_FAULT = "TOY_RANK_FAULT"  # KIND:STEP:RANK


def raises() -> None:
    raise RuntimeError("injected")


def break_communicator() -> None:
    torch.distributed.destroy_process_group()


def hold_the_gil() -> None:
    ctypes.PyDLL(None).pause()  # PyDLL keeps the lock


# What a process does to itself in the middle of a step.
FAULTS: dict[str, Callable[[], object]] = {
    "segfault": lambda: ctypes.string_at(0),
    "exit": lambda: os._exit(7),
    "abort": os.abort,
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGTERM": lambda: os.kill(os.getpid(), signal.SIGTERM),
    "exception": raises,
    "communicator broken": break_communicator,
    "deadlock holding the GIL": hold_the_gil,
}


@dataclass
class Process:
    """A run in a process of its own, and what it said."""

    pid: int
    log: Path

    def wait(self, seconds: float = SECONDS) -> int:
        """Returns its exit code, or minus the signal. Raises TimeoutError, after ending it."""
        deadline = time.monotonic() + seconds
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                for _ in range(3):  # the third ends a launcher's ranks
                    os.kill(self.pid, signal.SIGTERM)
                    time.sleep(1)
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"it hung for {seconds:g} s: {self.last_words}")
            time.sleep(0.005)
        return os.waitstatus_to_exitcode(ended[1])

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def sentence(self) -> str:
        """The last sentence of harness; "" for a run that said none, or had a traceback."""
        sentences = [line for line in self.said.splitlines() if line.startswith("harness")]
        return sentences[-1][:300] if sentences and "Traceback" not in self.said else ""

    @property
    def last_words(self) -> str:
        return self.sentence or (self.said.splitlines() or ["nothing"])[-1][:300]


class Toy:
    """A folder for a run over one set: 14 images, eight steps in two epochs, saved at each second.

    Its sets are its own: they may be broken.
    """

    def __init__(self, shared: Path, folder: Path) -> None:
        self.shared = shared
        self.folder = folder
        self.out = folder / "run"
        shutil.copytree(shared / "sets", folder / "sets")

    def config(self, name: str = "run", **changes: object) -> Path:
        """Writes the run's config and returns the file. `changes`: section__key, or a section."""
        document = json.loads((self.shared / "config.json").read_text())
        document |= {"name": name, "out": str(self.folder / name)}
        for part in ("train", "dev"):
            document["data"][part] = [{"path": str(self.folder / "sets" / part)}]
        for key, value in changes.items():
            section, _, field = key.partition("__")
            document[section] |= {field: value} if field else value
        file = self.folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(document))
        return file

    def start(
        self,
        *arguments: str,
        fault: str = "",
        step: int = 0,
        ranks: int = 1,
        environment: Mapping[str, str] | None = None,
        before: Callable[[], object] = lambda: None,
        **changes: object,
    ) -> Process:
        """Starts `harness.train CONFIG *arguments`; `fault` at `step` is one of FAULTS, of several
        `ranks` in the last. `before` is called in the new process, for instance to set a limit.
        """
        file = self.config(**changes)
        log = self.folder / f"log-{len(list(self.folder.glob('log-*')))}.txt"
        log.touch()  # here: the new process may be killed before it is there
        if pid := os.fork():
            return Process(pid, log)
        code = 99
        try:
            descriptor = os.open(log, os.O_CREAT | os.O_WRONLY)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.environ.update(environment or {})
            before()
            if ranks > 1:
                os.environ[RANK_FAULT] = f"{fault}:{step}:{ranks - 1}"
                os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (SUPPORT.parents[1], SUPPORT)))
                code = launch([str(file), *arguments], ranks, module="toy_process")
            else:
                code = train([str(file), *arguments], fault, step)
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 1
        except BaseException as error:
            sys.excepthook(type(error), error, error.__traceback__)
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def run(self, *arguments: str, **how) -> tuple[int, Process]:
        """Runs it to its end."""
        process = self.start(*arguments, **how)
        return process.wait(), process

    def resume(self, **how) -> tuple[int, Process]:
        return self.run("--resume", "auto", **how)

    def wait_for(self, process: Process, step: int) -> None:
        """Waits until the run has logged `step`, or is over."""
        while logged(self.out) < step and not os.waitid(
            os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT
        ):
            time.sleep(0.001)

    def is_bit_equal(self) -> bool:
        """Tells whether the run ended as the uninterrupted one did, moments included."""
        return digest(self.out) == (self.shared / "digest").read_text()


def logged(out: Path) -> int:
    """Returns the last step in the journal; 0 without any."""
    try:
        rows = (out / "metrics.jsonl").read_text().splitlines()
        return json.loads(rows[-1])["step"]
    except (OSError, IndexError, ValueError):
        return 0


def digest(out: Path) -> str:
    """Returns the sha256 over weights and moments of the newest checkpoint."""
    found = checkpoints.newest(out)
    if found is None:
        return "no checkpoint"
    sums = hashlib.sha256(str(found.step).encode())
    tensors = {**load_file(found.model / "model.safetensors"), **found.optimizer()}
    for name in sorted(tensors):
        sums.update(name.encode() + tensors[name].numpy().tobytes())
    return sums.hexdigest()


def make_shared(root: Path, ranks: int = 1) -> Path:
    """Makes what all toys share: tiny models, sets, a config, and the digest of the run that
    nothing interrupts.
    """
    shared = root / "shared"
    shared.mkdir(parents=True)
    config = make_config(shared / "sets", tiny_clip(shared / "clip"), tiny_t5(shared / "t5"))
    (shared / "config.json").write_text(json.dumps(config.model_dump(mode="json")))
    whole = Toy(shared, root / "whole")
    code, process = whole.run(ranks=ranks)
    if code:
        raise RuntimeError(f"the run that nothing interrupts ended with {code}: {process.said}")
    (shared / "digest").write_text(digest(whole.out))
    return shared


def train(arguments: Sequence[str], fault: str, step: int) -> int:
    """Trains in this process, with a fault; returns the exit code."""
    if fault:
        program.run = partial(run, observers=[AtStep(step, FAULTS[fault])])
    return program.main(list(arguments))


if __name__ == "__main__":
    code = 1
    try:
        kind, step, rank = os.environ[RANK_FAULT].split(":")
        code = train(sys.argv[1:], kind if os.environ["RANK"] == rank else "", int(step))
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
