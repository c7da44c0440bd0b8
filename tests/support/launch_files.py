"""What accelerate makes of a launch file, without starting anything."""

from __future__ import annotations

import argparse
from pathlib import Path


def accelerated(file: Path, *flags: str) -> tuple[dict[str, str], argparse.Namespace]:
    """Returns the environment and the arguments of what `accelerate launch --config_file FILE FLAGS
    -m harness.train` would start.
    """
    from accelerate.commands import launch as accelerate
    from accelerate.utils import launch as environments

    given = ["--config_file", str(file), *flags, "-m", "harness.train", "configs/scale.yaml"]
    args, defaults, from_file = accelerate._validate_launch_command(
        accelerate.launch_command_parser().parse_args(given)
    )
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if from_file else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        return environments.prepare_deepspeed_cmd_env(args)[1], args
    if args.multi_gpu or args.use_fsdp:
        return environments.prepare_multi_gpu_env(args), args
    return environments.prepare_simple_launcher_cmd_env(args)[1], args
