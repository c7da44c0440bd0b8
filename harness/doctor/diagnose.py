"""What is wrong with a config on this machine, and the fix: every Finding of `harness doctor`.

machine -> what would be refused before a launch -> options, data, model, plan -> overfit
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from harness.checks import checks_before_launch, data_sets
from harness.config.encoder import PACKAGES
from harness.config.keys import flatten
from harness.config.schema import Config
from harness.doctor import examine, machine, overfit
from harness.doctor.findings import Check, Finding, failed, ok, run, warning
from harness.machine.launch_file import Launch
from harness.machine.launcher import gpus


def diagnose(
    config: Config | None = None,
    launch: Launch | None = None,
    processes: int | None = None,
    overfit_images: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Finding]:
    """Returns all findings: the machine's, the config's on it, those of learning a few images."""
    launch = launch or Launch()
    count = 0 if launch.cpu else gpus()
    processes = processes or launch.processes or max(count, 1)
    found = _of_machine(config, count, processes)
    if config is None:
        return found
    refused: list[Finding] = []
    for key, check in checks_before_launch(config):
        refused += run(key, partial(_passed, key, check, config))
    found += refused
    gpus_here = machine.gpus_here() if count else []
    found += run("options", lambda: examine.options(config, launch, gpus_here))
    found += run("launch file", lambda: examine.launch_file(config, launch, processes))
    found += run("train.precision", lambda: examine.precision(config, gpus_here))
    found += run("MLflow", lambda: examine.tracking(config))
    if failed(refused):
        fix = "put the errors above right first"
        return [*found, warning("data and model", "not looked at", fix)]
    device = "cuda" if count else "cpu"
    for name, look in _at_data_and_model(config, launch, processes, device):
        found += run(name, look)
    if overfit_images:
        trial = partial(overfit.overfit, config, overfit_images, progress=progress)
        found += run(f"overfit {overfit_images}", lambda: overfit.findings(trial()))
    return found


def _of_machine(config: Config | None, gpus: int, processes: int) -> list[Finding]:
    out = config.out_dir if config else Path("runs")
    workers = config.data.workers if config else 0
    looks: dict[str, Check] = {
        "Python": machine.python,
        "torch": lambda: machine.torch_build(gpus, machine.driver()),
        "GPU": lambda: machine.graphics(machine.gpus_here() if gpus else []),
        "bitsandbytes": machine.four_bit,
        "DeepSpeed": machine.deepspeed,
        "threads": lambda: machine.threads(processes),
        "/dev/shm": lambda: machine.shared_memory(gpus, workers),
        "memory": machine.host_memory,
        "disk": lambda: machine.disk(out),
    }
    with ThreadPoolExecutor(1) as pool:
        reduced = pool.submit(machine.all_reduce, gpus)  # takes seconds, beside the others
        found = [finding for name, look in looks.items() for finding in run(name, look)]
        return found + run("all-reduce", reduced.result)


def _at_data_and_model(
    config: Config, launch: Launch, processes: int, device: str
) -> Iterator[tuple[str, Check]]:
    for key, path in data_sets(config).items():
        yield key, partial(examine.first_sample, key, path, config)
    yield "data", lambda: examine.sets_apart(config)
    yield "model.vision.id", lambda: examine.encoder_for_later(config)
    yield "global batch", lambda: examine.world(config, processes, launch.machines)
    yield "texts", lambda: examine.texts(config)
    yield "model", lambda: examine.model(config, device)
    yield "plan", lambda: examine.plan(config, launch, processes)


def _passed(key: str, check: Callable[[], object], config: Config) -> Finding | None:
    """Makes one of the checks before a launch; models and prompts that pass get a line."""
    check()
    if not key.startswith(("model.", "prompts.")):
        return None
    value = flatten(config)[key]
    if key == "model.vision.id" and config.model.vision.kind in PACKAGES:
        vision = config.model.vision
        own = f", weights of {vision.weights}" if vision.weights else ""
        return ok(key, f"{vision.kind}, a package{own}")
    if key.startswith("prompts."):
        return ok(key, value)
    return ok(
        key, f"{value}, {'a folder' if Path(value).is_dir() else 'from the hub or its cache'}"
    )
