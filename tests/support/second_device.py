"""A second device that needs no hardware, and what would make the host wait for it.

Fake tensors on `meta` stand for it: they have shapes and no numbers, and mixing them with tensors
of the CPU raises, as it would on CUDA. `Waits` names each place at which the host would wait. What
is asked for a number gets `answer`.

    with second_device() as waits:
        moved(model)
        loss = model(batch.to("meta")).sum
        loss.backward()
    assert waits.places == []
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._functorch import config as functorch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
BY_MASK = (
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
)
LIBRARIES = ("/torch/", "/accelerate/", "/peft/", "<")
HERE = __file__


def is_there(value: object) -> bool:
    """Whether a tensor lies on the second device."""
    return isinstance(value, torch.Tensor) and value.device.type == "meta"


def place() -> str:
    """FILE:FUNCTION of the innermost code that is neither torch's nor this file's."""
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file != HERE and not any(name in file for name in LIBRARIES):
            parts = Path(file).parts
            # The last of them: a checkout may be called harness, and hold its own environment.
            rooms = [n for n, part in enumerate(parts) if part in ("harness", "transformers")]
            at = max(rooms, default=len(parts) - 2)
            return f"{'/'.join(parts[at:])}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch, on its own"  # a backward pass has no frame of ours


class Waits(TorchDispatchMode):
    """Notes each operation for which the host would wait, by its place."""

    def __init__(self, answer: float = 1.0) -> None:
        super().__init__()
        self.places: list[str] = []
        self.answer = answer

    def note(self, what: str) -> None:
        self.places.append(f"{what} in {place()}")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.name().removeprefix("aten::")
        there = any(map(is_there, tree_leaves(args)))
        if func is aten._local_scalar_dense.default:
            if there:
                self.note(name)
            return self.answer if args[0].dtype.is_floating_point else int(self.answer)
        if func is aten.equal.default:
            self.note(name)
            return True
        if func is aten.nonzero.default and there:
            self.note(name)
            return args[0].new_empty((args[0].numel(), args[0].ndim), dtype=torch.long)
        if func in BY_MASK and there:
            for index in args[1]:
                assert index is None or is_there(index) or index.ndim == 0, (
                    f"an index in main memory: {place()}"
                )
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                self.note(f"{name} by a mask")
                args = (args[0], [as_positions(index) for index in args[1]], *args[2:])
        if func is aten._to_copy.default:
            to = kwargs.get("device")
            if there and to is not None and to.type == "cpu":
                self.note("a copy to the host")
            arrives = not there and to is not None and to.type == "meta"
            if arrives and not kwargs.get("non_blocking"):
                self.note("a copy to the device")
        if func is aten.copy_.default and there and not all(map(is_there, args[:2])):
            self.note("a copy in place")
        return func(*args, **kwargs)


def as_positions(mask: torch.Tensor | None) -> torch.Tensor | None:
    """A mask of one dimension as the list of all its positions."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    assert mask.ndim == 1, f"a mask of {mask.ndim} dimensions: {place()}"
    return mask.new_empty(len(mask), dtype=torch.long)


@contextmanager
def second_device(answer: float = 1.0) -> Iterator[Waits]:
    """Fake tensors inside; yields what is noted of waits."""
    waits = Waits(answer)
    made_by_torch = torch.tensor

    def tensor(*values, device=None, **options):
        if device is not None and torch.device(device).type == "meta":
            like = made_by_torch(*values, **options)
            if like.numel():  # of nothing there is nothing to copy
                waits.note("torch.tensor(..., device)")
            return torch.empty(like.shape, dtype=like.dtype, device="meta")
        return made_by_torch(*values, device=device, **options)

    def tolist(self):
        if is_there(self):
            waits.note("tolist")
        number = answer if self.dtype.is_floating_point else int(answer)
        return nested(number, tuple(self.shape))

    patches = (
        mock.patch.object(functorch, "fake_tensor_allow_meta", True),
        mock.patch.object(torch, "tensor", tensor),
        mock.patch.object(FakeTensor, "tolist", tolist),
    )
    with patches[0], FakeTensorMode(allow_non_fake_inputs=True), patches[1], patches[2], waits:
        yield waits


def nested(number: float, shape: tuple[int, ...]):
    """The number as often as a tensor of this shape holds one, as `tolist` gives them."""
    return [nested(number, shape[1:]) for _ in range(shape[0])] if shape else number


def moved(model: nn.Module) -> nn.Module:
    """The model with fake tensors of the second device in place of its own, tied ones tied."""
    made: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype, device="meta")
                    if isinstance(old, nn.Parameter):
                        new = nn.Parameter(new, old.requires_grad)
                    made[id(old)] = new
                tensors[name] = made[id(old)]
    return model
