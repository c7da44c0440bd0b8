"""What must hold in every run: frozen parts never change, trainable parts get a finite gradient. Asserted, not hoped.

Users have trained for hours with a part that got no signal, or with batch-norm statistics that drifted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from torch import nn


class GuardError(RuntimeError):
    """A run whose result would be worthless: names the parameters and what is wrong with them."""


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter that is not trained and every buffer, quantised weights and batch-norm statistics included.

    Of a parameter that ZeRO has partitioned: what this rank holds of it.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, getattr(parameter, "ds_tensor", parameter)
    yield from model.named_buffers()


def frozen_hash(model: nn.Module) -> str:
    """sha256 over names and bytes of all that is frozen."""
    digest = hashlib.sha256()
    for name, tensor in frozen_tensors(model):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


class GradientGuard:
    """Watches the first step that is taken: did every trainable parameter get a finite gradient?

    Tensor hooks, since under ZeRO `p.grad` is None after the backward pass.
    """

    def __init__(self, model: nn.Module):
        self._finite: dict[str, bool] = {}
        self._names = [name for name, p in model.named_parameters() if p.requires_grad]
        if not self._names:
            raise GuardError("nothing is trainable: the bridge and the language model are both frozen")
        self._hooks = [
            p.register_hook(lambda grad, name=name: self._see(name, grad))
            for name, p in model.named_parameters()
            if p.requires_grad
        ]

    def _see(self, name: str, grad: torch.Tensor) -> None:
        self._finite[name] = self._finite.get(name, True) and bool(grad.isfinite().all())

    def check(self) -> None:
        """Raises GuardError and takes the hooks off; called after the first step that was not skipped."""
        for hook in self._hooks:
            hook.remove()
        silent = [name for name in self._names if name not in self._finite]
        if silent:
            raise GuardError(
                f"{len(silent)} of {len(self._names)} trainable parameters got no gradient in the first step, "
                f"the first of them {silent[0]}: that part would not learn"
            )
        if wrong := [name for name, finite in self._finite.items() if not finite]:
            raise GuardError(f"the gradient of {wrong[0]} (and {len(wrong) - 1} more) is not finite in the first step")

    def forget(self) -> None:
        """Starts over: the step was skipped as non-finite, as a loss scaler's first steps may be."""
        self._finite.clear()


def check_frozen(model: nn.Module, before: str) -> None:
    """Raises GuardError where `frozen_hash` is no longer what it was."""
    if frozen_hash(model) != before:
        raise GuardError("a frozen parameter or buffer has changed during training; this is a bug, please report it")
