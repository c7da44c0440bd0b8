"""What must hold in every run: frozen parts never change, trainable parts get a finite gradient.
Asserted, not hoped.

Users have trained for hours with a part that got no signal, or with batch-norm statistics that
drifted. And where every step is skipped: what stopped being finite first.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from harness import checkpoint as checkpoints
from harness.errors import GuardError
from harness.train.state import Run, StepResult


def frozen_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields every parameter that is not trained and every buffer.

    Quantised weights and batch-norm statistics are among them; of a parameter that ZeRO has
    partitioned what this rank holds of it.
    """
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            yield name, getattr(parameter, "ds_tensor", parameter)
    yield from model.named_buffers()


def frozen_hash(model: nn.Module) -> str:
    """Returns the sha256 over names and bytes of all that is frozen."""
    digest = hashlib.sha256()
    for name, tensor in frozen_tensors(model):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


class GradientGuard:
    """The watch over the first step that is taken: does each trained parameter get a gradient?

    Tensor hooks, since under ZeRO `p.grad` is None after the backward pass.
    """

    def __init__(self, model: nn.Module):
        self._finite: dict[str, torch.Tensor] = {}  # on the device: looked at once, by `check`
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not trained:
            raise GuardError(
                "nothing is trainable: the bridge and the language model are both frozen"
            )
        self._names = list(trained)
        self._hooks = [p.register_hook(partial(self._see, name)) for name, p in trained.items()]

    def _see(self, name: str, grad: torch.Tensor) -> None:
        finite = grad.isfinite().all()
        self._finite[name] = self._finite[name] & finite if name in self._finite else finite

    def check(self) -> None:
        """Takes the hooks off after the first step that was not skipped. Raises GuardError."""
        for hook in self._hooks:
            hook.remove()
        silent = [name for name in self._names if name not in self._finite]
        if silent:
            raise GuardError(
                f"{len(silent)} of {len(self._names)} trainable parameters got no gradient in the "
                f"first step, the first of them {silent[0]}: that part would not learn"
            )
        seen = torch.stack(list(self._finite.values())).tolist()
        if wrong := [name for name, finite in zip(self._finite, seen, strict=True) if not finite]:
            raise GuardError(
                f"the gradient of {wrong[0]} (and {len(wrong) - 1} more) is not finite in the "
                "first step"
            )

    def forget(self) -> None:
        """Starts over after a step skipped as non-finite, as a loss scaler's first ones may be."""
        self._finite.clear()


def check_frozen(model: nn.Module, before: str) -> None:
    """Raises GuardError where `frozen_hash` is no longer what it was."""
    if frozen_hash(model) != before:
        raise GuardError(
            "a frozen parameter or buffer has changed during training; this is a bug, please "
            "report it"
        )


class RunGuard:
    """All that ends a run: skipped steps in a row, parts without signal, frozen ones that move."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.frozen = frozen_hash(run.model)
        self.gradients: GradientGuard | None = GradientGuard(run.model)

    def check(self, step: StepResult) -> None:
        """Raises GuardError for what this step shows; called after every one."""
        state = self.run.state
        if step.gradient_norm is None:
            state.skipped += 1
            state.skipped_in_a_row += 1
            self.run.terminal.say(
                f"step {state.step}: loss or gradient not finite, step skipped "
                f"({state.skipped} so far)"
            )
            if state.skipped_in_a_row >= self.run.config.train.max_skipped_in_a_row:
                raise GuardError(self._too_many_skipped(step))
            if self.gradients:
                self.gradients.forget()
            return
        state.skipped_in_a_row = 0
        if self.gradients:
            self.gradients.check()
            self.gradients = None
            self.check_frozen()
            self._tell_scales(step)

    def check_frozen(self) -> None:
        """Raises GuardError where a frozen part has changed since the run began."""
        check_frozen(self.run.model, self.frozen)

    def _tell_scales(self, step: StepResult) -> None:
        """Tells how large image tokens and words are: far apart, the model would read noise."""
        batch = next((batch for batch in step.batches if batch.images), step.batches[0])
        # on every rank, as weights may be partitioned, though one without pictures tells nothing
        scales = self.run.model.scales(batch.to(self.run.engine.device))
        if not batch.images:
            return
        self.run.terminal.say(", ".join(f"{name} {value:.4g}" for name, value in scales.items()))
        self.run.track("train", scales)

    def _too_many_skipped(self, step: StepResult) -> str:
        """Returns what was not finite first in this rank's share of the last step, in words."""
        engine = self.run.engine
        good = checkpoints.newest(self.run.config.out_dir)
        with engine.gathered_weights():
            found = (
                first_nonfinite(self.run.model, batch.to(engine.device), engine.loss_scale)
                for batch in step.batches
            )
            first = next(filter(None, found), "nothing on this rank")
            engine.wait()
        return (
            f"{self.run.state.skipped_in_a_row} steps in a row had a loss or gradient that is not "
            f"finite, the first of the last one: {first} (loss scale {engine.loss_scale:g}); lower "
            "train.learning_rate, or ask for train.precision=fp32; the last good checkpoint is "
            f"{good.path if good else 'none: none was written yet'}"
        )


def first_nonfinite(model: nn.Module, batch: Any, scale: float = 1.0) -> str | None:
    """Returns in words the first value of the batch's loss and gradients that is not finite.

    None: all are finite. `model(batch)` is a LossOutput. `scale`: the loss scale, under which
    gradients may overflow. Changes nothing: no gradient is kept, so that engines which reduce
    gradients as they arrive see none.
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
                tensor.register_hook(
                    lambda grad: watch(grad, f"the gradient of the output of {name}")
                )

    hooks = []
    for name, module in model.named_modules():
        if name:
            hooks.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(after, name)))
    try:
        result = model(batch)
        # As in training: the gradient of a sum overflows earlier.
        loss = result.sum / result.weight.clamp(min=1e-8)
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
    """Yields the tensors of floats in what a module was given or has returned."""
    if isinstance(values, torch.Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, Mapping | tuple | list):
        for value in values.values() if isinstance(values, Mapping) else values:
            yield from _floats(value)
