"""The same bits twice on a GPU: what `train.deterministic` asks of cuBLAS, cuDNN and torch.

On a CPU a run has the same bits without it. Imports no torch until it is asked for.
"""

from __future__ import annotations

import os

from harness.config.schema import TrainConfig


def set_workspace(train: TrainConfig) -> None:
    """Gives cuBLAS, where `train.deterministic` says so, a work space with which it sums in the
    same order at every call.

    It is read when CUDA starts: set before that, here or in the process that launches this one.
    One that the environment asks for stays; torch refuses one that will not do.
    """
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def ask_for_the_same_bits(train: TrainConfig) -> None:
    """Makes every operation of this process, where `train.deterministic` says so, give the same
    bits for the same input, or raise RuntimeError with its name where torch knows no such way.
    """
    if not train.deterministic:
        return
    import torch

    set_workspace(train)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
