"""LoRA (Hu et al. 2021) around a frozen layer on a CPU, as few products and no more.

peft's own forward pass makes the update a tensor of its own, scales it and adds it, each a pass
over memory, and bitsandbytes' keeps autograd from seeing that these products belong together.
Legend: M rows, K and N width before and after, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from harness.model.products import is_plain, product

Dense = Callable[[], torch.Tensor]


class _LoraProduct(torch.autograd.Function):
    """x @ W' + s (x @ A') @ B'; a function gives W, which is frozen and may be stored in 4 bits."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MK: torch.Tensor,
        dense: Dense,
        a_RK: torch.Tensor,
        b_NR: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        low_MR = product(x_MK, a_RK.t())
        ctx.save_for_backward(x_MK, low_MR, a_RK, b_NR)
        ctx.dense = dense
        ctx.scale = scale
        y_MN = product(x_MK, dense().t())
        return product(low_MR, b_NR.t(), onto=y_MN, scale=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x_MK, low_MR, a_RK, b_NR = ctx.saved_tensors
        grad_MN = gradients[0]
        grad_low_MR = product(grad_MN, b_NR).mul_(ctx.scale)
        grad_x_MK = None
        if ctx.needs_input_grad[0]:
            grad_x_MK = product(grad_MN, ctx.dense())
            product(grad_low_MR, a_RK, onto=grad_x_MK)
        grad_a_RK = product(grad_low_MR.t(), x_MK)
        grad_b_NR = product(grad_MN.t(), low_MR).mul_(ctx.scale)
        return grad_x_MK, None, grad_a_RK, grad_b_NR, None


class _Fused:
    """What goes before peft's class of a layer: its forward pass where nothing but plain LoRA in
    fp32 on a CPU is asked for.
    """

    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        name = None if args or kwargs else self._one_adapter()
        dense = _dense(self.base_layer)
        if name is None or dense is None:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]  # peft's
        a_RK = self.lora_A[name].weight
        b_NR = self.lora_B[name].weight
        if not is_plain(x, a_RK, b_NR):
            return super().forward(x)  # type: ignore[misc]
        x_MK = x.reshape(-1, x.shape[-1])
        y_MN = _LoraProduct.apply(x_MK, dense, a_RK, b_NR, self.scaling[name])
        return y_MN.unflatten(0, x.shape[:-1])

    def _one_adapter(self: Any) -> str | None:
        """Returns the name of the adapter, if it is the only one and nothing but two matrices."""
        if self.merged or self.disable_adapters or len(self.active_adapters) != 1:
            return None
        name = self.active_adapters[0]
        dropout = self.lora_dropout[name] if name in self.lora_A else None
        has_dropout = not isinstance(dropout, nn.Identity) and self.training
        if dropout is None or has_dropout or name in self.lora_variant:
            return None
        return None if self.lora_B[name].bias is not None else name


def _dense(base: Any) -> Dense | None:
    """Returns what gives weight_NK of a frozen layer in fp32; None for one that it is not that of:
    with a bias, transposed, computing in less than fp32, or packed for a kernel without gradients.
    """
    weight = base.weight
    if base.bias is not None or not isinstance(base, nn.Linear) or weight.requires_grad:
        return None
    state = getattr(weight, "quant_state", None)
    if state is None:
        return (lambda: weight) if is_plain(weight) else None
    if weight.device.type != "cpu" or hasattr(weight, "ds_id"):
        return None
    if base.compute_dtype != torch.float32 or getattr(state, "packing_format_for_cpu", False):
        return None

    def dense() -> torch.Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data.view(-1, 1), state).float()

    return dense


def fuse_lora(lm: nn.Module) -> None:
    """Gives peft's layers around linear ones the forward pass above; weights and names stay."""
    fused: dict[str, type] = {}  # by the name of peft's class
    for module in lm.modules():
        if hasattr(module, "lora_A") and isinstance(getattr(module, "base_layer", None), nn.Linear):
            kind = type(module)
            made = type(kind.__name__, (_Fused, kind), {"__module__": __name__})
            module.__class__ = fused.setdefault(f"{kind.__module__}.{kind.__name__}", made)
