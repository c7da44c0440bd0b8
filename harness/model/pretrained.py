"""Pretrained models by hub id or folder: their files, their weights, and one sentence for what is
wrong with them.

The key of the config and what it names -> paths, or a complete model. Nothing that runs code is
read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file, logging

from harness.errors import ConfigError, reason_of
from harness.machine.network import why_no_hub


def without_weights() -> bool:
    """Returns whether a model is built from config.json alone, its weights mere shapes: it is
    inside `torch.device("meta")`, as plan/skeleton.py enters.
    """
    return torch.get_default_device().type == "meta"


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Silences progress bars and load reports: what matters in them is checked by the caller and
    refused in words.
    """
    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def loading(key: str, name: str, remedy: str) -> Iterator[None]:
    """Turns what goes wrong in loading the model `name`, which the config's `key` names, into one
    ConfigError that ends with the remedy.
    """
    is_folder = Path(name).expanduser().is_dir()
    try:
        if not is_folder:
            why_no_hub()  # and no library tries for minutes
        yield
    except ConfigError:
        raise
    # A damaged file raises half a dozen types, one of tokenizers a bare Exception.
    except Exception as error:
        reason = reason_of(error)
        if not is_folder and isinstance(error, OSError) and (no_hub := why_no_hub()):
            reason = f"no such folder, not in the local cache, and {no_hub}"
        if without_weights():
            raise ConfigError(
                f"{key}: {name!r} cannot be planned ({reason}): its config.json is all that is "
                f"needed, in a folder ({key}=DIR), or once where there is a network "
                f"(hf download {name} config.json)"
            ) from error
        raise ConfigError(f"{key}: {name!r} cannot be loaded ({reason}): {remedy}") from error


def remedy(name: str) -> str:
    """Returns what helps where the weights of a model are not found."""
    return (
        "give a folder that holds config.json and model.safetensors, or fetch the model once where "
        f"there is a network (hf download {name})"
    )


def load_complete(
    architecture: Any,
    key: str,
    name: str | None,
    revision: str | None,
    *,
    new: str = "",
    **fields: Any,
) -> Any:
    """Returns the model of transformers with all its weights from its files, but for those with
    `new` in their names. Raises ConfigError where others are missing, which would be random.
    """
    loaded = architecture.from_pretrained(
        name, revision=revision, output_loading_info=True, **fields
    )
    if absent := sorted(k for k in loaded[1]["missing_keys"] if not (new and new in k)):
        raise ConfigError(
            f"{key}: {name!r} lacks {len(absent)} weights of a {type(loaded[0]).__name__} "
            f"({absent[0]}, ...), which would be random: use a complete model of that kind"
        )
    return loaded[0]


def saved_file(name: str, file: str, revision: str | None = None) -> Path | None:
    """Returns where a file of a model lies, None if it has none of that name. Raises OSError where
    there is no such model.
    """
    found = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)


def needed_file(name: str, file: str, revision: str | None = None) -> Path:
    """Returns where a file of a model lies. Raises OSError if it is not there."""
    found = saved_file(name, file, revision)
    if found is None:
        raise OSError(f"it holds no {file}: it is not a saved model")
    return found


def weight_files(name: str, revision: str | None = None) -> dict[str, list[str]]:
    """Returns the weight files of a model, safetensors before .bin, each with the names of its
    tensors where an index tells them; {} where there is no such file. Raises OSError.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if saved_file(name, single, revision):
            return {single: []}
        if index := saved_file(name, f"{single}.index.json", revision):
            names_of_shard: dict[str, list[str]] = {}
            for tensor, shard in json.loads(index.read_text())["weight_map"].items():
                names_of_shard.setdefault(shard, []).append(tensor)
            return names_of_shard
    return {}
