"""What is wrong with a config on this machine, and the fix, before any process is spawned.

Config -> nothing, or one sentence (`check_before_launch`), or every Finding (`diagnose`, which is
`harness doctor`). Imports no torch: `harness train` and every rank of a launched run call the
former first.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from harness.checks import checks_before_launch, data_sets
from harness.config.keys import flatten
from harness.config.schema import Config
from harness.doctor.findings import Finding, failed, run

if TYPE_CHECKING:
    from harness.machine.launcher import Launch


def diagnose(
    config: Config | None = None,
    launch: Launch | None = None,
    processes: int | None = None,
    overfit: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """All that `harness doctor` has to say: of this machine, of the config on it, of learning
    `overfit` images.
    """
    from harness.machine.launcher import Launch, gpus

    launch = launch or Launch()
    count = 0 if launch.cpu else gpus()
    processes = processes or launch.processes or max(count, 1)
    found = _diagnose_machine(config, count, processes)
    if config is None:
        return found
    from harness.doctor import examine, machine

    refused = []
    for key, check in checks_before_launch(config):
        refused += run(key, partial(_told, key, check, config))
    found += refused
    gpus_here = machine.gpus_here() if count else []
    found += run("options", lambda: examine.options(config, launch, gpus_here))
    found += run("train.precision", lambda: examine.precision(config, gpus_here))
    found += run("MLflow", lambda: examine.tracking(config))
    if failed(refused):
        found.append(
            Finding(
                "data and model", "warning", "not looked at", "put the errors above right first"
            )
        )
        return found
    for key, path in data_sets(config).items():
        found += run(key, lambda key=key, path=path: examine.first_sample(key, path, config))
    found += run("data", lambda: examine.sets_apart(config))
    found += run("model.vision.id", lambda: examine.encoder_for_later(config))
    found += run("global batch", lambda: examine.world(config, processes))
    found += run("texts", lambda: examine.texts(config))
    found += run("model", lambda: examine.model(config, "cuda" if count else "cpu"))
    found += run("plan", lambda: examine.plan(config, launch, processes))
    if overfit:
        from harness.doctor import overfit as trial

        found += run(
            f"overfit {overfit}",
            lambda: trial.findings(trial.overfit(config, overfit, progress=progress)),
        )
    return found


def _told(key: str, check: Callable[[], object], config: Config) -> Finding | None:
    """One of the checks before a launch, with a line for models and prompts that are fine."""
    check()
    if not key.startswith(("model.", "prompts.")):
        return None
    value = flatten(config)[key]
    if key == "model.vision.id" and config.model.vision.kind != "clip":
        return Finding(key, "OK", f"{config.model.vision.kind}, a package")
    where = (
        ""
        if key.startswith("prompts.")
        else ", a folder"
        if Path(value).is_dir()
        else ", from the hub or its cache"
    )
    return Finding(key, "OK", f"{value}{where}")


def _diagnose_machine(config: Config | None, gpus: int, processes: int) -> list[Finding]:
    from harness.doctor import machine

    with ThreadPoolExecutor(1) as pool:
        reduced = pool.submit(machine.all_reduce, gpus)  # takes seconds, beside the others
        found = run("Python", machine.python)
        found += run("torch", lambda: machine.torch_build(gpus, machine.driver()))
        found += run("GPU", lambda: machine.graphics(machine.gpus_here() if gpus else []))
        found += run("bitsandbytes", machine.four_bit)
        found += run("DeepSpeed", machine.deepspeed)
        found += run("DeepSpeed ops", machine.compiler)
        found += run("build locks", machine.build_locks)
        found += run("threads", lambda: machine.threads(processes))
        found += run(
            "/dev/shm", lambda: machine.shared_memory(gpus, config.data.workers if config else 0)
        )
        found += run("memory", machine.host_memory)
        found += run("disk", lambda: machine.disk(config.out_dir if config else Path("runs")))
        return found + run("all-reduce", reduced.result)
