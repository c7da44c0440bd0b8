"""The program that `accelerate launch -m harness.train CONFIG` runs on every rank."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence

from harness.checks import check_before_launch
from harness.config.load import load
from harness.errors import ConfigError, explain
from harness.machine.parent import watch_parent
from harness.machine.ranks import settle
from harness.redact import guard_output, say
from harness.train.failures import explain_failure
from harness.train.log_model import log_model
from harness.train.run import run


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains and returns the exit code; after one sentence of one rank 2 for bad input, 1 where
    memory or another rank was lost.
    """
    parser = argparse.ArgumentParser(
        prog="harness.train", description="Train a vision-language model."
    )
    parser.add_argument("config", help="a YAML file of configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--resume", help="auto, or a checkpoint's folder")
    parser.add_argument("--restart", action="store_true", help="move an earlier run aside")
    given = parser.parse_args(arguments)
    watch_parent()
    guard_output()
    try:
        launcher = settle(os.environ)
    except ConfigError as error:  # every process was started alike, and none knows its rank
        say(f"harness: {error}", sys.stderr)
        return 2
    rank = os.environ.get("RANK", "0")
    config = None
    try:
        if launcher and rank == "0":
            size = os.environ["WORLD_SIZE"]
            say(f"{size} processes, as {launcher} has started them", sys.stderr)
        config = load(given.config, given.overrides)
        check_before_launch(config)
        last = run(config, given.resume, restart=given.restart)
    except Exception as error:
        code = 1
        sentence = explain_failure(error, config, rank)
        if sentence is None:
            code = 2
            sentence = explain(error)
        if sentence is None:
            raise
        if rank != "0":
            time.sleep(3)  # what concerns all ranks is said by the first, whose end ends this one
        speaker = "harness" if rank == "0" else f"harness, rank {rank}"
        say(f"{speaker}: {sentence}", sys.stderr)
        return code
    if rank == "0":
        if config.tracking.log_model:
            log_model(config, last)
        say(f"checkpoint: {last}")
    return 0


if __name__ == "__main__":
    try:
        code = main()
    except SystemExit as left:  # argparse and a stopped run give a number
        code = int(left.code or 0)
    sys.stdout.flush()
    sys.stderr.flush()
    # The interpreter's own way out meets gloo's threads: 1 launch in 100 aborted there, its work
    # done.
    os._exit(code)
