"""Breaks toy runs at random for some minutes, resumes each until it is done, and compares its end.

    python benchmarks/soak.py --minutes 60 [--seed 0] [--json]
    python benchmarks/soak.py --ranks 2 --times 10            # five failures of one of two ranks

A run is broken one to three times: its process is killed or breaks itself at a random step, a shard
is cut off and mended, the tracking server comes and goes. Then `--resume auto` goes on until the
last step. Bit-equal: weights and moments at the end have the sha256 of the run that nothing
interrupted, and MLflow holds each step once. Named: it ended by itself, in time, with a sentence
that says why. Exit code 1 where runs ended otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from harness.report.pictures import markdown_table
from harness.tracking.tracker import sync
from mlflow_server import MlflowServer
from toy_process import FAULTS, Process, Toy, make_shared

OWN = ("segfault", "exit", "abort", "exception")  # what a process does to itself
OF_RANKS = ("segfault", "exit", "SIGKILL", "communicator broken", "deadlock holding the GIL")
assert {*OWN, *OF_RANKS} <= FAULTS.keys()
SHARD = "a shard is cut off, then mended"
SERVER = "the tracking server hangs, then answers"
MOST_RESUMES = 20


@dataclass
class Kind:
    """How often a fault was injected, and how the runs went on that had it."""

    times: int = 0
    bit_equal: int = 0
    named: int = 0
    failures: list[str] = field(default_factory=list)


class Soak:
    """One run at a time: broken, resumed, compared."""

    def __init__(self, root: Path, seed: int, ranks: int) -> None:
        self.root = root
        self.draw = random.Random(seed)
        self.shared = make_shared(root, ranks)
        self.server = MlflowServer(root)
        self.kinds: dict[str, Kind] = {}
        self.runs = 0
        breaks: dict[str, Callable[[Toy], int]] = {
            "SIGKILL": lambda toy: self.signalled(toy, signal.SIGKILL),
            "SIGTERM": lambda toy: self.signalled(toy, signal.SIGTERM),
            SHARD: self.shard_broken,
            SERVER: self.server_flaps,
        }
        breaks |= {kind: lambda toy, kind=kind: self.breaks_itself(toy, kind) for kind in OWN}
        self.breaks = breaks

    # ---- faults: each starts or goes on with the run, breaks it, and returns how it ended

    def tracking(self) -> dict[str, object]:
        return {"kind": "mlflow", "uri": self.server.uri, "last_wait": 1}

    def breaks_itself(self, toy: Toy, kind: str) -> int:
        step = self.draw.randint(1, 8)
        return self.ended(kind, *toy.resume(fault=kind, step=step, tracking=self.tracking()))

    def signalled(self, toy: Toy, number: signal.Signals) -> int:
        process = toy.start("--resume", "auto", tracking=self.tracking())
        toy.wait_for(process, self.draw.randint(0, 8))
        time.sleep(self.draw.random() / 10)
        with suppress(ProcessLookupError):  # it was quicker
            os.kill(process.pid, number)
        return self.ended(number.name, process.wait(), process)

    def shard_broken(self, toy: Toy) -> int:
        shard = self.draw.choice(sorted((toy.folder / "sets" / "train").glob("*.tar")))
        whole = shard.read_bytes()
        cut = self.draw.randrange(len(whole))
        shard.write_bytes(whole[:cut])
        code, process = toy.resume(tracking=self.tracking())
        shard.write_bytes(whole)
        if code and not process.sentence:
            raise RuntimeError(f"not told in one sentence: {process.last_words}")
        return self.ended(SHARD, code, process)

    def server_flaps(self, toy: Toy) -> int:
        process = toy.start("--resume", "auto", tracking=self.tracking())
        toy.wait_for(process, self.draw.randint(0, 7))
        self.server.delay = 30.0
        toy.wait_for(process, 8)
        self.server.released.set()
        self.server.delay = 0.0
        code = process.wait()
        self.server.released.clear()
        return self.ended(SERVER, code, process)

    def ended(self, kind: str, code: int, process: Process) -> int:
        """Counts a fault after which a sentence told why the process ended."""
        self.kinds[kind].named += bool(code and process.sentence)
        return code

    # ---- one run

    def one(self) -> None:
        """Breaks a run one to three times and resumes it to its end."""
        self.runs += 1
        toy = Toy(self.shared, self.root / f"run-{self.runs:04d}")
        injected = self.draw.choices(list(self.breaks), k=self.draw.randint(1, 3))
        problem = ""
        try:
            for kind in injected:
                self.kinds.setdefault(kind, Kind()).times += 1
                self.breaks[kind](toy)
            problem = self.finish(toy) or self.tracked(toy)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        self.count(injected, problem)
        shutil.rmtree(toy.folder)

    def finish(self, toy: Toy) -> str:
        """Resumes until the run ends by itself; returns what is wrong with its end, "" for
        nothing.
        """
        for _ in range(MOST_RESUMES):
            code, process = toy.resume(tracking=self.tracking())
            if code == 0:
                return "" if toy.is_bit_equal() else "other weights"
        return f"ended with {code} each time: {process.last_words}"

    def tracked(self, toy: Toy) -> str:
        """Says what is wrong with the steps in MLflow, once all is sent."""
        sync(toy.out)
        steps = self.server.steps((toy.out / "mlflow_run_id").read_text(), "train/loss")
        return "" if steps == list(range(1, 9)) else f"MLflow holds the steps {steps}"

    def count(self, injected: list[str], problem: str) -> None:
        for kind in injected:
            if problem:
                self.kinds[kind].failures.append(f"run {self.runs}, {injected}: {problem}")
            else:
                self.kinds[kind].bit_equal += 1
        shown = ", ".join(f"{kind} x{n}" for kind, n in Counter(injected).items())
        print(f"run {self.runs}: {shown}: {problem or 'bit-equal'}", file=sys.stderr)

    # ---- one of several ranks

    def of_ranks(self, kind: str, seconds: float, overrides: list[str]) -> None:
        """Breaks the second of two ranks: the launch must end in time, and the run be resumed."""
        self.runs += 1
        found = self.kinds.setdefault(kind, Kind())
        found.times += 1
        toy = Toy(self.shared, self.root / f"run-{self.runs:04d}")
        step = self.draw.randint(1, 7)
        problem = ""
        try:
            process = toy.start(*overrides, fault=kind, step=step, ranks=2)
            code = process.wait(seconds)
            found.named += bool(process.sentence)
            again, process = toy.run(*overrides, "--resume", "auto", ranks=2)
            if code == 0 or again or not toy.is_bit_equal():
                problem = f"ended with {code}, resumed with {again}: {process.last_words}"
        except TimeoutError as error:
            problem = str(error)
        self.count([kind], problem)
        shutil.rmtree(toy.folder)


def table(kinds: dict[str, Kind]) -> str:
    rows = [
        [name, kind.times, kind.bit_equal, kind.named, len(kind.failures)]
        for name, kind in sorted(kinds.items())
    ]
    return markdown_table(rows, ["fault", "injected", "resumed bit-equal", "named", "failures"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--ranks", type=int, choices=(1, 2), default=1)
    parser.add_argument("--times", type=int, default=10, help="with two ranks: of each failure")
    parser.add_argument("--in-time", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="with two ranks")
    given = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as place:
        soak = Soak(Path(place), given.seed, given.ranks)
        if given.ranks == 1:
            while time.monotonic() - begun < 60 * given.minutes:
                soak.one()
        else:
            for kind in given.times * OF_RANKS:
                soak.of_ranks(kind, given.in_time, given.overrides)
        soak.server.close()
    if given.json:
        print(json.dumps({name: asdict(kind) for name, kind in soak.kinds.items()}, indent=1))
    else:
        print(table(soak.kinds))
        minutes = (time.monotonic() - begun) / 60
        print(
            f"{soak.runs} runs in {minutes:.0f} minutes, seed {given.seed}; "
            f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        )
    failures = [line for kind in soak.kinds.values() for line in kind.failures]
    print(*failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
