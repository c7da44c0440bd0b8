"""What a launch file says of DeepSpeed, as settings that DeepSpeed takes without a guess.

Accelerate's own keys, or the DeepSpeed JSON that they name -> ZeRO's settings with no "auto" left
in them, and what else they say, held against the config, which decides it. Imports no torch.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from harness.config.keys import leaves
from harness.config.load import shipped
from harness.config.schema import TrainConfig
from harness.errors import ConfigError

OFFLOADS = ("offload_optimizer", "offload_param")
# What `accelerate config` asks beside a DeepSpeed JSON, and what it asks in place of one.
BESIDE_A_FILE = (
    "deepspeed_config_file",
    "deepspeed_exclusion_filter",
    "deepspeed_hostfile",
    "deepspeed_inclusion_filter",
    "deepspeed_moe_layer_cls_names",
    "deepspeed_multinode_launcher",
    "zero3_init_flag",
)
INLINE = (
    "gradient_accumulation_steps",
    "gradient_clipping",
    *(f"{offload}_{what}" for offload in OFFLOADS for what in ("device", "nvme_path")),
    "zero3_save_16bit_model",
    "zero_stage",
)
# Of ZeRO's settings those that this project was run with, or that change no number.
NUMBERS = (
    "allgather_bucket_size",
    "reduce_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
    "stage3_model_persistence_threshold",
    "stage3_param_persistence_threshold",
    "stage3_prefetch_bucket_size",
    "sub_group_size",
)
SWITCHES = (
    "allgather_partitions",
    "contiguous_gradients",
    "ignore_unused_parameters",
    "memory_efficient_linear",
    "overlap_comm",
    "reduce_scatter",
    "round_robin_gradients",
    "stage3_gather_16bit_weights_on_model_save",
    "stage3_gather_fp16_weights_on_model_save",
    "use_multi_rank_bucket_allreduce",
)
OFFLOAD_KEYS = (
    *("buffer_count", "buffer_size", "device", "fast_init", "max_in_cpu", "nvme_path"),
    *("pin_memory", "pipeline_read", "pipeline_write"),
)
CASTS = ("fp16", "bf16", "torch_autocast", "amp")
DECIDED = (  # by the config, or by harness/train/zero.py
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
    *("gradient_clipping", "optimizer", "scheduler", *CASTS, "steps_per_print"),
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer"),
)
PASSED = ("comms_logger", "flops_profiler", "memory_breakdown", "wall_clock_breakdown")
SCHEDULES = {"WarmupCosineLR": "cosine", "WarmupLR": "constant"}
EPSILON = 1e-8  # torch's AdamW's


@dataclass(frozen=True)
class DeepSpeedSettings:
    """What one launch file gives DeepSpeed."""

    where: str  # the file that says it
    settings: dict[str, Any]  # for DeepSpeed
    decided: dict[str, Any] = field(default_factory=dict)  # said too, and the config's to say

    @property
    def zero(self) -> dict[str, Any]:
        return self.settings["zero_optimization"]

    @property
    def stage(self) -> int:
        return self.zero["stage"]

    def offloads(self, what: str) -> bool:
        """Tells whether `offload_optimizer` or `offload_param` is asked for."""
        return what in self.zero

    def agreed(self, train: TrainConfig, processes: int) -> list[str]:
        """Returns a sentence on what the config decides in place of the file, [] for nothing.

        Raises ConfigError where the file says otherwise.
        """
        ours = _ours(train, processes)
        for key, found in leaves(self.decided):
            if found == "auto" or key not in ours or _is_left_open(key, self.decided):
                continue
            name, value = ours[key]
            if not _alike(found, value):
                raise ConfigError(
                    f"{self.where}: {key} is {found!r}, but {name} {value!r}: take it out of the "
                    'file, or make it "auto", and say it in the config'
                )
        if not self.decided:
            return []
        names = ", ".join(sorted(self.decided))
        return [f"{self.where}: the config decides, not this file, on {names}"]


def read_settings(
    plugin: Mapping[str, Any], where: str, asked: int | None = None, left_open: int = 2
) -> DeepSpeedSettings:
    """Returns the settings of accelerate's `deepspeed_config`, read from the file `where`.

    `asked`: the stage of a command line; `left_open`: the one where nothing says it. Raises
    ConfigError naming file and key for what DeepSpeed, accelerate or this project cannot obey.
    """
    check_keys(plugin, (*BESIDE_A_FILE, *INLINE), f"{where}: deepspeed_config")
    if plugin.get("deepspeed_moe_layer_cls_names"):
        raise ConfigError(f"{where}: deepspeed_moe_layer_cls_names: no model here has experts")
    named = plugin.get("deepspeed_config_file")
    if named in (None, "none"):
        document = _as_json(plugin, asked is not None)
    else:
        for key in INLINE:
            if key in plugin:
                raise ConfigError(
                    f"{where}: {key} stands beside deepspeed_config_file, and accelerate takes one "
                    f"of them: say it in {named}"
                )
        file = deepspeed_file(named)
        where = str(file)
        document = read_document(file)
    check_keys(document, ("zero_optimization", *DECIDED, *PASSED), where)
    for cast in CASTS:
        given = document.get(cast)
        if isinstance(given, Mapping) and given.get("enabled") is True:
            raise ConfigError(
                f"{where}: {cast} casts the whole model, T5's `wo` with it: leave it out, "
                "train.precision says it"
            )
    zero = _zero(document.get("zero_optimization"), where, asked, left_open)
    settings = {key: document[key] for key in PASSED if key in document}
    decided = {key: document[key] for key in DECIDED if key in document}
    return DeepSpeedSettings(where, {**settings, "zero_optimization": zero}, decided)


def of_environment(environment: Mapping[str, str]) -> DeepSpeedSettings:
    """Returns the settings that `accelerate launch` or launch/engine.sh has put into the
    environment. Raises ConfigError.
    """
    stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    left_open = int(stage) if stage.isdecimal() else 2
    file = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    plugin: dict[str, Any] = {"deepspeed_config_file": file}
    if file == "none":
        plugin = {"zero_stage": left_open}
        for key in INLINE[:-1]:
            # gradient_* stand there without DEEPSPEED
            for name in (f"ACCELERATE_DEEPSPEED_{key.upper()}", f"ACCELERATE_{key.upper()}"):
                if name in environment:
                    plugin[key] = yaml.safe_load(environment[name])
    if classes := environment.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"):
        plugin["deepspeed_moe_layer_cls_names"] = classes
    return read_settings(plugin, "the launch file", left_open=left_open)


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


def read_document(file: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON or YAML file. Raises ConfigError naming the file."""
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


