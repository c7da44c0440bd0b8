"""Start weights of a Q-Former: those of a BERT, as BLIP-2 itself began, those of a published
BLIP-2's Q-Former, or those of a first stage of our own.

A hub id or folder -> tensors by the names of our own Q-Former. Nothing that runs code is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from harness.config.schema import BridgeConfig
from harness.errors import ConfigError
from harness.model.arguments import MODEL_TYPE
from harness.model.pretrained import loading, needed_file, weight_files

KEY = "model.bridge.init_from"
# of all the parts of a BLIP-2, or of a BERT with its heads
_PREFIXES = ("query_tokens", "qformer.", "bert.", "encoder.layer.", "embeddings.", "bridge.")
_OF_OUR_OWN = (
    ("bridge.body.qformer.", ""),
    ("bridge.body.", ""),
    ("bridge.patch_norm.", "patch_norm."),
)
_NAMES_OF_BERT = (
    (r"^bert\.", ""),
    (r"\.gamma$", ".weight"),
    (r"\.beta$", ".bias"),
    (r"^embeddings\.LayerNorm\.", "layernorm."),
    (r"\.attention\.self\.", ".attention.attention."),
    (r"(encoder\.layer\.\d+\.)(intermediate|output)\.", r"\1\2_query."),
)
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.")
_READS_WORDS = re.compile(
    r"embeddings\.(word|position)_embeddings|encoder\.layer\.\d+\.(intermediate|output)\."
)


def start_from(bridge: Any, config: BridgeConfig, encoder: Mapping[str, Any]) -> str:
    """Copies the weights that `init_from` names into a bridge with a Q-Former, and says in words
    what stayed random. The norm of its patches comes from a first stage alone.

    That is: of BERT, which looks at no image, the cross-attention and the query tokens (BLIP-2, Li
    et al. 2023, section 3.1); keys and values of a cross-attention that were made for an encoder of
    another width; and of a question-aware Q-Former what only the words go through. Layers above
    ours are left out. Raises ConfigError for what does not fit, as another encoder than a first
    stage's.
    """
    name = config.init_from
    assert name is not None  # the caller asks only where the config names one
    theirs, fields = _read(name)
    heads = fields.get("num_attention_heads", 12)
    own = bridge.body.start()
    bridge.has_learnt_norm = "patch_norm.weight" in theirs
    if bridge.has_learnt_norm:
        if fields["hash"] != encoder["hash"]:
            what = f"learnt from another vision encoder ({fields['id']}, not {encoder['id']})"
            raise ConfigError(f"{KEY}: {name} has {what}: use that one")
        own |= {f"patch_norm.{key}": p.data for key, p in bridge.patch_norm.named_parameters()}
    layers = {int(layer[1]) for layer in map(_LAYER.match, theirs) if layer}
    if heads != config.heads:
        raise _unfit(name, f"has {heads} heads, this bridge {config.heads}", f"heads={heads}")
    if len(layers) < config.layers:
        raise _unfit(
            name, f"has {len(layers)} layers, this bridge {config.layers}", f"layers={len(layers)}"
        )
    # of the language model's words a BERT knows nothing
    words = {} if bridge.question_aware else theirs
    fresh = [
        key
        for key, tensor in own.items()
        if not (
            _copied_words(key, tensor, words)
            if _READS_WORDS.match(key)
            else _copied(key, tensor, theirs, name)
        )
    ]
    parts = ", ".join(dict.fromkeys(map(_part, fresh)))
    return (
        f"bridge: {len(own) - len(fresh)} of {len(own)} weights come from {name}, "
        f"{len(fresh)} start at random{f' ({parts})' if fresh else ''}"
    )


def _part(key: str) -> str:
    """Returns what a weight of a Q-Former is a part of."""
    if key == "query_tokens":
        return "query tokens"
    return "cross-attention" if "crossattention" in key else "what the words go through"


def _copied_words(key: str, tensor: torch.Tensor, theirs: dict[str, torch.Tensor]) -> bool:
    """Copies a weight that only words go through, of embeddings as many rows as are there; BERT's
    first token type, which all its words have, goes with the positions.
    """
    value = theirs.get(key, theirs.get(re.sub(r"\.(intermediate|output)\.", r".\1_query.", key)))
    if value is None or value.shape[1:] != tensor.shape[1:]:
        return False
    if key == "embeddings.position_embeddings.weight":
        types_2D = theirs.get("embeddings.token_type_embeddings.weight")
        value = value if types_2D is None else value + types_2D[0]
    rows = min(len(value), len(tensor))
    tensor[:rows].copy_(value[:rows])
    return True


def _copied(key: str, tensor: torch.Tensor, theirs: dict[str, torch.Tensor], name: str) -> bool:
    """Copies one weight, or returns False for one that stays random."""
    value = theirs.get(key)
    looks = "crossattention" in key
    is_bert = "query_tokens" not in theirs
    if value is None:
        if is_bert and (looks or key == "query_tokens"):
            return False
        remedy = "cross_attention_frequency=2, which published ones have"
        raise _unfit(name, f"lacks {key}", remedy)
    if value.shape == tensor.shape:
        tensor.copy_(value)
        return True
    if looks and value.dim() == 2 and len(value) == len(tensor):
        return False
    if key == "query_tokens" and value.shape[2] == tensor.shape[2]:
        queries = value.shape[1]
        raise _unfit(name, f"has {queries} query tokens", f"query_tokens={queries}")
    shapes = f"has {key} of shape {tuple(value.shape)}, this bridge's is {tuple(tensor.shape)}"
    raise _unfit(name, shapes, f"width={len(theirs['layernorm.weight'])}")


def _unfit(name: str, what: str, remedy: str) -> ConfigError:
    return ConfigError(f"{KEY}: {name} {what}; set model.bridge.{remedy}, or take another one")


def _read(name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Returns the Q-Former's or BERT's tensors by our names, and what its config.json says of it;
    of a first stage also of its encoder.
    """
    tensors: dict[str, torch.Tensor] = {}
    with loading(KEY, name, "give a folder or a hub id of a BERT or a BLIP-2"):
        fields = json.loads(needed_file(name, "config.json").read_text())
        files = weight_files(name)
        if not files:
            raise OSError("it holds neither model.safetensors nor pytorch_model.bin")
        for file, names in files.items():
            if not names or any(key.startswith(_PREFIXES) for key in names):
                tensors |= _tensors(needed_file(name, file))
    if not any("encoder.layer.0." in key for key in tensors):
        raise ConfigError(f"{KEY}: {name} holds neither a BERT nor the Q-Former of a BLIP-2")
    of_blip = "query_tokens" in tensors
    if of_blip:
        fields = fields.get("qformer_config", {})
    if fields.get("model_type") == MODEL_TYPE:
        fields = {"num_attention_heads": fields["model"]["bridge"]["heads"], **fields["encoder"]}
    return {_our_name(key, of_blip): value for key, value in tensors.items()}, fields


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Returns those tensors of a file that a Q-Former can start from; the others are not read."""
    if file.suffix == ".bin":
        everything = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {key: value for key, value in everything.items() if key.startswith(_PREFIXES)}
    with safe_open(file, framework="pt") as opened:
        return {key: opened.get_tensor(key) for key in opened.keys() if key.startswith(_PREFIXES)}  # noqa: SIM118


def _our_name(key: str, of_blip: bool) -> str:
    for theirs, ours in _OF_OUR_OWN:
        if key.startswith(theirs):
            return key.replace(theirs, ours, 1).replace("embeddings.layernorm.", "layernorm.")
    if of_blip:  # the second is InstructBLIP's own name
        return key.removeprefix("qformer.").replace("embeddings.layernorm.", "layernorm.")
    for theirs, ours in _NAMES_OF_BERT:
        key = re.sub(theirs, ours, key)
    return key
