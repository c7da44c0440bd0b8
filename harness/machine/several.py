"""One verb run as several processes, each with its share of the work: by us, or by a launcher.

--processes N -> N times `harness VERB ...` with ranks in the environment; environment -> Share.
Imports no torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from harness.errors import ConfigError
from harness.machine.devices import cards, cores
from harness.machine.parent import as_parent
from harness.machine.ranks import settle, without_ranks
from shards.parts import Share

POLL = 0.2  # seconds between two looks at the processes


def share_of_this() -> Share:
    """Returns which process of how many this one is, by whoever started it. Raises ConfigError for
    ranks of which a half is missing.
    """
    settle(os.environ)
    return Share(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def card_of_this() -> str | None:
    """Returns the GPU of this process; None: there is none, or this process is the only one."""
    share = share_of_this()
    found = len(cards(os.environ))
    if share.world_size == 1 or not found:
        return None
    return f"cuda:{int(os.environ.get('LOCAL_RANK', share.rank)) % found}"


def as_typed() -> list[str]:
    """Returns the arguments of this command, `--processes N` left out."""
    typed = sys.argv[1:]
    places = [n for n, word in enumerate(typed) if word.partition("=")[0] == "--processes"]
    for place in reversed(places):
        del typed[place : place + (1 if "=" in typed[place] else 2)]
    return typed


def run_as_several(arguments: Sequence[str], processes: int) -> int:
    """Runs `harness ARGUMENTS` as so many processes to their end; returns the exit code of the
    first that fails, when the others have been ended, else 0.

    Raises ConfigError where a launcher has started several already.
    """
    if share_of_this().world_size > 1:
        raise ConfigError(
            f"--processes {processes}: a launcher has started several processes already, each of "
            "which takes its share: leave --processes out"
        )
    environment = without_ranks(os.environ) | as_parent()
    environment |= {"WORLD_SIZE": f"{processes}", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    environment.setdefault("OMP_NUM_THREADS", f"{max(1, cores() // processes)}")
    line = [sys.executable, "-m", "harness", *arguments]
    children = [
        subprocess.Popen(line, env=environment | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}"})
        for rank in range(processes)
    ]
    try:
        while True:
            codes = [child.poll() for child in children]
            failed = [code for code in codes if code]
            if failed or None not in codes:
                return failed[0] if failed else 0
            time.sleep(POLL)
    finally:
        for child in children:
            child.terminate()
        for child in children:
            child.wait()
