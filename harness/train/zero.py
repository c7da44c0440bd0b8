"""DeepSpeed ZeRO behind the engine's interface: stages 0 to 3, optimizer and parameters offloaded
to the CPU or not.

Which stage and what is offloaded is the launcher's to say (launch/accelerate/zero2.yaml and its
DeepSpeed JSON); nothing else about a run changes. What DeepSpeed would do in silence is taken out
of its hands: the summing of micro-batches and the scaling by their number, precision, the learning
rate, checkpoints, and what it would compile. Private names of DeepSpeed are used in the functions
at the end alone; a version older than the tested one is refused.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import DeepSpeedPlugin, DistributedType
from packaging.version import Version
from torch import nn

from harness.config.schema import TrainConfig
from harness.errors import ConfigError
from harness.machine.deepspeed_settings import of_environment
from harness.machine.launch_file import is_on
from harness.redact import say
from harness.train.engine import (
    LONGEST_WAIT,
    MOMENTS,
    Engine,
    check_moments,
    wanted_world_size,
)

# DeepSpeed's collectives go by names that torch 2.13 is about to change: a warning for each, on
# each rank.
warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\.c10d_logger")

# its private names were read, and it skips a step whose norm is not finite in every stage
OLDEST = "0.19.8"
# Its plugin refuses settings beside keys of a launch file, and takes no "auto" for a number.
READ_BY_ACCELERATE = ("ACCELERATE_CONFIG_DS_FIELDS", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")


class ZeroEngine(Engine):
    """The optimizer's states (stage 1), gradients (2) and parameters (3) partitioned over the
    ranks.
    """

    model: Any  # DeepSpeed's engine, whose package is optional
    optimizer: Any  # DeepSpeed's, around AdamW; at stage 0 AdamW itself

    def __init__(self, train: TrainConfig):
        super().__init__(train)
        if self.precision.loss_scaler:
            raise ConfigError(
                f"DeepSpeed and fp16 do not go together ({self.precision.reason}): its own scaler "
                "stalls a run in silence. Use DDP (launch/accelerate/multi_gpu.yaml), or GPUs with "
                "bf16"
            )
        if train.compile and self.stage == 3:
            raise ConfigError(
                "train.compile and ZeRO-3 do not go together: a compiled forward does not gather "
                "partitioned weights; set train.compile=false, or take ZeRO-2"
            )
        self.fused = True if self.offloads else self.fused

    def _accelerator(self, train: TrainConfig) -> Accelerator:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        _check_installation()
        _compile_nothing()
        # Models are loaded whole and partitioned afterwards: a 4-bit weight cannot be loaded in
        # parts.
        self.plugin = DeepSpeedPlugin(hf_ds_config=_settings(train), zero3_init_flag=False)
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        accelerator = Accelerator(
            mixed_precision="no",
            deepspeed_plugin=self.plugin,
            kwargs_handlers=[InitProcessGroupKwargs(backend=backend, timeout=LONGEST_WAIT)],
        )
        unset_hf_deepspeed_config()  # or transformers loads every model in parts at stage 3
        if accelerator.distributed_type != DistributedType.DEEPSPEED:
            raise ConfigError(
                f"DeepSpeed was asked for but Accelerate runs {accelerator.distributed_type.value}"
            )
        return accelerator

    @property
    def _zero(self) -> dict[str, Any]:
        return self.plugin.deepspeed_config["zero_optimization"]

    @property
    def stage(self) -> int:
        return self._zero["stage"]

    @property
    def offloads(self) -> bool:
        return (self._zero.get("offload_optimizer") or {}).get("device") == "cpu"

    def facts(self) -> dict[str, str]:
        return {
            **super().facts(),
            "engine": f"DeepSpeed ZeRO {self.stage}",
            "offload_optimizer": str(self.offloads),
        }

    def _wrapped(self) -> nn.Module:
        if self.stage == 0:  # clipped here, where the norm is looked at first
            self.plugin.deepspeed_config["gradient_clipping"] = 0.0
        with _contiguous(self.bare, after=self.stage < 3):
            wrapped: Any = self.accelerator.prepare(self.bare, self.optimizer)[0]
        self.optimizer = wrapped.optimizer
        stage_of = getattr(wrapped, "zero_optimization_stage", None)
        if stage_of is None or stage_of() != self.stage:
            raise ConfigError(f"ZeRO stage {self.stage} was asked for, but another engine was made")
        return wrapped

    @contextmanager
    def gathered_weights(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        with (
            GatheredParameters(list(self.bare.parameters())),
            _without_hooks(self.optimizer),
        ):
            yield

    def micro_step(self, last: bool) -> AbstractContextManager:
        self.model.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        # `accelerator.backward` would take the optimizer's step as well: no place to look at the
        # norm first.
        self.model.backward(loss * self.world_size)

    def _clipped_norm(self) -> torch.Tensor:
        if self.stage == 0:
            return super()._clipped_norm()
        return torch.zeros((), device=self.device)  # stages 1 to 3 clip in their step, and tell

    def step(self, learning_rate: float, skip: bool = False) -> float | None:
        self._set(learning_rate)
        if self.stage == 0:
            norm = self._norm
            assert norm is not None, "await_gradients comes before every step"
            if skip or not math.isfinite(norm):
                self.discard()
                return None
            self.model.step()
            return norm
        # Where the norm is not finite, stages 1 to 3 leave weights and moments alone and clear what
        # they hold.
        with _infinite_norm(self.optimizer) if skip else nullcontext():
            self.model.step()
        return None if self.optimizer.overflow else float(self.model.get_global_grad_norm())

    def trained_state(self) -> dict[str, torch.Tensor]:
        if self.stage < 3:
            return super().trained_state()
        from deepspeed.runtime.zero import GatheredParameters

        state = {}
        named = dict(self.bare.named_parameters())
        for name in self.bare.trained_state():
            # One by one: together they may be larger than a GPU.
            with GatheredParameters([named[name]]):
                if self.is_main:
                    state[name] = named[name].detach().cpu().clone()
        return state

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        if self.stage == 0:
            return super().optimizer_state()
        from deepspeed.utils import safe_get_full_optimizer_state

        states = [self.optimizer.state.get(flat) for flat in _partitions(self.optimizer)]
        # Before the first step there is nothing to read, and trying raises on some ranks while
        # others wait for ever.
        if self.sum([bool(states) and all(states)])[0] != self.world_size:
            return {}
        _link(self.optimizer)
        saved = {}
        step = torch.as_tensor(states[0]["step"], dtype=torch.float32)
        for name, parameter in self.named.items():
            for key in MOMENTS:
                value = step if key == "step" else safe_get_full_optimizer_state(parameter, key)
                if self.is_main:
                    saved[f"{key}/{name}"] = value.cpu().clone()
        return saved

    def load_optimizer_state(self, saved: Mapping[str, torch.Tensor]) -> None:
        check_moments(saved, self.named)
        if not saved or self.stage == 0:
            return super().load_optimizer_state(saved)
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        steps = max(float(saved[f"step/{name}"]) for name in self.named)
        for flat in _partitions(self.optimizer):
            # As AdamW makes it: a fused one keeps it by the weights.
            device = flat.device if self.fused else "cpu"
            self.optimizer.state[flat] = {
                "step": torch.tensor(steps, device=device),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        _link(self.optimizer)
        for name, parameter in self.named.items():
            for key in MOMENTS[:2]:
                value = saved[f"{key}/{name}"].float()
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, value, key)
                else:  # its own way fails on the last rank where the ranks do not divide the size
                    piece = self._piece(value, _held_size(parameter))
                    safe_set_local_optimizer_state(parameter, piece, key)

    def _piece(self, value: torch.Tensor, size: int) -> torch.Tensor:
        """Returns the `size` numbers that this rank holds of a value; the last ones are padding."""
        padding = size * self.world_size - value.numel()
        padded = nn.functional.pad(value.flatten(), (0, padding))
        return padded[self.rank * size :][:size]


def _check_installation() -> None:
    """Raises ConfigError where DeepSpeed is too old, or would not be what runs."""
    import deepspeed

    if Version(deepspeed.__version__) < Version(OLDEST):
        raise ConfigError(
            f"deepspeed {deepspeed.__version__} is too old: pip install 'deepspeed>={OLDEST}'"
        )
    if is_on(os.environ, "CPU"):
        raise ConfigError(
            "ACCELERATE_USE_CPU together with DeepSpeed gives plain DDP in silence: leave one of "
            "them out"
        )


def _settings(train: TrainConfig) -> dict[str, Any]:
    """Returns DeepSpeed's settings: those of the launch file, and ours over them.

    Raises ConfigError where they say otherwise than the config, or would cast the model.
    """
    found = of_environment(os.environ)
    said = found.agreed(train, wanted_world_size())
    if os.environ.get("RANK", "0") == "0":
        for sentence in said:
            say(sentence, sys.stderr)
    for name in READ_BY_ACCELERATE:
        os.environ.pop(name, None)
    return found.settings | {
        "train_micro_batch_size_per_gpu": 1,  # never used: batches are ours
        "gradient_accumulation_steps": 1,
        "gradient_clipping": train.clip_norm or 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's own fused AdamW needs no compiler
    }


# ---- DeepSpeed's private names, as they are in version OLDEST: here and nowhere else -------------


def _compile_nothing() -> None:
    """Keeps DeepSpeed from compiling a kernel for ranks that share a machine's memory.

    It takes a minute, where there is no GPU.
    """
    sys.modules["deepspeed.comm.torch"].__dict__["build_shm_op"] = lambda: None


@contextmanager
def _contiguous(model: nn.Module, after: bool) -> Iterator[None]:
    """Lays out weights plainly while DeepSpeed sends them to all ranks as bytes.

    `after`: those of the encoder's convolutions get their own layout, channels last, back.
    """
    # Of one by one pixel too, which is called contiguous in either layout.
    odd = [weight for weight in model.parameters() if weight.ndim and weight.stride(-1) != 1]
    for weight in odd:
        weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    yield
    for weight in odd if after else ():
        weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def _is_partitioned(zero: Any) -> bool:
    """Tells stage 3's optimizer from that of stages 1 and 2."""
    return hasattr(zero, "fp32_partitioned_groups_flat")


