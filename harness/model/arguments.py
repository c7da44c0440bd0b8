"""What transformers' users give to `from_pretrained`: obeyed or refused, never ignored.

A folder or a name of the hub -> a folder; dtype and device_map -> Precision and device.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from harness.errors import ConfigError, reason_of
from harness.machine.network import why_no_hub
from harness.machine.precision import Precision, Requested, choose
from harness.model.places import is_hub_id

MODEL_TYPE = "harness_vlm"  # in the config.json of every model that we save
# They say where a name of the hub is looked up; to a folder they say nothing.
OF_THE_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token")
# Auto classes and pipelines hand them on, whatever the user gave; no code of a model is run here.
OF_AUTO_CLASSES = ("_commit_hash", "_from_auto", "adapter_kwargs", "trust_remote_code")
OF_DTYPE = ("dtype", "torch_dtype")
_PRECISIONS: dict[str, Requested] = {
    "auto": "auto",
    "bfloat16": "bf16",
    "float16": "fp16",
    "float32": "fp32",
}


def check_known(positional: tuple[Any, ...], options: Mapping[str, Any]) -> None:
    """Raises ConfigError for an argument that this class does not obey."""
    known = (*OF_THE_HUB, *OF_AUTO_CLASSES, *OF_DTYPE, "config", "device_map")
    unknown = sorted(k for k, v in options.items() if k not in known and v is not None)
    if positional or unknown:
        given = ", ".join(unknown) or f"{positional[0]!r:.60}"
        raise ConfigError(
            f"from_pretrained does not obey {given}: it takes lm, vision, with_vision, dtype or "
            f"precision, device or device_map, {', '.join(OF_THE_HUB)}"
        )


def model_folder(name: str | Path, options: Mapping[str, Any]) -> Path:
    """Returns the folder of a saved model; one of the hub is fetched into its cache. Raises
    ConfigError.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(str(name)):
        raise ConfigError(f"{name}: there is no such folder, and it is no name of the hub")
    asked = {key: options[key] for key in OF_THE_HUB if options.get(key) is not None}
    why_no_hub()  # and no library waits for it
    fetch = partial(snapshot_download, str(name), **asked)
    try:
        described = Path(fetch(allow_patterns=["config.json"]), "config.json")
        if json.loads(described.read_bytes()).get("model_type") == MODEL_TYPE:
            return Path(fetch())  # whole: it may hold its parts
        raise ValueError("it is a model of another kind")
    except Exception as error:  # whatever the network does wrong, the remedy is the same
        raise ConfigError(
            f"{name} is neither a folder nor a model that the hub gave ({reason_of(error)}): give "
            "the folder of a saved model, or fetch it where there is a network (hf download "
            f"{name})"
        ) from error


def device_of(device: Any, device_map: Any) -> torch.device:
    """Returns the one device on which the model will lie, the CPU where none is given. Raises
    ConfigError for a model spread over several.
    """
    asked = device_map
    if isinstance(asked, Mapping) and set(asked) == {""}:
        asked = asked[""]
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        if device is not None and asked is not None and torch.device(device) != torch.device(asked):
            raise ValueError(f"device={device} says another")
        return torch.device(next(d for d in (device, asked, "cpu") if d is not None))
    except (RuntimeError, TypeError, ValueError) as error:
        raise ConfigError(
            f"device_map={device_map!r}: expected auto or one device, as cpu or cuda:0, since the "
            f"model lies on one alone ({' '.join(str(error).split())})"
        ) from error


def precision_of(
    precision: Precision | None, options: Mapping[str, Any], device: torch.device
) -> Precision:
    """Returns what the parts compute in. As in training, weights that are not in 4 bits stay in
    fp32, which a dtype does not change. Raises ConfigError for what the device cannot do.
    """
    given = {key: options[key] for key in OF_DTYPE if options.get(key) is not None}
    if not given:
        return precision or choose("auto", device)
    key = next(iter(given))
    name = str(given[key]).removeprefix("torch.")
    if precision is not None or name not in _PRECISIONS:
        raise ConfigError(
            f"{key}={name}: expected {', '.join(_PRECISIONS)}, and no precision beside it"
        )
    try:
        return choose(_PRECISIONS[name], device)
    except ConfigError as error:
        raise ConfigError(f"{key}={name}: {error}") from error
