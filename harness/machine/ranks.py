"""Which process of how many this one is, by whoever started it: torchrun, srun, mpirun or nobody.

Environment -> RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torch wants them, or one
sentence. A half of them, left in a shell, used to give as many rank 0 as there were processes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, MutableMapping, Sequence
from typing import NamedTuple

from harness.errors import ConfigError


class Names(NamedTuple):
    """The variables of one launcher."""

    rank: str
    world_size: str
    local_rank: str


TORCH = Names("RANK", "WORLD_SIZE", "LOCAL_RANK")
RUN_ID = "TORCHELASTIC_RUN_ID"
MEETING = ("MASTER_ADDR", "MASTER_PORT")
# mpirun first: it may start its own helpers by srun, whose variables are then there too
LAUNCHERS = {
    "Open MPI's mpirun": Names(
        "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"
    ),
    "MVAPICH's mpirun": Names(
        "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"
    ),
    # Of a step: SLURM_NTASKS is also there in a job's script, which is one process.
    "srun": Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    "mpirun": Names("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}
LOCAL_WORLD_SIZES = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
)
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # harmless where it is left over
# What a launcher decides anew for its processes: torchrun, and those of MPI.
DECIDED = (
    *(*TORCH, *MEETING, *LOCAL_WORLD_SIZES, "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE"),
)
PREFIXES = ("TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "MV2_")


def settle(environment: MutableMapping[str, str]) -> str | None:
    """Makes torch's variables say what the launcher meant; removes those that are left over.

    Returns the launcher whose variables were translated. Raises ConfigError naming what is there
    and what is not.
    """
    if all(name in environment for name in (*TORCH, *MEETING)):
        _forget_others(environment)
        return None
    if (started := _started_by(environment)) is not None:
        launcher, size = started
        environment.update(_translated(environment, launcher, size))
        _forget_others(environment)
        return launcher
    there = {name: environment[name] for name in TORCH if name in environment}
    if any(value != ALONE[name] for name, value in there.items()):
        missing = [name for name in (*TORCH, *MEETING) if name not in environment]
        raise ConfigError(
            f"the environment says {_assigned(there)} but not {', '.join(missing)}: start all "
            f"processes by `harness train`, torchrun, srun or mpirun, or for one process alone "
            f"`unset {' '.join(there)}`"
        )
    for name in there:
        del environment[name]
    _forget_others(environment)
    return None


def check_not_started_as_several(environment: Mapping[str, str]) -> None:
    """Raises ConfigError where a launcher has started several of what starts processes itself."""
    started = _started_by(environment)
    names: Sequence[str] = LAUNCHERS[started[0]] if started else (*TORCH, RUN_ID)
    if started is None and RUN_ID in environment:  # without it, they are left over from something
        started = ("torchrun", _number(environment.get("WORLD_SIZE")))
    if started is not None and started[1] > 1:
        launcher, size = started
        there = {name: environment[name] for name in names if name in environment}
        raise ConfigError(
            f"`harness train` starts its processes itself and {launcher} has started {size} of it "
            f"({_assigned(there)}): run `python -m harness.train CONFIG` under {launcher}, or, "
            f"where that is left over in this shell, `unset {' '.join(there)}` first"
        )


def is_first(environment: Mapping[str, str]) -> bool:
    """Tells whether this process speaks for all that a launcher has started."""
    return environment.get("WORLD_SIZE", "1") == "1" or environment.get("RANK", "0") == "0"


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment for processes that a launcher will give ranks of its own."""
    return {
        name: value
        for name, value in environment.items()
        if name not in DECIDED and not name.startswith(PREFIXES)
    }


def _started_by(environment: Mapping[str, str]) -> tuple[str, int] | None:
    """Returns the launcher that has started several processes, and how many."""
    for launcher, names in LAUNCHERS.items():
        if (size := _number(environment.get(names.world_size))) > 1:
            return launcher, size
    return None


def _translated(environment: Mapping[str, str], launcher: str, size: int) -> dict[str, str]:
    names = LAUNCHERS[launcher]
    there = {name: environment[name] for name in names if name in environment}
    if missing := [name for name in names if name not in there]:
        raise ConfigError(
            f"{launcher} says {_assigned(there)} but not {', '.join(missing)}: set RANK, "
            "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT for each process"
        )
    meeting = {name: environment[name] for name in MEETING if name in environment}
    if launcher == "srun":
        job = _number(environment.get("SLURM_JOB_ID")) + _number(environment.get("SLURM_STEP_ID"))
        meeting.setdefault("MASTER_PORT", str(20000 + job % 20000))
        hosts = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
        meeting.setdefault("MASTER_ADDR", first_host(hosts))
    elif size in (_number(environment.get(name)) for name in LOCAL_WORLD_SIZES):
        meeting.setdefault("MASTER_ADDR", "127.0.0.1")
    if not meeting.get("MASTER_ADDR"):
        raise ConfigError(
            f"{launcher} has started {size} processes on several machines ({_assigned(there)}) and "
            "MASTER_ADDR is not set: give it, the machine of rank 0, to all of them "
            "(mpirun -x MASTER_ADDR=HOST)"
        )
    meeting.setdefault("MASTER_PORT", "29500")
    ranks = {ours: environment[theirs] for ours, theirs in zip(TORCH, names, strict=True)}
    return ranks | meeting


def first_host(hosts: str) -> str:
    """Returns the first of Slurm's list of hosts, as in node[07-12,15],login1; "" of an empty
    one.
    """
    found = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\])?([^,\[]*)", hosts)
    return "".join(part or "" for part in found.groups()) if found else ""


def _forget_others(environment: MutableMapping[str, str]) -> None:
    """Removes what accelerate would read beside torch's variables, or in their place."""
    for names in LAUNCHERS.values():
        for name in (*names, *LOCAL_WORLD_SIZES):
            if not name.startswith("SLURM_"):
                environment.pop(name, None)


def _number(value: str | None) -> int:
    return int(value) if value and value.isdecimal() else 0


def _assigned(there: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in there.items()) or "nothing"
