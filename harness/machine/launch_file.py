"""What a launch file of accelerate says: read and held against what harness can start.

A name or a path -> Launch, or one sentence that names file and key. Imports no torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.config.load import shipped
from harness.errors import ConfigError
from harness.machine.deepspeed_settings import (
    DeepSpeedSettings,
    check_keys,
    read_document,
    read_settings,
)

# Those of accelerate's ClusterConfig, and what older versions wrote.
KEYS = (
    *("command_file", "commands", "compute_environment", "debug", "deepspeed_config"),
    *("distributed_type", "downcast_bf16", "dynamo_backend", "dynamo_config"),
    *("enable_cpu_affinity", "fp16", "fp8_config", "fsdp_config", "gpu_ids", "machine_rank"),
    *("main_process_ip", "main_process_port", "main_training_function", "megatron_lm_config"),
    *("mixed_precision", "mpirun_config", "num_machines", "num_processes", "parallelism_config"),
    *("rdzv_backend", "same_network", "tpu_env", "tpu_name", "tpu_use_cluster", "tpu_use_sudo"),
    *("tpu_vm", "tpu_zone", "use_cpu"),
)
INSTEAD = {
    "FSDP": "weights are divided by DeepSpeed alone, take --launch zero2 or zero3_offload",
    "MULTI_CPU": "accelerate starts a single process for it, take --launch cpu --processes 2",
}
NO_ZERO_FOR_A_FIRST_STAGE = (
    "train.objective: a first stage trains a Q-Former alone, whose state every GPU holds: ZeRO is "
    "not for it, take --launch multi_gpu (DDP)"
)
OFF: tuple[Any, ...] = (None, False, "no", "NO", "No", {}, "")


@dataclass(frozen=True)
class Launch:
    """What a launch file (accelerate's YAML, and the DeepSpeed JSON that it names) says."""

    name: str = ""  # "zero2_offload"; "" where no file was given
    file: Path | None = None
    processes: int | None = None  # over all machines; None: not said, one for each GPU
    machines: int = 1
    deepspeed: DeepSpeedSettings | None = None  # None: one process, or DDP
    single: bool = False  # one process, without torchrun
    cpu: bool = False  # hides the GPUs
    said: tuple[str, ...] = ()  # sentences on what in it does not decide

    @property
    def zero_stage(self) -> int | None:
        return self.deepspeed.stage if self.deepspeed else None

    @property
    def offload_optimizer(self) -> bool:
        return bool(self.deepspeed and self.deepspeed.offloads("offload_optimizer"))

    @property
    def offload_parameters(self) -> bool:
        return bool(self.deepspeed and self.deepspeed.offloads("offload_param"))


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
    document = read_document(file)
    kind = _kind(file, document)
    _check_rooms(file, document)
    uses_cpu = bool(document.get("use_cpu"))
    deepspeed = None
    if kind == "DEEPSPEED":
        if uses_cpu:
            raise ConfigError(f"{file}: use_cpu: accelerate does not obey it with DeepSpeed")
        deepspeed = read_settings(document.get("deepspeed_config") or {}, str(file), zero_stage)
    elif zero_stage is not None:
        raise ConfigError(
            f"--zero-stage {zero_stage}: {file} is without DeepSpeed; "
            "zero2 is the launch file for it"
        )
    return Launch(
        name=file.stem,
        file=file,
        processes=_count(file, document, "num_processes"),
        machines=_count(file, document, "num_machines") or 1,
        deepspeed=deepspeed,
        single=kind == "NO",
        cpu=uses_cpu or str(document.get("gpu_ids", "")).startswith("-1"),
        said=tuple(_undecided(file, document)),
    )


def is_on(environment: Mapping[str, str], name: str) -> bool:
    """Tells whether accelerate takes one of its switches for true."""
    return environment.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true", "yes")


def check_accelerates_environment(environment: Mapping[str, str]) -> list[str]:
    """Returns sentences on what `accelerate launch` was told and does not decide.

    Raises ConfigError for what harness does not do, where accelerate was started without it.
    """
    for switch in ("FSDP", "MEGATRON_LM", "PARALLELISM_CONFIG"):
        if is_on(environment, switch):
            instead = INSTEAD["FSDP"]
            raise ConfigError(f"accelerate launch was told to use {switch}: {instead}")
    _check_dynamo("accelerate launch", environment.get("ACCELERATE_DYNAMO_BACKEND"))
    return _precision("accelerate launch", environment.get("ACCELERATE_MIXED_PRECISION"))


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


def _kind(file: Path, document: Mapping[str, Any]) -> str:
    """Returns NO, MULTI_GPU or DEEPSPEED."""
    if "zero_optimization" in document and "distributed_type" not in document:
        raise ConfigError(
            f"{file}: is DeepSpeed's, expected accelerate's: name it in a launch file as "
            "shipped zero2.yaml does, under deepspeed_config_file"
        )
    check_keys(document, KEYS, str(file))
    kind = document.get("distributed_type")
    if kind is False:  # YAML's reading of NO without quotes
        return "NO"
    if kind not in ("NO", "MULTI_GPU", "DEEPSPEED"):
        instead = INSTEAD.get(str(kind), "expected 'NO', MULTI_GPU or DEEPSPEED")
        raise ConfigError(f"{file}: distributed_type is {kind!r}: {instead}")
    return kind


def _check_rooms(file: Path, document: Mapping[str, Any]) -> None:
    """Raises ConfigError for what accelerate can do and harness cannot."""
    place = document.get("compute_environment", "LOCAL_MACHINE")
    if place != "LOCAL_MACHINE":
        raise ConfigError(f"{file}: compute_environment is {place!r}, expected LOCAL_MACHINE")
    for key in ("fp8_config", "fsdp_config", "megatron_lm_config", "parallelism_config"):
        if document.get(key) not in OFF:
            raise ConfigError(f"{file}: {key}: harness has no such thing, take it out")
    dynamo = document.get("dynamo_config") or {}
    backend = dynamo.get("dynamo_backend", dynamo.get("backend"))
    _check_dynamo(str(file), backend or document.get("dynamo_backend"))


def _check_dynamo(where: str, backend: Any) -> None:
    if backend not in OFF:
        raise ConfigError(
            f"{where}: dynamo_backend is {backend}: harness compiles nothing (its batches change "
            "their shape with each step), take it out"
        )


def _undecided(file: Path, document: Mapping[str, Any]) -> list[str]:
    precision = document.get("mixed_precision")
    if precision in OFF and document.get("fp16"):
        precision = "fp16"
    return _precision(str(file), precision)


def _precision(where: str, precision: Any) -> list[str]:
    if precision in OFF:
        return []
    return [f"{where}: mixed_precision is {precision}, which decides nothing: train.precision does"]


def _count(file: Path, document: Mapping[str, Any], key: str) -> int | None:
    """Returns a number of processes or machines; None where it is left open."""
    found = document.get(key)
    if found in (None, "gpu", "auto", -1):  # torchrun's words, and accelerate's "not said"
        return None
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ConfigError(f"{file}: {key} is {found!r}, expected a number from 1")
    return found
