"""Start weights of a Q-Former: those of a BERT, as BLIP-2 itself began, or those of a published
BLIP-2's Q-Former.

A hub id or folder -> tensors by the names of our own Q-Former. Nothing that runs code is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from harness.config.schema import BridgeConfig
from harness.errors import ConfigError

_OF_BERT = (
    (r"^bert\.", ""),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^embeddings\.LayerNorm\.", "layernorm."),
    (r"\.attention\.self\.", ".attention.attention."),
    (r"(encoder\.layer\.\d+\.)(intermediate|output)\.", r"\1\2_query."),
)
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
_OF_TEXT = re.compile(
    r"embeddings\.(word|position)_embeddings|encoder\.layer\.\d+\.(intermediate|output)\."
)


def start_from(own: dict[str, torch.Tensor], config: BridgeConfig) -> str:
    """Copies the weights that `init_from` names into `own` (of `QFormer.start`), and says in words
    what stayed random.

    That is: of BERT, which looks at no image, the cross-attention and the query tokens (BLIP-2, Li
    et al. 2023, section 3.1); keys and values of a cross-attention that were made for an encoder of
    another width; and of a question-aware Q-Former what only the words go through. Layers above
    ours are left out. Raises ConfigError for what does not fit.
    """
    name = config.init_from
    found, heads = _read(name)
    layers = {int(layer[1]) for layer in map(_LAYER.match, found) if layer}
    is_bert, random = "query_tokens" not in found, 0
    if heads != config.heads:
        raise _unfit(name, f"has {heads} heads, this bridge {config.heads}", f"heads={heads}")
    if len(layers) < config.layers:
        raise _unfit(
            name, f"has {len(layers)} layers, this bridge {config.layers}", f"layers={len(layers)}"
        )
    for key, tensor in own.items():
        value, looks = found.get(key), "crossattention" in key
        if _OF_TEXT.match(key) or (value is None and is_bert and (looks or key == "query_tokens")):
            random += 1
        elif value is None:
            raise _unfit(
                name, f"lacks {key}", "cross_attention_frequency=2, which published ones have"
            )
        elif value.shape == tensor.shape:
            tensor.copy_(value)
        elif looks and value.dim() == 2 and len(value) == len(tensor):
            random += 1
        elif key == "query_tokens" and value.shape[2] == tensor.shape[2]:
            raise _unfit(
                name, f"has {value.shape[1]} query tokens", f"query_tokens={value.shape[1]}"
            )
        else:
            shapes = (
                f"has {key} of shape {tuple(value.shape)}, this bridge's is {tuple(tensor.shape)}"
            )
            raise _unfit(name, shapes, f"width={len(found['layernorm.weight'])}")
    return f"bridge: {len(own) - random} of {len(own)} weights come from {name}, {random} start at random"


def _unfit(name: str, what: str, remedy: str) -> ConfigError:
    return ConfigError(
        f"model.bridge.init_from: {name} {what}; set model.bridge.{remedy}, or take another one"
    )


def _read(name: str) -> tuple[dict[str, torch.Tensor], int]:
    """The Q-Former's or BERT's tensors by our names, and the number of heads."""
    fields = json.loads(Path(_file(name, "config.json", needed=True)).read_text())
    files = list(_files(name))
    keys = [key for _, names in files for key in names]
    of_blip = "query_tokens" in keys
    wanted = {
        key
        for key in keys
        if key == "query_tokens"
        or key.startswith("qformer." if of_blip else ("bert.", "enc", "emb"))
    }
    if not any("encoder.layer.0." in key for key in wanted):
        raise ConfigError(
            f"model.bridge.init_from: {name} holds neither a BERT nor the Q-Former of a BLIP-2"
        )
    raw = {
        key: value
        for file, names in files
        for key, value in _tensors(file, wanted.intersection(names))
    }
    fields = fields.get("qformer_config", {}) if of_blip else fields
    return {_our_name(key, of_blip): value for key, value in raw.items()}, fields.get(
        "num_attention_heads", 12
    )


def _our_name(key: str, of_blip: bool) -> str:
    if of_blip:
        return key.removeprefix("qformer.").replace(
            "embeddings.layernorm.", "layernorm."
        )  # InstructBLIP's own name
    for theirs, ours in _OF_BERT:
        key = re.sub(theirs, ours, key)
    return key


def _file(name: str, file: str, needed: bool = False) -> str | None:
    try:
        found = cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"model.bridge.init_from: {name} cannot be read: {why}") from error
    if needed and found is None:
        raise ConfigError(
            f"model.bridge.init_from: {name} holds no {file}: it is not a saved model"
        )
    return found


def _files(name: str) -> Iterable[tuple[str, list[str]]]:
    """(file, names of the tensors in it), safetensors before .bin; of a sharded model those with
    our parts alone.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if file := _file(name, single):
            return [(file, list(_open(file).keys()))]
        if index := _file(name, f"{single}.index.json"):
            of_shard: dict[str, list[str]] = {}
            for key, shard in json.loads(Path(index).read_text())["weight_map"].items():
                if not key.startswith(("vision_model.", "language_model.", "language_projection.")):
                    of_shard.setdefault(shard, []).append(key)
            return [(_file(name, shard, needed=True), names) for shard, names in of_shard.items()]
    raise ConfigError(
        f"model.bridge.init_from: {name} holds neither model.safetensors nor pytorch_model.bin"
    )


def _open(file: str) -> Any:
    if file.endswith(".bin"):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    return safe_open(file, framework="pt")


def _tensors(file: str, names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
    opened = _open(file)
    return [
        (name, opened[name] if file.endswith(".bin") else opened.get_tensor(name)) for name in names
    ]