def check_keys(found: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raises ConfigError for the first key that is not known, with the nearest that is."""
    for key in found:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
            raise ConfigError(f"{where}: harness does not know the key {key}; {hint}")


def _as_json(plugin: Mapping[str, Any], stage_is_asked: bool) -> dict[str, Any]:
    """Returns accelerate's own keys as the DeepSpeed JSON that says the same."""
    stage = "auto" if stage_is_asked else plugin.get("zero_stage", "auto")
    # Sizes are not asked for: ours.
    zero = {"stage": stage, **dict.fromkeys(_sizes_of_ours(), "auto")}
    zero |= {key: {"device": plugin.get(f"{key}_device")} for key in OFFLOADS}
    steps = plugin.get("gradient_accumulation_steps", 1)
    decided = {} if steps == 1 else {"gradient_accumulation_steps": steps}  # 1: nothing was asked
    if "gradient_clipping" in plugin:
        decided["gradient_clipping"] = plugin["gradient_clipping"]
    return {"zero_optimization": zero, **decided}


def _sizes_of_ours() -> dict[str, Any]:
    """Returns what the shipped files say in place of an "auto"."""
    ours: dict[str, Any] = {}
    for name in ("zero3_offload", "zero2"):
        ours |= read_document(shipped("launch") / "deepspeed" / f"{name}.json")["zero_optimization"]
    return {key: value for key, value in ours.items() if key in NUMBERS or key in SWITCHES}


def _zero(zero: Any, where: str, asked: int | None, left_open: int) -> dict[str, Any]:
    """Returns ZeRO's settings, checked one by one."""
    if not isinstance(zero, Mapping):
        raise ConfigError(
            f"{where}: zero_optimization is {zero!r}, expected a mapping with a stage"
        )
    check_keys(zero, ("stage", *OFFLOADS, *NUMBERS, *SWITCHES), f"{where}: zero_optimization")
    stage = _stage(zero.get("stage", 0), where, asked, left_open)
    settings: dict[str, Any] = {"stage": stage}
    ours = _sizes_of_ours()
    for key, value in zero.items():
        if key in OFFLOADS:
            settings |= _offload(key, value, stage, where)
        elif key != "stage" and (value != "auto" or key in ours):
            settings[key] = _checked(key, ours[key] if value == "auto" else value, where)
    return settings


def _stage(fixed: Any, where: str, asked: int | None, left_open: int) -> int:
    stage = (left_open if asked is None else asked) if fixed == "auto" else fixed
    if asked not in (None, stage):
        raise ConfigError(
            f"--zero-stage {asked}: {where} fixes stage {stage}; --launch zero2 leaves it open"
        )
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ConfigError(f"{where}: ZeRO has the stages 0 to 3, found {stage!r}")
    return stage


def _offload(key: str, given: Any, stage: int, where: str) -> dict[str, Any]:
    """Returns {key: settings} for what is kept in main memory, {} for what is not."""
    if given is None or given == "auto":
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: {key} is {given!r}, expected a mapping with a device")
    check_keys(given, OFFLOAD_KEYS, f"{where}: {key}")
    device = given.get("device")
    if device in (None, "none", "auto"):
        return {}
    if device != "cpu":
        raise ConfigError(
            f"{where}: {key} to {device!r}: expected none or cpu (offload to a disk was never run)"
        )
    needed = 3 if key == "offload_param" else 1
    if stage < needed:
        raise ConfigError(
            f"{where}: {key} needs stage {needed}{' or more' if needed < 3 else ''}, found {stage}"
        )
    return {key: {name: value for name, value in given.items() if value not in (None, "auto")}}


def _checked(key: str, value: Any, where: str) -> Any:
    """Returns a number or a switch of ZeRO. Raises ConfigError for anything else."""
    is_right = isinstance(value, bool)
    if key in NUMBERS:
        is_right = not is_right and isinstance(value, int | float) and value >= 0
    if not is_right:
        kind = "a number" if key in NUMBERS else "true or false"
        raise ConfigError(f'{where}: {key} is {value!r}, expected {kind} or "auto"')
    return int(value) if key in NUMBERS else value


def _ours(train: TrainConfig, processes: int) -> dict[str, tuple[str, Any]]:
    """Returns what the config says, by DeepSpeed's name of it, with the config's name."""
    share = math.ceil(train.global_batch / processes)
    on = "" if processes == 1 else f" on {processes} processes"
    rate = ("train.learning_rate is", train.learning_rate)
    return {
        "train_batch_size": ("train.global_batch is", train.global_batch),
        "train_micro_batch_size_per_gpu": ("train.micro_batch is", train.micro_batch),
        "gradient_accumulation_steps": (
            f"train.global_batch and train.micro_batch{on} make it",
            math.ceil(share / train.micro_batch),
        ),
        "gradient_clipping": ("train.clip_norm is", train.clip_norm or 0.0),
        "optimizer.type": ("harness' optimizer is", "AdamW"),
        "optimizer.params.adam_w_mode": ("harness' optimizer is AdamW, which has it", True),
        "optimizer.params.lr": rate,
        "optimizer.params.betas": ("train.betas is", list(train.betas)),
        "optimizer.params.eps": ("harness' is", EPSILON),
        "optimizer.params.weight_decay": ("train.weight_decay is", train.weight_decay),
        "scheduler.type": ("train.schedule is", train.schedule),
        "scheduler.params.warmup_max_lr": rate,
    }


def _is_left_open(key: str, decided: Mapping[str, Any]) -> bool:
    """Tells a scheduler all of whose numbers are "auto": a template, whose type nobody chose."""
    params = decided.get("scheduler", {}).get("params") or {}
    return key == "scheduler.type" and all(value == "auto" for value in params.values())


def _alike(found: Any, ours: Any) -> bool:
    if isinstance(found, list) and isinstance(ours, list):
        return len(found) == len(ours) and all(map(_alike, found, ours))
    try:
        return math.isclose(float(found), float(ours), rel_tol=1e-9)
    except (TypeError, ValueError):
        adam = {"Adam": "AdamW", "auto": ours}  # DeepSpeed's Adam decays as AdamW does
        return {**SCHEDULES, **adam}.get(found, found) == ours
