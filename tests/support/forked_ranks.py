"""Ranks of a program of tests/support, forked from a process that has imported it.

A launch takes five seconds for the launcher and six for each rank, most of them for imports; here
they are paid for once. The ranks get what `accelerate launch` would give them on one machine
without a GPU; whether it does is asked in tests/harness/machine/test_launcher.py.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from harness.machine.parent import as_parent, watch_parent

SUPPORT = Path(__file__).resolve().parent


def on_ranks(module: str, launches: Sequence[tuple[int, Sequence[object]]]) -> list[list[int]]:
    """Runs `module.main(Path(first), *others)` for each launch of (number of ranks, arguments), one
    launch after the other. Returns the exit codes of the ranks of each, minus the signal's number
    for one that a signal ended. A rank that fails ends the others of its launch.
    """
    asked = json.dumps([(count, [str(each) for each in given]) for count, given in launches])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")},
        **as_parent(),
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(map(str, (SUPPORT.parents[1], SUPPORT))),
    }
    line = [sys.executable, "-m", "forked_ranks", module, asked]
    done = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _launched(module: ModuleType, count: int, arguments: Sequence[str]) -> list[int]:
    port = _free_port()
    rank_of = {_forked(module, arguments, _names(rank, count, port)): rank for rank in range(count)}
    codes = [0] * count
    waited_for = set(rank_of)
    while waited_for:
        pid, status = os.wait()
        waited_for.remove(pid)
        codes[rank_of[pid]] = os.waitstatus_to_exitcode(status)
        if codes[rank_of[pid]]:
            for other in waited_for:
                os.kill(other, signal.SIGKILL)
    return codes


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _names(rank: int, count: int, port: int) -> dict[str, str]:
    """Returns the variables of one rank; a run of one process has none."""
    if count == 1:
        return {}
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _forked(module: ModuleType, arguments: Sequence[str], names: dict[str, str]) -> int:
    """Starts a rank and returns its process."""
    os.environ.update(as_parent())
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.dup2(2, 1)  # the codes alone go to stdout
        os.environ.update(names)
        watch_parent()
        module.main(Path(arguments[0]), *arguments[1:])
        code = 0
    except SystemExit as left:
        code = left.code if isinstance(left.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    watch_parent()
    program = importlib.import_module(sys.argv[1])
    print(json.dumps([_launched(program, *launch) for launch in json.loads(sys.argv[2])]))
