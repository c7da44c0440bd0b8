"""Which engine a launcher asks for."""

from __future__ import annotations

import os
import sys

from harness.config.schema import TrainConfig
from harness.errors import ConfigError
from harness.machine.determinism import ask_for_the_same_bits
from harness.machine.launch_file import (
    NO_ZERO_FOR_A_FIRST_STAGE,
    check_accelerates_environment,
    is_on,
)
from harness.redact import say
from harness.train.engine import Engine


def make_engine(train: TrainConfig) -> Engine:
    """Returns the launcher's choice: DeepSpeed where a launch file says so, else plain Accelerate.

    First of all asks torch for the same bits, if `train.deterministic` says so: an engine starts
    CUDA. Raises ConfigError where the launcher has started one process in place of several, or was
    told to do what harness does not.
    """
    ask_for_the_same_bits(train)
    set_by_accelerate = {"MASTER_ADDR", "MASTER_PORT", "ACCELERATE_MIXED_PRECISION"}
    if set_by_accelerate <= os.environ.keys() and "RANK" not in os.environ:
        # `accelerate launch --cpu --num_processes 2`: it says nothing and starts one
        raise ConfigError(
            "accelerate launch was asked for several processes and has started one: take "
            "--config_file launch/accelerate/cpu.yaml (on GPUs multi_gpu.yaml) in place of its own "
            "options; for a single process, unset MASTER_ADDR and MASTER_PORT"
        )
    said = check_accelerates_environment(os.environ)
    if os.environ.get("RANK", "0") == "0":
        for sentence in said:
            say(sentence, sys.stderr)
    if is_on(os.environ, "DEEPSPEED"):
        if train.objective:
            raise ConfigError(NO_ZERO_FOR_A_FIRST_STAGE)
        from harness.train.zero import ZeroEngine

        return ZeroEngine(train)
    return Engine(train)
