"""Loading a language model in 4 bits (NF4 with double quantisation, QLoRA: Dettmers et al. 2023)
and adding LoRA.

A hub id or a local folder in; a model whose trainable parts are exactly those of `tuning`, and its
tokenizer, out.
"""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping
from importlib.util import find_spec
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

from harness.config.schema import LanguageModelConfig
from harness.errors import ConfigError
from harness.model.language.wording import end_turns
from harness.model.pretrained import (
    load_complete,
    loading,
    needed_file,
    quiet_transformers,
    weight_files,
    without_weights,
)

KEY = "model.lm.id"
REMEDY = (
    "give a local folder in the hub's format, or an id that is on the hub or in its local cache; "
    "for a saved model whose base was moved, --lm PATH (in Python lm=PATH)"
)
# in the names of all that cross-attention adds: h.0.crossattention.c_attn.weight,
# h.0.ln_cross_attn.bias
NEW = "cross"

# At every import bitsandbytes misses a kernel for a path that `keep_autograd` bars.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: "gemm_4bit_forward from kernels-community" not in record.getMessage()
)


def load(
    config: LanguageModelConfig,
    described: Callable[[Any], tuple[type[PreTrainedModel], Mapping[str, Any]]],
    *,
    chat: str,
    dtype: torch.dtype,
    compute_dtype: torch.dtype,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Returns the frozen base and its tokenizer. `dtype` is that of what stays unquantised. Raises
    ConfigError by id.

    `described` gives the class of a base's config, and fields of that config that are set whatever
    it says: dropout is 0 unless `model.lm.dropout` asks for it, since equal losses across world
    sizes need it. `compute_dtype`: of products in 4-bit layers, and if it is fp16 of frozen ones
    that are not. `chat`: as of `load_tokenizer`. The layers of a new cross-attention, which its
    files do not hold, are drawn at random and never quantised. Without weights (see
    `without_weights`) there is no tokenizer either.
    """
    quantisation = None
    if config.tuning == "qlora":
        _check_installed()
        skipped = [f".*{NEW}.*", "lm_head"] if config.cross_attention else None
        quantisation = nf4(compute_dtype, skipped)
    with loading(KEY, config.id, REMEDY), quiet_transformers():
        found = AutoConfig.from_pretrained(config.id, **_where(config))
        architecture, fields = described(found)
        if without_weights():
            found.update(fields)
            lm = _skeleton(found, architecture, quantisation, dtype)
            return _computing_in(lm, config, compute_dtype), None
        tokenizer = load_tokenizer(config, chat)
        source: dict[str, Any] = {"name": config.id, "revision": config.revision, **fields}
        if config.gguf_file:
            found.update(fields)
            source = _from_gguf(config, architecture, found)
        lm = load_complete(
            architecture,
            KEY,
            **source,
            new=NEW if config.cross_attention else "",
            quantization_config=quantisation,
            dtype=dtype,
        )
    keep_autograd(lm)
    lm.requires_grad_(False)
    return _computing_in(lm, config, compute_dtype), tokenizer


def _where(config: LanguageModelConfig) -> dict[str, Any]:
    """Returns where transformers finds a base beside its id."""
    gguf = {"gguf_file": config.gguf_file} if config.gguf_file else {}
    return {"revision": config.revision, **gguf}


def _from_gguf(config: LanguageModelConfig, architecture: Any, found: Any) -> dict[str, Any]:
    """Returns the base's weights in fp32 and its config: a GGUF file's own numbers of few bits are
    neither trained on nor saved by transformers. Raises ConfigError where some are missing.
    """
    new = NEW if config.cross_attention else ""
    where = {"name": config.id, **_where(config)}
    read = load_complete(architecture, KEY, **where, new=new, dtype=torch.float32)
    return {"name": None, "revision": None, "config": found, "state_dict": read.state_dict()}


def load_tokenizer(config: LanguageModelConfig, chat: str = "auto") -> PreTrainedTokenizerBase:
    """Returns the base's tokenizer alone; with `chat` auto its EOS is what ends a turn of its chat
    template, where it has one, with none it has none. Raises ConfigError.
    """
    with loading(KEY, config.id, REMEDY), quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(config.id, **_where(config))
    if len(tokenizer) < 4:
        # T5Tokenizer(vocab_file=...) of transformers 5 gives an empty vocabulary in silence.
        raise ConfigError(
            f"{KEY}: the tokenizer of {config.id!r} knows {len(tokenizer)} tokens; it is broken"
        )
    end_turns(tokenizer, "none" if config.has_encoder else chat, config.id)
    return tokenizer


def _check_installed() -> None:
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "model.lm.tuning is qlora: layers in 4 bits need bitsandbytes, on a CPU too: "
            "pip install 'bitsandbytes>=0.49'"
        )


def nf4(compute_dtype: torch.dtype, skipped: list[str] | None = None) -> BitsAndBytesConfig:
    """Returns the settings of 4-bit NormalFloat with double quantisation (Dettmers et al. 2023);
    modules that match `skipped` stay.
    """
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=skipped,  # for 4 bits too, whatever its name
    )


def _skeleton(
    found: Any, architecture: Any, quantisation: BitsAndBytesConfig | None, dtype: torch.dtype
) -> PreTrainedModel:
    """Returns the frozen base on the meta device, its layers replaced as from_pretrained does
    before it reads weights.
    """
    lm = architecture._from_config(found, dtype=dtype)
    if quantisation:
        AutoHfQuantizer.from_config(quantisation).preprocess_model(lm, device_map=None)
        lm.is_loaded_in_4bit = True
    return lm.requires_grad_(False)


class HalfLinear(nn.Linear):
    """A frozen layer whose weights and product are in fp16, between inputs and outputs in fp32: as
    bitsandbytes' Linear4bit computes.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.to(self.weight.dtype)).to(input.dtype)


class HalfConv1D(Conv1D):
    """The same of GPT-2's transposed Linears."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


HALVES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: HalfLinear, Conv1D: HalfConv1D}


def _computing_in(
    lm: PreTrainedModel, config: LanguageModelConfig, compute_dtype: torch.dtype
) -> PreTrainedModel:
    """Returns the base with its frozen layers in fp16 where that is what they compute in, on a T4;
    bf16 is autocast's affair.

    As in 4 bits, T5's `wo`, whose input exceeds fp16's largest, stays in fp32, and so do `lm_head`,
    norms, embeddings and what is trained.
    """
    if compute_dtype != torch.float16 or config.tuning not in ("lora", "frozen"):
        return lm
    for name, module in lm.named_modules():
        stays = name.endswith((".wo", "lm_head")) or (config.cross_attention and NEW in name)
        if type(module) in HALVES and not stays:
            module.__class__ = HALVES[type(module)]
            module.to(compute_dtype)
    return lm


def weights_hash(config: LanguageModelConfig) -> str:
    """Returns the sha256 over the weight files of the base as they lie on disk: the same whatever
    the device or quantisation.
    """
    if without_weights():
        return ""
    digest = hashlib.sha256()
    with loading(KEY, config.id, REMEDY):
        files = sorted(weight_files(config.id, config.revision))
        if config.gguf_file:
            files = [config.gguf_file]
        if not files:
            raise OSError("no model.safetensors and no pytorch_model.bin is there")
        for file in files:
            with needed_file(config.id, file, config.revision).open("rb") as stream:
                while block := stream.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()


def keep_autograd(lm: nn.Module) -> None:
    """Bars bitsandbytes' CPU kernel for avx512_bf16, which repacks weights in eval mode and has no
    backward.

    Without this, training after an evaluation goes on with every LoRA gradient None and only a
    warning.
    """
    for module in quantised_layers(lm):
        module.support_avx512bf16_for_cpu = False


def quantised_layers(module: nn.Module) -> list[Any]:
    """Returns the 4-bit linear layers of a module; [] where bitsandbytes is not installed."""
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        return []
    return [m for m in module.modules() if isinstance(m, Linear4bit)]


def tune(lm: PreTrainedModel, config: LanguageModelConfig) -> nn.Module:
    """Returns the model with what `tuning` says trainable: LoRA matrices in fp32, everything, or
    nothing; a new cross-attention always.
    """
    if config.tuning in ("lora", "qlora"):
        tuned = _lora(lm, config)
    else:
        tuned = lm.requires_grad_(config.tuning == "full")
    for name, parameter in tuned.named_parameters():
        if config.cross_attention and NEW in name:
            parameter.requires_grad_(True)
    return tuned


def _lora(lm: PreTrainedModel, config: LanguageModelConfig) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    targets = "all-linear" if config.lora.targets == "all_linear" else list(config.lora.targets)
    lora = LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,  # type: ignore[arg-type]  # peft divides by it: any number
        lora_dropout=config.lora.dropout,
        target_modules=targets,
        exclude_modules=f".*{NEW}.*" if config.cross_attention else None,  # trained whole
        # GPT-2's layers are transposed Linears
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in lm.modules()),
    )
    try:
        with warnings.catch_warnings():  # peft asks transformers by a name that is about to go
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
            return get_peft_model(lm, lora)
    except ValueError as error:
        raise ConfigError(f"model.lm.lora.targets: {error}") from error
