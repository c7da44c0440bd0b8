"""Encoder and bridge compiled for training (train.compile): the same names, the same evaluations.

Their `forward` is compiled, not the module, so that no checkpoint ever sees another name of a
weight. Answers, scores and saved models come from the forward as it is written: a compiled one
differs in the last digits.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from harness.errors import ConfigError

BACKEND = "inductor"
# Prompts are padded to a multiple of so many tokens: a bridge that reads them then sees few shapes.
PROMPT_MULTIPLE = 8
COMPILERS = ("g++", "c++", "clang++")


class Compilations:
    """How many graphs were compiled so far: a step in which that grows is a warm-up."""

    def __init__(self) -> None:
        self.count = 0

    def backend(
        self, graph: torch.fx.GraphModule, inputs: list[torch.Tensor]
    ) -> Callable[..., Any]:
        self.count += 1
        return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)


def compile_forwards(model: nn.Module, parts: Sequence[nn.Module | None]) -> Compilations:
    """Has the parts run compiled while `model` is in train mode. Raises ConfigError where there is
    no compiler for them.
    """
    named = os.environ.get("CXX")
    if not any(map(shutil.which, (named,) if named else COMPILERS)):
        raise ConfigError(
            f"train.compile is true, but there is no C++ compiler ({named or ', '.join(COMPILERS)}"
            "): install one (apt install g++), or set train.compile=false"
        )
    compilations = Compilations()
    for part in parts:
        if part is not None:
            part.forward = _switched(model, part.forward, compilations)
    return compilations


def _switched(
    model: nn.Module, forward: Callable[..., Any], compilations: Compilations
) -> Callable[..., Any]:
    # Sizes that change, as the last micro-batch's, are made symbolic at the second one.
    compiled = torch.compile(forward, backend=compilations.backend)

    def switched(*given: Any) -> Any:
        return (compiled if model.training else forward)(*given)

    return switched
