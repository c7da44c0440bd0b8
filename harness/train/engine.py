"""Everything that differs between plain Accelerate, a loss scaler and DeepSpeed ZeRO (zero.py),
behind one interface.

    prepare -> for each micro-batch: with micro_step(last): model(batch), backward(loss)
    -> await_gradients() -> step() -> norm, or skipped

A step has the host wait for the device once, in `await_gradients`; until then it only says what is
to be done. The train loop knows no engine by name. State goes in and out by parameter name, so that
any engine reads any other's.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from torch import nn

from harness.config.schema import TrainConfig
from harness.errors import ConfigError
from harness.machine.dealing import Alone, Among
from harness.machine.heartbeat import Heartbeat, meeting
from harness.machine.precision import Precision, choose
from harness.model.vlm import VisionLanguageModel

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
# By what they do an embedding and an offset, though they have two dimensions and more.
NOT_DECAYED = ("bridge.body.query_tokens", "bridge.projection.mean_QD")
# The longest that ranks wait for each other in a step: for one that saves or reads. Evaluations are
# waited for elsewhere (dealing.py); a rank that hangs is noticed by the heartbeat.
LONGEST_WAIT = timedelta(minutes=30)


def wanted_world_size() -> int:
    """Returns how many processes the launcher says there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


class Engine:
    """Accelerate with DDP where there are several processes, and our own loss scaler where fp16
    needs one.
    """

    def __init__(self, train: TrainConfig):
        with meeting(train.rank_warning_seconds):
            self.accelerator = self._accelerator(train)
        if self.accelerator.num_processes != wanted_world_size():
            # `accelerate launch --cpu --num_processes 2` starts one process and says nothing.
            raise ConfigError(
                f"the launcher asked for {wanted_world_size()} processes but Accelerate runs "
                f"{self.accelerator.num_processes}; on the CPU use `harness train --processes N`"
            )
        self.heart = Heartbeat(
            *(self.rank, self.world_size),
            tell_after=train.rank_warning_seconds,
            end_after=train.rank_timeout_seconds,
        )
        self.train = train
        # AdamW in one kernel, without temporaries; None: torch chooses
        self.fused: bool | None = True if self.device.type in ("cuda", "cpu") else None
        self.precision: Precision = choose(train.precision, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision.loss_scaler)
        self.loss_scale = self.scaler.get_scale()  # of the last step; 1 where none is needed
        self._norm: float | None = None  # of gradients that are awaited and not yet used

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
        """Returns what the log and the tracker are told of the engine."""
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

    def prepare(self, model: VisionLanguageModel, decays_queries: bool = False) -> nn.Module:
        """Returns the model to call in training; the optimizer holds what is trainable alone.

        `decays_queries`: as `parameter_groups` has it.
        """
        self.bare = model
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        groups = parameter_groups(self.named, self.train, decays_queries)
        self.optimizer = torch.optim.AdamW(groups, betas=self.train.betas, fused=self.fused)
        self.model = self._wrapped()
        return self.model

    def _wrapped(self) -> nn.Module:
        """Returns the model as it is to be called."""
        if self.world_size == 1:
            return self.bare
        # torch 2.13 renames `broadcast_buffers`; older ones know no other name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            return self.accelerator.prepare_model(self.bare)

    def micro_step(self, last: bool) -> AbstractContextManager:
        """Surrounds forward and backward of one micro-batch.

        Gradients are reduced over the ranks at the last one only.
        """
        if last or self.world_size == 1:
            return nullcontext()
        return self.accelerator.no_sync(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds the gradients of `loss`, this rank's share of the global mean (sum / global weight).

        DDP averages gradients over the ranks, so a share is scaled by their number.
        """
        self.scaler.scale(loss * self.world_size).backward()

    def await_gradients(self, *figures: torch.Tensor) -> list[float]:
        """Unscales and clips the gradients, then waits for the device. Returns the figures, each
        on the device and of one dimension, as numbers; the norm is read with them.
        """
        self.scaler.unscale_(self.optimizer)
        norm = self._clipped_norm()
        scale = self.scaler.scale(torch.ones_like(norm))
        self._norm, self.loss_scale, *told = self._read(torch.stack([norm, scale]), *figures)
        return told

    def step(self, learning_rate: float, skip: bool = False) -> float | None:
        """Moves the weights, after `await_gradients`. Returns the gradient norm, or None when the
        step was skipped as non-finite.

        `skip`: some rank's loss was not finite, whatever the gradients say. The norm is taken after
        the gradients were reduced, so that all ranks see the same and decide alike.
        """
        self._set(learning_rate)
        norm = self._norm
        assert norm is not None, "await_gradients comes before every step"
        self._norm = None
        finite = math.isfinite(norm) and not skip
        if finite:
            # not by the scaler, which would wait to see again that nothing is infinite
            self.optimizer.step()
        self.scaler.update()
        self.discard()
        return norm if finite else None

    def _set(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["share"]

    def _clipped_norm(self) -> torch.Tensor:
        """Clips the gradients and returns what their norm was before."""
        limit = math.inf if self.train.clip_norm is None else self.train.clip_norm
        return torch.nn.utils.clip_grad_norm_(self.named.values(), limit)

    def discard(self) -> None:
        """Leaves nothing of this step's gradients behind."""
        self.optimizer.zero_grad(set_to_none=True)

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sums over all ranks, in fp64, as one all-reduce."""
        if self.world_size == 1:
            return [float(value) for value in values]
        return self._read(self.summed(values))

    def summed(self, values: Iterable[float], *on_device: torch.Tensor) -> torch.Tensor:
        """Sums over all ranks, in fp64, as one all-reduce that the host does not wait for: numbers
        that are on the device, and behind them `values`, which the host knows.
        """
        known = torch.tensor(list(values), dtype=torch.float64)
        if self.device.type == "cuda":
            known = known.pin_memory()  # else the copy is waited for
        known = known.to(self.device, non_blocking=True)
        packed = torch.cat([*(value.double().reshape(1) for value in on_device), known])
        if self.world_size == 1:
            return packed
        with self.heart.waiting():
            return self.accelerator.reduce(packed, "sum")

    def _read(self, *figures: torch.Tensor) -> list[float]:
        """Waits for the device, once."""
        with self.heart.waiting():
            return torch.cat([values.double() for values in figures]).tolist()

    def wait(self) -> None:
        with self.heart.waiting():
            self.accelerator.wait_for_everyone()

    def dealer(self, stop_asked: Callable[[], int]) -> Alone:
        """Returns what deals out an evaluation over the ranks. Each waits by the store for what it
        is told, not in a collective, so that no limit of NCCL's ends a long evaluation.
        """
        if self.world_size == 1:
            return Alone(stop_asked)
        store = self.heart.store("dealt")
        return Among(store, self.rank, self.world_size, stop_asked, self.heart.waiting)

    def gathered_weights(self) -> AbstractContextManager:
        """Makes all weights whole inside, on every rank, each of which may run the model alone."""
        return nullcontext()

    def trained_state(self) -> dict[str, torch.Tensor]:
        """Returns the trained weights by name, gathered; the main process has them all."""
        return self.bare.trained_state()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """Returns `exp_avg/NAME`, `exp_avg_sq/NAME`, `step/NAME` of each parameter moved so far."""
        state = {}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{key}/{name}"] = torch.as_tensor(value)
        return state

    def load_optimizer_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        """Takes over what `optimizer_state` gave; it is empty before the first step.

        Raises ConfigError naming the first moment missing or left over.
        """
        check_moments(saved, self.named)
        for name, parameter in self.named.items() if saved else ():
            self.optimizer.state[parameter] = {
                # AdamW keeps its step on the CPU unless it is fused or captured.
                key: saved[f"{key}/{name}"]
                .to("cpu" if key == "step" and not self.fused else parameter.device)
                .clone()
                for key in MOMENTS
            }

    def scaler_state(self) -> dict[str, Any]:
        return self.scaler.state_dict()

    def load_scaler_state(self, saved: Mapping[str, Any]) -> None:
        if saved:
            self.scaler.load_state_dict(dict(saved))
            self.loss_scale = self.scaler.get_scale()

    def close(self) -> None:
        """Waits for all ranks and ends NCCL's group; ending gloo's can wait for its own thread for
        ever.
        """
        self.wait()
        self.heart.stop()
        if self.device.type == "cuda":
            self.accelerator.end_training()


def check_moments(saved: Mapping[str, torch.Tensor], named: Mapping[str, nn.Parameter]) -> None:
    """Raises ConfigError where saved moments are of another model."""
    expected = {f"{key}/{name}" for name in named for key in MOMENTS}
    if saved and (odd := sorted(expected ^ saved.keys())):
        raise ConfigError(
            f"the optimizer state does not fit this model: {odd[0]} and {len(odd) - 1} more differ"
        )


def parameter_groups(
    named: Mapping[str, nn.Parameter], train: TrainConfig, decays_queries: bool = False
) -> list[dict[str, Any]]:
    """Returns groups for the optimizer. Biases, norms and NOT_DECAYED are not decayed.

    `share`: of the scheduled learning rate. `decays_queries`: NOT_DECAYED is, as in runs that were
    begun so.
    """
    spared = () if decays_queries else NOT_DECAYED
    bridge_share = (train.bridge_learning_rate or train.learning_rate) / train.learning_rate
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in named.items():
        share = bridge_share if name.startswith("bridge.") else 1.0
        is_decayed = parameter.ndim > 1 and name not in spared
        decay = train.weight_decay if is_decayed else 0.0
        groups.setdefault((share, decay), []).append(parameter)
    return [
        {"params": members, "lr": train.learning_rate, "share": share, "weight_decay": decay}
        for (share, decay), members in groups.items()
    ]
