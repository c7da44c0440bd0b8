"""Which dtype for which part on which device, and the reason in words.

The config's `train.precision` and what the device can do -> Precision, which is printed and logged
at the start. Told the device's capability, `choose` is a pure function, so that a T4's policy is
tested without a T4.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal

import torch

from harness.errors import ConfigError
from harness.machine.hardware import multiplies_bf16

# Accelerate and transformers import an installed DeepSpeed on their own, and it says on stdout that
# it found no GPU.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

Requested = Literal["auto", "bf16", "fp16", "fp32"]
Part = Literal["vision", "bridge", "lm"]
BF16_FROM = (8, 0)  # compute capability of Ampere; older GPUs emulate bf16, slower than fp32


@dataclass(frozen=True)
class Precision:
    """One policy for each part: the dtype of autocast around it, or None for no autocast."""

    name: Literal["bf16", "fp16", "fp32"]
    device_type: str  # "cpu", "cuda", "mps"
    vision: torch.dtype | None
    bridge: torch.dtype | None
    lm: torch.dtype | None
    # of products in 4-bit layers (bnb_4bit_compute_dtype); fp16: of all frozen layers of the LM
    compute_dtype: torch.dtype
    loss_scaler: bool
    reason: str
    lm_dtype: torch.dtype = torch.float32  # as loaded, of what is not quantised
    fell_back: bool = False  # another than asked for; `reason` says which

    def autocast(self, part: Part) -> AbstractContextManager:
        """Returns the context in which a part runs. Without a dtype an autocast around it is
        switched off, not only left out: fp16 autocast defeats the fp32 `wo` of T5, whose values
        exceed fp16's largest.
        """
        dtype = getattr(self, part)
        if dtype is None:
            if not torch.amp.is_autocast_available(self.device_type):
                return nullcontext()
            return torch.autocast(self.device_type, enabled=False)
        return torch.autocast(self.device_type, dtype=dtype)

    def facts(self) -> dict[str, str]:
        """Returns, for the log and the tracker, a line for each part, and the reason."""
        parts = {
            part: _name(getattr(self, part) or torch.float32) for part in ("vision", "bridge", "lm")
        }
        named = {f"precision.{part}": name for part, name in parts.items()}
        return named | {
            "precision.lm_4bit_compute": _name(self.compute_dtype),
            "precision.loss_scaler": str(self.loss_scaler).lower(),
            "precision.reason": self.reason,
        }


def choose(
    requested: Requested,
    device: torch.device,
    capability: tuple[int, int] | None = None,
    bf16_supported: bool | None = None,
) -> Precision:
    """Returns the policy for a device. `capability` is a CUDA device's, asked of the device itself
    if not given.

    `bf16_supported`: natively, not by emulation; None: from compute capability 8.0 on. Raises
    ConfigError for a request that the device cannot do.
    """
    kind = device.type
    if kind == "cuda" and capability is None:
        capability = torch.cuda.get_device_capability(device)
        bf16_supported = torch.cuda.is_bf16_supported(including_emulation=False)
    where = f"the device {kind!r}"
    if capability:
        where = f"a GPU of compute capability {capability[0]}.{capability[1]}"
    native_bf16 = bool(bf16_supported)
    if bf16_supported is None and capability:
        native_bf16 = capability >= BF16_FROM
    asked = "" if requested == "auto" else "as asked: "
    chosen = requested
    if requested == "auto" and kind == "cuda":
        chosen = "bf16" if native_bf16 else "fp16"
    elif requested == "auto":
        chosen = "fp32"
    if chosen == "bf16":
        if kind != "cpu" and not native_bf16:
            raise ConfigError(
                f"train.precision is bf16, but {where} has no native bf16: use "
                f"train.precision=auto{', fp16' if kind == 'cuda' else ''} or fp32"
            )
        reason = f"{where} has bf16, whose range is fp32's"
        if kind == "cpu" and not multiplies_bf16():
            reason = "this CPU emulates products in bf16, many times slower than those in fp32"
        return _uniform(kind, torch.bfloat16, f"{asked}bf16 autocast for all parts; {reason}")
    if chosen == "fp16":
        if kind != "cuda":
            raise ConfigError(
                f"train.precision is fp16, but {where} does not train in fp16: use "
                "train.precision=auto or fp32"
            )
        why = f"{where} has no native bf16, and T5 overflows in fp16"
        if native_bf16:
            why = "its range is too small for T5"
        return _by_parts(kind, asked, why)
    reason = "fp32 everywhere" if asked else f"fp32 everywhere: {where} gains nothing from less"
    return _uniform(kind, None, asked + reason)


def choose_or_fall_back(
    requested: Requested,
    device: torch.device,
    capability: tuple[int, int] | None = None,
    bf16_supported: bool | None = None,
) -> Precision:
    """Returns the policy for a model that only answers, as `choose` does; where the device cannot
    do what its training asked for, the device's own: fp32 on a CPU, fp16 by parts on a T4.
    """
    try:
        return choose(requested, device, capability, bf16_supported)
    except ConfigError:
        own = choose("auto", device, capability, bf16_supported)
        reason = f"{own.name} in place of {requested}, in which this device does not compute"
        return replace(own, reason=f"{reason}: {own.reason}", fell_back=True)


def _by_parts(kind: str, asked: str, why: str) -> Precision:
    return Precision(
        "fp16",
        kind,
        vision=torch.float16,
        bridge=torch.float16,
        lm=None,
        compute_dtype=torch.float16,
        loss_scaler=True,
        reason=f"{asked}fp16 autocast for encoder and bridge, the language model outside it: "
        "fp16 in its frozen layers alone, fp32 in wo, norms and embeddings, with a loss scaler; "
        f"{why}",
    )


def _uniform(kind: str, dtype: torch.dtype | None, reason: str) -> Precision:
    name: Literal["bf16", "fp32"] = "bf16" if dtype else "fp32"
    return Precision(
        name, kind, dtype, dtype, dtype, dtype or torch.float32, loss_scaler=False, reason=reason
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
