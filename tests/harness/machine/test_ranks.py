"""Which process of how many: what srun, mpirun and left-over variables make of a run."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from harness import checkpoint as checkpoints
from harness.config.load import dump
from harness.errors import ConfigError
from harness.machine import launcher, ranks
from toy_runs import losses, make_config

STEP = {
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "8",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "node[07-08,11],login1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29511",
}


def settled(environment: dict[str, str]) -> dict[str, str]:
    changed = dict(environment)
    ranks.settle(changed)
    return changed


def test_tasks_of_a_slurm_step_and_of_mpirun_become_ranks():
    found = settled(STEP)
    assert {name: found[name] for name in TORCHRUN} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "node07",
        "MASTER_PORT": str(20000 + (41234 + 2) % 20000),
    }
    assert settled(STEP | {"MASTER_ADDR": "node9"})["MASTER_ADDR"] == "node9"
    assert settled(OPEN_MPI) == TORCHRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    mpich = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
    assert settled(mpich) == settled(OPEN_MPI)


def test_what_torchrun_says_stands_and_nothing_beside_it():
    assert settled(TORCHRUN) == TORCHRUN
    assert settled(TORCHRUN | OPEN_MPI) == TORCHRUN
    assert settled(STEP | TORCHRUN) == STEP | TORCHRUN  # as launch/slurm.sbatch starts it


@pytest.mark.parametrize(
    "alone",
    [
        {},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
        # the script of a job of eight tasks, and a shell that salloc gave
        {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
    ],
    ids=str,
)
def test_one_process_stays_one(alone):
    kept = {name: value for name, value in alone.items() if name.startswith("SLURM")}
    assert settled(alone) == kept
    ranks.check_not_started_as_several(alone)


@pytest.mark.parametrize(
    ("half", "said"),
    [
        ({"RANK": "3"}, r"says RANK=3 but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, r"`unset WORLD_SIZE`"),
        ({"PMI_RANK": "1", "PMI_SIZE": "8"}, r"PMI_SIZE=8 but not MPI_LOCALRANKID"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"}, r"MASTER_ADDR is not set: .*mpirun -x"),
    ],
)
def test_a_half_of_them_is_refused_by_name(half, said):
    with pytest.raises(ConfigError, match=said):
        settled(half)


def test_harness_train_forgets_the_ranks_of_its_shell_and_is_not_started_several_times():
    _, environment = launcher.command([], 2, environment=TORCHRUN | {"GROUP_RANK": "0"})
    assert not {*TORCHRUN, "GROUP_RANK"} & environment.keys()
    for several, said in (
        (STEP, "srun has started 8 of it"),
        (OPEN_MPI, "Open MPI's mpirun has started 2"),
        (TORCHRUN | {"TORCHELASTIC_RUN_ID": "x"}, "torchrun has started 2 of it"),
    ):
        with pytest.raises(ConfigError, match=f"{said}.*python -m harness.train CONFIG"):
            launcher.command([], 1, environment=several)


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("node7", "node7"), ("a[07-08,11]-ib,b", "a07-ib"), ("x,y[1-2]", "x"), ("", "")],
)
def test_the_first_host_of_slurms_list(hosts, first):
    assert ranks.first_host(hosts) == first


@pytest.mark.slow
def test_a_run_that_srun_starts_is_one_run_and_a_half_left_over_is_one_sentence(
    tmp_path, tiny_clip_folder, tiny_t5_folder
):
    config = make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, dev=False, max_steps=2)
    file = tmp_path / "run.yaml"
    file.write_text(dump(config))
    clean = {k: v for k, v in os.environ.items() if k not in TORCHRUN}
    clean |= {"PYTHONPATH": str(Path(__file__).parents[3]), "CUDA_VISIBLE_DEVICES": ""}

    def start(variables: dict[str, str]) -> subprocess.Popen:
        line = [sys.executable, "-m", "harness.train", str(file)]
        return subprocess.Popen(line, env=clean | variables, stderr=subprocess.PIPE, text=True)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    step = STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "localhost"}
    step |= {"MASTER_PORT": port}
    tasks = [start(step | {"SLURM_PROCID": n, "SLURM_LOCALID": n}) for n in "01"]
    said = [task.communicate(timeout=120)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert "2 processes, as srun has started them" in said[0]
    assert checkpoints.newest(config.out_dir).state["world_size"] == 2
    assert list(losses(config.out_dir)) == [1, 2]

    left = start({"WORLD_SIZE": "8", "LOCAL_RANK": "0"})
    assert left.communicate(timeout=60)[1].count("\n") == 1
    assert left.returncode == 2
