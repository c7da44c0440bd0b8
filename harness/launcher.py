"""Starts `harness.train` on one or several processes of this machine, through `accelerate launch`.

Number of processes -> command line and environment -> exit code. Imports no torch; the GPUs are counted by nvidia-smi.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

import psutil

from harness.config import ConfigError


def gpus(environment: Mapping[str, str] = os.environ) -> int:
    """How many GPUs a process started from here would see."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    return count if visible is None else min(count, sum(part not in ("", "-1") for part in visible.split(",")))


def command(
    arguments: Sequence[str],
    processes: int | None = None,
    *,
    module: str = "harness.train",
    environment: Mapping[str, str] = os.environ,
) -> tuple[list[str], dict[str, str]]:
    """The command line of `python -m module arguments` on `processes` (none: one for each GPU, or one), and its
    environment. Raises ConfigError for more processes than GPUs, where there are any."""
    found = gpus(environment)
    processes = max(found, 1) if processes is None else processes
    if processes < 1 or (found and processes > found):
        raise ConfigError(f"--processes {processes}: expected 1 to {found or 'the number of CPU cores'}")
    threads = environment.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // processes))
    # Threads that spin while they wait make a small step 100 times slower as soon as another process is busy.
    changed = {**environment, "OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": threads}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--num_cpu_threads_per_process", threads, "--num_processes", str(processes)]
    if processes > 1:
        # On the CPU too: `--cpu --num_processes 2` would start a single process. Port 0: a free one.
        launch += ["--multi_gpu", "--main_process_port", "0"]
        if not found:
            changed["ACCELERATE_USE_CPU"] = "true"
    return [*launch, "-m", module, *arguments], changed


def launch(arguments: Sequence[str], processes: int | None = None, *, module: str = "harness.train") -> int:
    """Runs it to its end and returns its exit code. A signal goes on to the run: it saves and stops; the third kills.

    `accelerate launch` itself would die of the signal and leave the run behind, so the run has a session of its own.
    """
    line, environment = command(arguments, processes, module=module)
    child = subprocess.Popen(line, env=environment, start_new_session=True)
    signals = 0

    def pass_on(number: int, frame: object) -> None:
        nonlocal signals
        signals += 1
        if signals > 2:
            os.killpg(child.pid, signal.SIGKILL)
        else:  # torchrun hands it to its workers; for one process accelerate does not
            started = [] if "--multi_gpu" in line else psutil.Process(child.pid).children()
            for process in started or [child]:
                process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        code = child.wait()
        return code if code >= 0 else 128 - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
