"""What a launch file says, and how `harness.train` is started by it on this machine, through
`accelerate launch`.

Launch file, number of processes -> command line and environment -> exit code. Imports no torch;
nvidia-smi counts GPUs.
"""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from harness.config.load import shipped
from harness.errors import ConfigError, install_command
from harness.machine.devices import cards, cores
from harness.machine.parent import as_parent
from harness.machine.ranks import check_not_started_as_several, without_ranks
from harness.machine.signals import STOPS, signal_run


@dataclass(frozen=True)
class Launch:
    """What a launch file (accelerate's YAML, and the DeepSpeed JSON that it names) says."""

    name: str = ""  # "zero2_offload"; "" where no file was given
    file: Path | None = None
    processes: int | None = None  # over all machines; None: not said, one for each GPU
    machines: int = 1
    zero_stage: int | None = None  # None: no DeepSpeed (one process, or DDP)
    offload_optimizer: bool = False
    offload_parameters: bool = False
    single: bool = False  # one process, without torchrun
    cpu: bool = False  # hides the GPUs


def read_launch(name_or_file: str | Path | None, zero_stage: int | None = None) -> Launch:
    """Reads a launch file: a path, or the name of a shipped one (`zero2`, also
    `launch/accelerate/zero2.yaml`).

    `zero_stage` is used in place of the file's, where that leaves it open. Raises ConfigError
    naming file and key.
    """
    if name_or_file is None:
        if zero_stage is not None:
            raise ConfigError(f"--zero-stage {zero_stage} needs DeepSpeed: give --launch zero2 too")
        return Launch()
    file = _find(Path(name_or_file))
    document = _read(file)
    kind = document.get("distributed_type")
    offload: dict[str, str] = {}
    if kind not in ("NO", "MULTI_GPU", "DEEPSPEED"):
        raise ConfigError(
            f"{file}: distributed_type is {kind!r}, expected 'NO', MULTI_GPU or DEEPSPEED"
        )
    if kind == "DEEPSPEED":
        zero_stage, offload = _zero(file, document.get("deepspeed_config") or {}, zero_stage)
    elif zero_stage is not None:
        raise ConfigError(
            f"--zero-stage {zero_stage}: {file} is without DeepSpeed; "
            "zero2 is the launch file for it"
        )
    processes = document.get("num_processes")
    return Launch(
        name=file.stem,
        file=file,
        processes=processes if isinstance(processes, int) and processes > 0 else None,
        machines=document.get("num_machines") or 1,
        zero_stage=zero_stage,
        offload_optimizer=offload.get("offload_optimizer", "none") != "none",
        offload_parameters=offload.get("offload_param", "none") != "none",
        single=kind == "NO",
        cpu=bool(document.get("use_cpu")) or str(document.get("gpu_ids", "")).startswith("-1"),
    )


def deepspeed_file(name: str | Path) -> Path:
    """Returns the DeepSpeed JSON that a launch file names: as it stands, else the shipped one, so
    that any folder will do.
    """
    file = Path(name)
    inside = Path(*file.parts[1:]) if file.parts[:1] == ("launch",) else file
    found = next((there for there in (file, shipped("launch") / inside) if there.is_file()), None)
    if found is None:
        raise ConfigError(
            f"deepspeed_config_file: there is no file {name}, neither here nor in "
            f"{shipped('launch')}"
        )
    return found


def _find(file: Path) -> Path:
    if file.is_file():
        return file
    ours = {f.stem: f for f in sorted((shipped("launch") / "accelerate").glob("*.yaml"))}
    if (
        str(file.parent) in (".", "launch/accelerate")
        and file.suffix in ("", ".yaml")
        and file.stem in ours
    ):
        return ours[file.stem]
    near = difflib.get_close_matches(file.stem, ours, n=1)
    hint = f"did you mean {near[0]}?" if near else f"the shipped ones are {', '.join(ours)}"
    raise ConfigError(f"--launch {file}: no such launch file; {hint}")


def _read(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        document = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"{file}: expected a mapping of keys such as distributed_type or zero_optimization"
        )
    return document


def _zero(file: Path, plugin: Mapping[str, Any], asked: int | None) -> tuple[int, dict[str, str]]:
    """Returns the ZeRO stage, and where optimizer states and parameters lie: as accelerate's plugin
    will decide.
    """
    if named := plugin.get("deepspeed_config_file"):
        file = deepspeed_file(named)
        zero = _read(file).get("zero_optimization") or {}
        fixed = zero.get("stage", 0)
        offload = {
            key: (zero.get(key) or {}).get("device", "none")
            for key in ("offload_optimizer", "offload_param")
        }
    else:
        fixed = "auto" if asked is not None else plugin.get("zero_stage", "auto")
        offload = {
            key: plugin.get(f"{key}_device", "none")
            for key in ("offload_optimizer", "offload_param")
        }
    stage = (2 if asked is None else asked) if fixed == "auto" else fixed
    if asked not in (None, stage):
        raise ConfigError(
            f"--zero-stage {asked}: {file} fixes stage {stage}; --launch zero2 leaves it open"
        )
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"{file}: ZeRO has the stages 0 to 3, found {stage!r}")
    return stage, offload


def gpus(environment: Mapping[str, str] = os.environ) -> int:
    """Returns how many GPUs a process started from here would see."""
    return len(cards(environment))


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
        if not key.startswith("ACCELERATE_USE_")
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
    processes = processes or launch.processes or max(found, 1)
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