def _partitions(zero: Any) -> Sequence[torch.Tensor]:
    """Returns this rank's flat pieces of the trained weights, by which AdamW knows its states."""
    if _is_partitioned(zero):
        return zero.fp32_partitioned_groups_flat
    return zero.single_partition_of_fp32_groups


def _held_size(parameter: Any) -> int:
    """Returns how many numbers of a parameter each rank holds at stage 3, padding included."""
    return parameter.ds_tensor.numel()


def _link(zero: Any) -> None:
    """Has stages 1 and 2 know which piece of which state is which parameter's.

    They do so themselves after the first step, but for the first parameter group alone.
    """
    if not _is_partitioned(zero):
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


@contextmanager
def _without_hooks(zero: Any) -> Iterator[None]:
    """Lets modules inside neither fetch their weights before a forward pass nor give them back."""
    offload = zero.parameter_offload
    offload._remove_module_hooks()
    try:
        yield
    finally:
        offload.forward_hooks.clear()
        offload.backward_hooks.clear()
        offload.setup_zero_stage3_hooks()


@contextmanager
def _infinite_norm(zero: Any) -> Iterator[None]:
    """Skips a step inside as one with an infinite gradient norm is skipped.

    `zero_grad` alone leaves gradients of a discarded step in what is offloaded: they would be part
    of the next one's.
    """
    infinite = torch.tensor(math.inf)
    if _is_partitioned(zero):
        zero._get_norm_groups = lambda: [infinite]
    else:
        zero.scaled_global_norm = lambda: infinite
    try:
        yield
    finally:
        del zero.__dict__["_get_norm_groups" if _is_partitioned(zero) else "scaled_global_norm"]
