"""Matrix products of fp32 on a CPU, by the faster one of the two libraries that torch brings.

torch gives them to Intel's MKL, which on AMD's processors leaves half of AVX-512 unused; oneDNN,
the other one, does not, at the same precision (measured on Zen 5, one thread: 110 against 230
GFLOP/s). It takes a product of fp32 only where torch's "float32 matmul precision" is lowered. That
lets it round to bf16 on processors with AMX, which are Intel's: there, and wherever MKL is as
fast, all stays with MKL. Legend: M rows, N columns, K what is summed over.
"""

from __future__ import annotations

import platform
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import nn

# Multiplications from which oneDNN wins: it compiles a kernel for every new shape (0.3 ms).
LEAST_PRODUCT = 1 << 22


@cache
def onednn_is_faster() -> bool:
    """Returns whether this processor is AMD's and has AVX-512; asked of its flags, not measured."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    facts = Path("/proc/cpuinfo")
    return facts.exists() and "AuthenticAMD" in facts.read_text(encoding="utf-8", errors="replace")


class _Lowered:
    """Torch's precision of products lowered while it is entered, in whatever number of threads.

    The switch is the process's, and torch's products leave Python's lock: two threads that each
    put back what they had found would leave it lowered for good.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._entered = 0
        self._before = ""

    def __enter__(self) -> None:
        with self._lock:
            if self._entered == 0:
                self._before = torch.get_float32_matmul_precision()
                torch.set_float32_matmul_precision("medium")
            self._entered += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0:
                torch.set_float32_matmul_precision(self._before)


_LOWERED = _Lowered()


def product(
    a_MK: torch.Tensor, b_KN: torch.Tensor, onto: torch.Tensor | None = None, scale: float = 1.0
) -> torch.Tensor:
    """Returns a @ b; or `onto`, to which a @ b x scale was added in place."""

    def made() -> torch.Tensor:
        if onto is None:
            return a_MK @ b_KN
        return torch.addmm(onto, a_MK, b_KN, alpha=scale, out=onto)

    if not onednn_is_faster() or a_MK.numel() * b_KN.shape[1] < LEAST_PRODUCT:
        return made()
    with _LOWERED:
        return made()


def is_plain(*tensors: torch.Tensor | None) -> bool:
    """Returns whether these are fp32 on a CPU, outside of autocast and torch.compile, and whole:
    ZeRO-3 keeps parts of weights, and gathers them around a layer's own forward pass.
    """
    if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
        return False
    there = [tensor for tensor in tensors if tensor is not None]
    return all(
        tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        and not hasattr(tensor, "ds_id")
        for tensor in there
    )


class _LinearProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_MK: torch.Tensor, weight_NK: torch.Tensor, bias_N: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.save_for_backward(x_MK if weight_NK.requires_grad else None, weight_NK)
        y_MN = product(x_MK, weight_NK.t())
        return y_MN if bias_N is None else y_MN.add_(bias_N)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x_MK, weight_NK = ctx.saved_tensors
        grad_MN = gradients[0]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grad_MN, weight_NK) if needs_x else None,
            product(grad_MN.t(), x_MK) if needs_weight else None,
            grad_MN.sum(dim=0) if needs_bias else None,
        )


class Linear(nn.Linear):
    """A linear layer with `product`s."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (
            torch.compiler.is_compiling()
            or not onednn_is_faster()
            or x.numel() * self.out_features < LEAST_PRODUCT
            or not is_plain(x, self.weight, self.bias)
        ):
            return super().forward(x)
        y_MN = _LinearProduct.apply(x.reshape(-1, self.in_features), self.weight, self.bias)
        return y_MN.unflatten(0, x.shape[:-1])


def use_products(model: nn.Module) -> None:
    """Makes the linear layers of a model `Linear`s; their weights and names stay."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
