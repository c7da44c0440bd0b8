"""launch/torchrun.sh and launch/slurm.sbatch, with programs of ours in place of torchrun's run and
Slurm's commands.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parent.parent / "launch"

# In place of python. For a program of ours (-c, -) it is the real one. As the run, it writes down
# what it was given,
# waits for a SIGTERM if $FAKE_WAITS says so, "saves" and exits with 143, as harness.train does.
# torchrun is its parent.
PYTHON = """#!/bin/bash
case "$*" in
"-c "*) exec {python} "$@" ;;
"- "*) # the program that hands a signal on, to the launcher $2
    {python} "$@"
    while [ -n "$FAKE_SLOW" ] && kill -0 "$2"; do sleep 0.05; done 2>/dev/null ;;
"-m torch.distributed.run "*)
    echo "$@" >>"$TOLD/torchrun"
    trap 'touch "$TOLD/torchrun-signalled"' TERM
    for rank in 0 1; do RANK=$rank "$0" -m harness.train & runs+=" $!"; done
    for run in $runs; do wait "$run" || exit_code=1; done
    exit "${{exit_code:-0}}" ;;
"-m harness.train"*)
    echo "$@" >>"$TOLD/train$RANK"
    told='^(ACCELERATE|RANK|LOCAL_RANK|WORLD_SIZE|LOCAL_WORLD|MASTER|OMP)'
    env | grep -E "$told" >>"$TOLD/environment$RANK"
    trap 'sleep 0.2; touch "$TOLD/saved$RANK"; exit "${{FAKE_AFTER:-143}}"' TERM
    touch "$TOLD/${{TRAPPED:-started$RANK}}"
    for _ in $(seq "${{FAKE_WAITS:-0}}"); do sleep 0.1; done
    exit "${{FAKE_CODE:-0}}" ;;
esac
"""
# As Slurm's srun: SIGTERM would kill the tasks, so nothing may send it.
SRUN = """#!/bin/bash
echo "$@" >"$TOLD/srun"
echo $$ >"$TOLD/step"
trap 'touch "$TOLD/srun-signalled"' TERM
while [[ "$1" == --* ]]; do shift; done
SLURM_PROCID=5 SLURM_LOCALID=1 "$@" &
echo $! >"$TOLD/task"
wait $!
"""
SCANCEL = """#!/bin/bash
echo "$@" >>"$TOLD/scancel"
kill -TERM "$(cat "$TOLD/task")"
while [ -n "$FAKE_SLOW" ] && kill -0 "$(cat "$TOLD/step")"; do sleep 0.05; done 2>/dev/null
"""
SLURM = {
    "srun": SRUN,
    "scancel": SCANCEL,
    "scontrol": '#!/bin/bash\n[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" '
    '>>"$TOLD/scontrol"\n',
}
JOB = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_NTASKS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_CPUS_PER_TASK": "6",
}


@pytest.fixture
def start(tmp_path):
    """Starts a script from a folder of its own, with what `TOLD` collects read by `told(name)`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in {"python": PYTHON.format(python=sys.executable), **SLURM}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    (tmp_path / "a folder").mkdir()
    clean = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM", "ACCELERATE", "RANK", "MASTER"))
    }

    def _start(script: Path, *arguments: str, **environment: str) -> subprocess.Popen:
        changed = {
            **clean,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "TOLD": str(tmp_path),
            **environment,
        }
        return subprocess.Popen(
            ["bash", script, *arguments],
            cwd=tmp_path / "a folder",
            env=changed,
            stderr=subprocess.PIPE,
            text=True,
        )

    def told(name: str) -> str:
        return (tmp_path / name).read_text() if (tmp_path / name).exists() else ""

    _start.told = told
    _start.there = lambda name: (tmp_path / name).exists()
    return _start


def signalled(script: subprocess.Popen, start, names: list[str], number: signal.Signals) -> int:
    """The exit code of a script that got a signal as soon as all of `names` were there."""
    deadline = time.monotonic() + 60
    while (
        not all(map(start.there, names)) and script.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.02)
    script.send_signal(number)
    return script.wait(60)


