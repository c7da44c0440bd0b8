"""Loading a language model in 4 bits (NF4 with double quantisation, QLoRA: Dettmers et al. 2023)
and adding LoRA.

A hub id or a local folder in; a model whose trainable parts are exactly those of `tuning`, and its
tokenizer, out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file

from harness.config.schema import LanguageModelConfig
from harness.errors import ConfigError
from harness.model.vision import quiet_transformers, without_weights

# At every import bitsandbytes misses a kernel for a path that `keep_autograd` bars.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in record.getMessage()
)


def load(
    config: LanguageModelConfig,
    architecture: type[PreTrainedModel],
    fields: Mapping[str, Any],
    *,
    new: str | None = None,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """The frozen base and its tokenizer. `dtype` is that of what stays unquantised. Raises
    ConfigError by id.

    `fields` of the base's config.json are set whatever it says: dropout is 0 unless
    `model.lm.dropout` asks for it, since equal losses across world sizes need it. `new` is a part
    of the names of layers that its files do not hold: they are drawn at random and never quantised.
    Without weights (see `without_weights`) there is no tokenizer either.
    """
    skipped = [f".*{new}.*", "lm_head"] if new else None
    quantisation = nf4(compute_dtype, skipped) if config.tuning == "qlora" else None
    try:
        with quiet_transformers():
            found = AutoConfig.from_pretrained(config.id, revision=config.revision)
            if "gpt2" in (config.kind, found.model_type) and config.kind != found.model_type:
                raise ValueError(
                    f"it is of kind {found.model_type}, model.lm.kind is {config.kind}"
                )
            if without_weights():
                found.update(fields)
                return _skeleton(found, architecture, quantisation, dtype), None
            tokenizer = AutoTokenizer.from_pretrained(config.id, revision=config.revision)
            lm, report = architecture.from_pretrained(
                config.id,
                revision=config.revision,
                quantization_config=quantisation,
                dtype=dtype,
                output_loading_info=True,
                **fields,
            )
    except (
        Exception
    ) as error:  # a damaged file raises half a dozen types, of tokenizers a bare Exception
        raise _cannot_load(config, error) from error
    if absent := sorted(key for key in report["missing_keys"] if not (new and new in key)):
        raise ConfigError(
            f"model.lm.id: {config.id!r} lacks {len(absent)} weights of a {architecture.__name__} "
            f"({absent[0]}, ...), which would be random: use a complete model of that kind"
        )
    if len(tokenizer) < 4:
        # T5Tokenizer(vocab_file=...) of transformers 5 gives an empty vocabulary in silence.
        raise ConfigError(
            f"model.lm.id: the tokenizer of {config.id!r} knows {len(tokenizer)} tokens; it is broken"
        )
    keep_autograd(lm)
    lm.requires_grad_(False)
    return lm, tokenizer


def nf4(compute_dtype: torch.dtype, skipped: list[str] | None = None) -> BitsAndBytesConfig:
    """4-bit NormalFloat with double quantisation (Dettmers et al. 2023); modules that match
    `skipped` stay.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skipped,  # for 4 bits too, whatever its name
    )


def _skeleton(
    found, architecture, quantisation: BitsAndBytesConfig | None, dtype: torch.dtype
) -> PreTrainedModel:
    """The frozen base on the meta device, its layers replaced as from_pretrained does before it
    reads weights.
    """
    lm = architecture._from_config(found, dtype=dtype)
    if quantisation:
        AutoHfQuantizer.from_config(quantisation).preprocess_model(lm, device_map=None)
        lm.is_loaded_in_4bit = True
    return lm.requires_grad_(False)


def weights_hash(config: LanguageModelConfig) -> str:
    """sha256 over the weight files of the base as they lie on disk: the same whatever the device or
    quantisation.
    """
    if without_weights():
        return ""
    digest = hashlib.sha256()
    for file in _weight_files(config):
        with open(file, "rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()


def _weight_files(config: LanguageModelConfig) -> list[Path]:
    def find(name: str) -> str | None:
        try:
            return cached_file(
                config.id,
                name,
                revision=config.revision,
                _raise_exceptions_for_missing_entries=False,
            )
        except OSError as error:
            raise _cannot_load(config, error) from error

    for single, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if found := find(single):
            return [Path(found)]
        if found := find(index):
            names = sorted(set(json.loads(Path(found).read_text())["weight_map"].values()))
            return [Path(find(name)) for name in names]
    raise _cannot_load(config, OSError("no model.safetensors and no pytorch_model.bin is there"))


def _cannot_load(config: LanguageModelConfig, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split()).partition(". ")[0]
    if without_weights():
        return ConfigError(
            f"model.lm.id: {config.id!r} cannot be planned ({reason}): its config.json is all that is needed, in a "
            f"folder (model.lm.id=DIR), or once where there is a network (hf download {config.id} config.json)"
        )
    return ConfigError(
        f"model.lm.id: {config.id!r} cannot be loaded ({reason}): give a local folder in the hub's format, or an id "
        "that is on the hub or in its local cache; for a saved model whose base was moved, lm=PATH"
    )


def keep_autograd(lm: nn.Module) -> None:
    """Bars bitsandbytes' CPU kernel for avx512_bf16, which repacks weights in eval mode and has no
    backward.

    Without this, training after an evaluation goes on with every LoRA gradient None and only a
    warning.
    """
    for module in quantised_layers(lm):
        module.support_avx512bf16_for_cpu = False


def quantised_layers(module: nn.Module) -> list[nn.Module]:
    """The 4-bit linear layers of a module; [] where bitsandbytes is not installed."""
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        return []
    return [m for m in module.modules() if isinstance(m, Linear4bit)]


def tune(lm: PreTrainedModel, config: LanguageModelConfig, new: str | None = None) -> nn.Module:
    """The model with what `tuning` says trainable: LoRA matrices in fp32, everything, or nothing;
    `new` always.
    """
    adapted = config.tuning in ("lora", "qlora")
    tuned = _lora(lm, config, new) if adapted else lm.requires_grad_(config.tuning == "full")
    for name, parameter in tuned.named_parameters():
        if new and new in name:
            parameter.requires_grad_(True)
    return tuned


def _lora(lm: PreTrainedModel, config: LanguageModelConfig, new: str | None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if config.lora.targets == "all_linear" else list(config.lora.targets)
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=targets,
        exclude_modules=f".*{new}.*" if new else None,  # trained whole
        fan_in_fan_out=any(
            isinstance(module, Conv1D) for module in lm.modules()
        ),  # GPT-2's are transposed Linears
    )
    try:
        with warnings.catch_warnings():  # peft asks transformers by a name that is about to go
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            return get_peft_model(lm, lora)
    except ValueError as error:
        raise ConfigError(f"model.lm.lora.targets: {error}") from error
