"""Where a loss or gradient stopped being finite: one forward and backward pass, watched module by module.

Called once, when a run is about to stop because all its steps were skipped: watching every step would slow it down.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn


def first_nonfinite(model: nn.Module, batch: Any, scale: float = 1.0) -> str | None:
    """The first value of the batch's loss and of its gradients that is not finite, in words; None: all are finite.

    `model(batch)` is a LossOutput. `scale`: the loss scale, under which gradients may overflow. Changes nothing: no
    gradient is kept, so that engines which reduce gradients as they arrive see none.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not parameter.isfinite().all():
            return f"the weight {name}"
    found: list[str] = []  # in the order of computation; the first one is the answer

    def watch(values: Any, what: str) -> None:
        if not found and not all(tensor.isfinite().all() for tensor in _floats(values)):
            found.append(what)

    def before(name: str, _: nn.Module, given: tuple, named: dict) -> None:
        watch((given, named), f"the input of {name}")

    def after(name: str, _: nn.Module, given: tuple, output: Any) -> None:
        watch(output, f"the output of {name}")
        for tensor in _floats(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda grad: watch(grad, f"the gradient of the output of {name}"))

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(after, name)))
    try:
        result = model(batch)
        loss = result.sum / result.weight.clamp(min=1e-8)  # as in training: the gradient of a sum overflows earlier
        watch(loss, "the loss")
        if not found:
            trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(loss * scale, list(trained.values()), allow_unused=True)
            for name, gradient in zip(trained, gradients, strict=True):
                watch(gradient, f"the gradient of {name}")
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _floats(values: Any) -> Iterator[torch.Tensor]:
    """The tensors of floats in what a module was given or has returned."""
    if isinstance(values, torch.Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, Mapping | tuple | list):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _floats(value)