def test_torchrun_starts_one_machine_and_several(start):
    run = start(LAUNCH / "torchrun.sh", "configs/scale.yaml", "out=a b", NPROC_PER_NODE="2")
    assert run.wait(60) == 0
    wanted = (
        "-m torch.distributed.run --standalone --nproc_per_node 2 "
        "-m harness.train configs/scale.yaml out=a b\n"
    )
    assert start.told("torchrun") == wanted
    assert "ACCELERATE" not in start.told("environment0")
    assert "OMP_WAIT_POLICY=PASSIVE" in start.told("environment0")

    four = {"NNODES": "4", "NODE_RANK": "3", "MASTER_ADDR": "10.0.0.1", "NPROC_PER_NODE": "8"}
    deepspeed = {"LAUNCH": "zero2", "ZERO_STAGE": "1", "ACCELERATE_USE_CPU": "true"}
    assert start(LAUNCH / "torchrun.sh", "scale", **four, **deepspeed).wait(60) == 0
    where = "--nnodes 4 --node_rank 3 --master_addr 10.0.0.1 --master_port 29500 --nproc_per_node 8"
    assert where in start.told("torchrun")
    said = start.told("environment1")
    assert "ACCELERATE_DEEPSPEED_CONFIG_FILE=launch/deepspeed/zero2.json" in said
    assert "ACCELERATE_DEEPSPEED_ZERO_STAGE=1" in said
    assert "ACCELERATE_USE_CPU" not in said  # beside DeepSpeed it would give plain DDP


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ([], {}, "a config is missing"),
        (["x"], {"NNODES": "2"}, "NNODES=2 needs NODE_RANK, from 0 to 1"),
        (["x"], {"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2 needs MASTER_ADDR"),
        (["x"], {"NPROC_PER_NODE": ""}, "this machine has no GPU; NPROC_PER_NODE=2"),
        (["x"], {"LAUNCH": "zero4"}, "LAUNCH=zero4 : expected multi_gpu, zero2"),
        (["x"], {"LAUNCH": "zero3_offload", "ZERO_STAGE": "2"}, "with ZERO_STAGE=2: expected"),
        (["x"], {"PYTHON": "python3.99"}, "there is no python3.99"),
        (["x"], {"PYTHON": "false"}, "harness is not installed for"),
    ],
)
def test_torchrun_says_in_one_sentence_what_is_missing(start, arguments, environment, said):
    run = start(LAUNCH / "torchrun.sh", *arguments, **{"NPROC_PER_NODE": "1", **environment})
    _, stderr = run.communicate(timeout=60)
    assert (run.returncode, stderr.count("\n")) == (2, 1)
    assert stderr.startswith("harness: ")
    assert said in stderr
    assert not start.there("torchrun")


@pytest.mark.parametrize(
    "slow", ["", "yes"]
)  # handing the signal on takes longer than the run then needs to end
@pytest.mark.parametrize(
    ("after", "code"), [("143", 143), ("0", 0)]
)  # saved; at its last step already
def test_a_signal_reaches_the_run_and_not_torchrun_that_would_kill_it(start, after, code, slow):
    faked = {"FAKE_WAITS": "300", "FAKE_AFTER": after, "FAKE_SLOW": slow}
    run = start(LAUNCH / "torchrun.sh", "scale", NPROC_PER_NODE="2", **faked)
    assert signalled(run, start, ["started0", "started1"], signal.SIGTERM) == code
    assert start.there("saved0")
    assert start.there("saved1")
    assert not start.there("torchrun-signalled")


def test_a_job_starts_a_task_for_each_gpu_and_tells_it_who_it_is(start):
    job = start(
        LAUNCH / "slurm.sbatch", "configs/scale.yaml", "out=a b", **JOB, LAUNCH="zero3_offload"
    )
    assert job.wait(60) == 0, job.stderr.read()
    assert start.told("train5") == "-m harness.train configs/scale.yaml out=a b --resume auto\n"
    assert "--kill-on-bad-exit=1" in start.told("srun")
    # srun of Slurm 22.05 to 23.02 does not inherit it: a task would have one core.
    assert " --cpus-per-task=6 bash " in start.told("srun")
    said = set(start.told("environment5").splitlines())
    assert {
        "RANK=5",
        "LOCAL_RANK=1",
        "WORLD_SIZE=8",
        "LOCAL_WORLD_SIZE=4",
        "MASTER_ADDR=node7",
    } <= said
    assert {
        "ACCELERATE_USE_DEEPSPEED=true",
        "ACCELERATE_DEEPSPEED_ZERO_STAGE=3",
        "OMP_WAIT_POLICY=PASSIVE",
    } <= said
    assert not start.there("scontrol")


@pytest.mark.parametrize(
    "slow", ["", "yes"]
)  # scancel takes longer than the run needs to save and end
@pytest.mark.parametrize(
    ("number", "requeued"),
    [
        (signal.SIGUSR1, "requeue 1234\n"),
        (signal.SIGTERM, ""),
    ],  # time nearly up; preempted or cancelled
)
def test_a_job_saves_before_its_time_is_up_and_is_requeued(start, number, requeued, slow):
    job = start(LAUNCH / "slurm.sbatch", "scale", **JOB, FAKE_WAITS="300", FAKE_SLOW=slow)
    code = signalled(job, start, ["started5", "task"], number)
    assert code == (0 if requeued else 143)
    assert start.there("saved5")
    assert start.told("scancel") == "--signal=TERM 1234\n"
    assert not start.there("srun-signalled")
    assert start.told("scontrol") == requeued


def test_a_job_that_failed_is_not_requeued_also_when_its_time_is_up(start):
    assert start(LAUNCH / "slurm.sbatch", "scale", **JOB, FAKE_CODE="3").wait(60) == 3
    job = start(LAUNCH / "slurm.sbatch", "scale", **JOB, FAKE_WAITS="10", FAKE_CODE="143")
    assert job.wait(60) == 143  # a SIGTERM that nobody asked for
    job = start(
        LAUNCH / "slurm.sbatch", "scale", **JOB, FAKE_WAITS="300", FAKE_AFTER="1", TRAPPED="asked5"
    )
    assert signalled(job, start, ["asked5"], signal.SIGUSR1) == 1  # it could not save
    assert not start.there("scontrol")
