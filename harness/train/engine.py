"""Everything that differs between plain Accelerate, a loss scaler and DeepSpeed ZeRO (zero.py),
behind one interface.

    prepare -> for each micro-batch: with micro_step(last): model(batch), backward(loss) -> step()
    -> norm, or skipped

The train loop knows no engine by name. State goes in and out by parameter name, so that any engine
reads any other's.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from harness.config.schema import TrainConfig
from harness.errors import ConfigError
from harness.machine.precision import Precision, choose

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
LONGEST_WAIT = timedelta(
    hours=2
)  # of all ranks for the one that evaluates; a rank that hangs is noticed as late


def wanted_world_size() -> int:
    """How many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Engine:
    """Accelerate with DDP where there are several processes, and our own loss scaler where fp16
    needs one.
    """

    def __init__(self, train: TrainConfig):
        self.accelerator = self._accelerator(train)
        if self.accelerator.num_processes != wanted_world_size():
            # `accelerate launch --cpu --num_processes 2` starts one process and says nothing.
            raise ConfigError(
                f"the launcher asked for {wanted_world_size()} processes but Accelerate runs "
                f"{self.accelerator.num_processes}; on the CPU use `harness train --processes N`"
            )
        self.train = train
        self.precision: Precision = choose(train.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.loss_scaler)

    def _accelerator(self, train: TrainConfig) -> Accelerator:
        # Accelerate is told "no" mixed precision: which part runs in which dtype is precision.py's,
        # part by part.
        # Buffers are those of frozen parts, equal on all ranks: broadcasting them at every step is
        # wasted.
        return Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            kwargs_handlers=[
                DistributedDataParallelKwargs(
                    broadcast_buffers=False, gradient_as_bucket_view=True
                ),
                InitProcessGroupKwargs(timeout=LONGEST_WAIT),
            ],
        )

    def facts(self) -> dict[str, str]:
        """For the log and the tracker."""
        engine = "DDP" if self.world_size > 1 else "one process"
        return {**self.precision.facts(), "world_size": str(self.world_size), "engine": engine}

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def rank(self) -> int:
        return self.accelerator.process_index

    @property
    def world_size(self) -> int:
        return self.accelerator.num_processes

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def prepare(self, model: nn.Module) -> nn.Module:
        """The model to call in training. The optimizer holds what is trainable and nothing else."""
        self.bare = model
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.named, self.train), betas=self.train.betas
        )
        with (
            warnings.catch_warnings()
        ):  # torch 2.13 renames `broadcast_buffers`; older ones know no other name
            warnings.simplefilter("ignore", FutureWarning)
            self.model = self.accelerator.prepare_model(model) if self.world_size > 1 else model
        return self.model

    def micro_step(self, last: bool) -> AbstractContextManager:
        """Around forward and backward of one micro-batch: gradients are reduced over the ranks at
        the last one only.
        """
        return (
            nullcontext() if last or self.world_size == 1 else self.accelerator.no_sync(self.model)
        )

    def backward(self, loss: torch.Tensor) -> None:
        """`loss` is this rank's share of the global mean (sum / global weight).

        DDP averages gradients over the ranks, so a share is scaled by their number.
        """
        self.scaler.scale(loss * self.world_size).backward()

    def step(self, learning_rate: float, skip: bool = False) -> float | None:
        """Clips and moves the weights. Returns the gradient norm, or None when the step was skipped
        as non-finite.

        `skip`: some rank's loss was not finite, whatever the gradients say. The norm is taken after
        the gradients were reduced, so that all ranks see the same and decide alike.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["share"]
        self.scaler.unscale_(self.optimizer)
        limit = self.train.clip_norm if self.train.clip_norm is not None else float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), limit).item()
        finite = math.isfinite(norm) and not skip
        if finite:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.discard()
        return norm if finite else None

    def discard(self) -> None:
        """Leaves nothing of this step's gradients behind."""
        self.optimizer.zero_grad(set_to_none=True)

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sums over all ranks, in fp64, as one all-reduce."""
        packed = torch.tensor(list(values), dtype=torch.float64, device=self.device)
        return (self.accelerator.reduce(packed, "sum") if self.world_size > 1 else packed).tolist()

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()

    def gathered_weights(self) -> AbstractContextManager:
        """All weights are whole inside, on every rank: the main process alone may run the model."""
        return nullcontext()

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Trained weights by name, gathered; the same on every rank."""
        return self.bare.trained_state()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """`exp_avg/NAME`, `exp_avg_sq/NAME` and `step/NAME` of every parameter that has been moved."""
        state = {}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = torch.as_tensor(value)
        return state

    def load_optimizer_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        """`saved` is empty before the first step. Raises ConfigError naming the first moment
        missing or left over.
        """
        check_moments(saved, self.named)
        for name, parameter in self.named.items() if saved else ():
            self.optimizer.state[parameter] = {
                # AdamW keeps its step on the CPU unless it is fused or captured.
                key: saved[f"{key}/{name}"].to("cpu" if key == "step" else parameter.device).clone()
                for key in MOMENTS
            }

    @property
    def loss_scale(self) -> float:
        return self.scaler.get_scale()  # 1 where none is needed

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_scaler_state(self, saved: Mapping[str, Any]) -> None:
        if saved:
            self.scaler.load_state_dict(dict(saved))

    def close(self) -> None:
        """Waits for all ranks and ends NCCL's group; ending gloo's can wait for its own thread for
        ever.
        """
        self.wait()
        if self.device.type == "cuda":
            self.accelerator.end_training()


def check_moments(saved: Mapping[str, torch.Tensor], named: Mapping[str, nn.Parameter]) -> None:
    """Raises ConfigError where saved moments are of another model."""
    expected = {f"{key}/{name}" for name in named for key in MOMENTS}
    if saved and (odd := sorted(expected ^ saved.keys())):
        raise ConfigError(
            f"the optimizer state does not fit this model: {odd[0]} and {len(odd) - 1} more differ"
        )


def parameter_groups(named: Mapping[str, nn.Parameter], train: TrainConfig) -> list[dict[str, Any]]:
    """Groups for the optimizer. `share`: of the scheduled learning rate. Biases and norms are not
    decayed.
    """
    bridge_share = (train.bridge_learning_rate or train.learning_rate) / train.learning_rate
    groups: dict[tuple[bool, bool], dict[str, Any]] = {}
    for name, parameter in named.items():
        of_bridge, decayed = name.startswith("bridge."), parameter.ndim > 1
        group = {
            "params": [],
            "lr": train.learning_rate,
            "share": bridge_share if of_bridge else 1.0,
        }
        group["weight_decay"] = train.weight_decay if decayed else 0.0
        groups.setdefault((of_bridge, decayed), group)["params"].append(parameter)
    return list(groups.values())
