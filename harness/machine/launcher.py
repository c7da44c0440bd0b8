"""How `harness.train` is started on this machine, by a launch file, through `accelerate launch`.

Launch file, number of processes -> command line and environment -> exit code. Imports no torch;
nvidia-smi counts GPUs.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from harness.config.schema import TrainConfig
from harness.errors import ConfigError, install_command
from harness.machine.devices import cards, cores
from harness.machine.launch_file import Launch, read_launch
from harness.machine.parent import as_parent
from harness.machine.ranks import check_not_started_as_several, without_ranks
from harness.machine.signals import STOPS, signal_run

# Left over in a shell they would say what the launch file alone decides.
DECIDED = tuple(f"ACCELERATE_{what}_" for what in ("USE", "DEEPSPEED", "DYNAMO", "GRADIENT"))


def gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Returns how many GPUs a process started from here would see."""
    return len(cards(environment))


def undecided(launch: Launch, train: TrainConfig, processes: int | None) -> tuple[str, ...]:
    """Returns sentences on what of a launch file decides nothing; what DeepSpeed's settings say in
    vain is told by the run itself.

    Raises ConfigError where its DeepSpeed says otherwise than the config.
    """
    if launch.deepspeed:
        if train.precision == "fp16":
            raise ConfigError(
                "train.precision is fp16: DeepSpeed would stall it in silence, take --launch "
                "multi_gpu (DDP)"
            )
        launch.deepspeed.agreed(train, _processes(launch, processes, gpus()))
    return launch.said


def _processes(launch: Launch, asked: int | None, gpus_here: int) -> int:
    return asked or launch.processes or max(gpus_here, 1)


def _check_startable(launch: Launch, processes: int, gpus_here: int) -> None:
    """Raises ConfigError for what this machine cannot start."""
    if gpus_here and processes > gpus_here:
        raise ConfigError(
            f"--processes {processes}: this machine has {gpus_here} GPUs; expected 1 to {gpus_here}"
        )
    if launch.single and processes > 1:
        raise ConfigError(
            f"--processes {processes}: {launch.file} starts one; "
            "multi_gpu is the launch file for more"
        )
    if launch.machines > 1:
        raise ConfigError(
            f"--launch {launch.name} is for {launch.machines} machines and harness train starts "
            "processes on one: use launch/slurm.sbatch, or launch/torchrun.sh on each"
        )
    if launch.zero_stage is not None and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(f"--launch {launch.name} needs DeepSpeed: {install_command('deepspeed')}")


def _environment(
    environment: Mapping[str, str], launch: Launch, gpus_here: int, threads: str
) -> dict[str, str]:
    """Returns the variables that a run is started with."""
    # The launch file alone decides: ACCELERATE_USE_CPU beside DeepSpeed would silently give plain
    # DDP.
    # Ranks, MASTER_ADDR and MASTER_PORT, which some platforms export, are accelerate's to choose on
    # one machine: all of them, since torch takes a half for a whole.
    changed = {
        key: value
        for key, value in without_ranks(environment).items()
        if not key.startswith(DECIDED)
    }
    # Threads that spin while they wait make a small step 100 times slower as soon as another
    # process is busy.
    changed |= {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads}
    if launch.zero_stage is None and not gpus_here:
        changed["ACCELERATE_USE_CPU"] = "true"
    if not gpus_here:
        # Else accelerate's DeepSpeed says on stdout that it found no GPU.
        changed.setdefault("DS_ACCELERATOR", "cpu")
    return changed


def command(
    arguments: Sequence[str],
    processes: int | None = None,
    *,
    launch: Launch | None = None,
    module: str = "harness.train",
    environment: Mapping[str, str] = os.environ,
) -> tuple[list[str], dict[str, str]]:
    """Returns the command line of `python -m module arguments` on `processes`, and its environment.

    Without `processes` the launch file decides, else the number of GPUs, or one. Without a launch
    file it is t4, multi_gpu or cpu, as the machine is. Raises ConfigError for what this machine
    cannot start.
    """
    check_not_started_as_several(environment)
    launch = launch or Launch()
    found = 0 if launch.cpu else gpus(environment)
    processes = _processes(launch, processes, found)
    if launch.file is None:
        launch = read_launch("t4" if processes == 1 else "multi_gpu" if found else "cpu")
    _check_startable(launch, processes, found)
    threads = environment.get("OMP_NUM_THREADS") or str(max(1, cores() // processes))
    changed = _environment(environment, launch, found, threads)
    line = [sys.executable, "-m", "harness.machine.accelerated"]
    line += ["--config_file", str(launch.file)]
    # "no" on the line, not only in the file: accelerate refuses it in a file that names a DeepSpeed
    # JSON.
    line += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1"]
    line += ["--main_process_port", "0"]  # a free one, whatever port the file names
    line += ["--num_cpu_threads_per_process", threads, "--num_processes", str(processes)]
    if launch.zero_stage is not None:
        line += ["--zero_stage", str(launch.zero_stage)]
    return [*line, "-m", module, *arguments], changed


def launch(
    arguments: Sequence[str],
    processes: int | None = None,
    *,
    launch_file: Launch | None = None,
    module: str = "harness.train",
) -> int:
    """Runs it to its end and returns its exit code, 128 + the signal's number for a run that was
    stopped by one.

    A signal goes on to the run: it saves and stops; the third kills.

    `accelerate launch` itself would die of the signal and leave the run behind, so the run has a
    session of its own. Where this process is killed, the run is sent a SIGTERM.
    """
    line, environment = command(arguments, processes, launch=launch_file, module=module)
    child = subprocess.Popen(line, env=environment | as_parent(), start_new_session=True)
    came: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        came.append(number)
        if len(came) > 2:
            os.killpg(child.pid, signal.SIGKILL)
            return
        signal_run(number, child.pid)

    before = {number: signal.signal(number, pass_on) for number in STOPS}
    try:
        code = child.wait()
        if came and code:
            return 128 + came[0]
        return code if code >= 0 else 128 - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
