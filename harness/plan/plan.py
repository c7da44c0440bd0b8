"""Config + device -> the plan of a run, and its check before a launch: what `harness plan` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from harness.config.schema import Config
from harness.errors import ConfigError
from harness.machine import devices
from harness.machine.launch_file import Launch
from harness.machine.launcher import gpus
from harness.plan.advice import advice, smaller_evaluation
from harness.plan.planner import Planner
from harness.plan.report import Plan, gb


def plan(
    config: Config,
    device: str = "here",
    launch: Launch | None = None,
    processes: int | None = None,
    brief: bool = False,
) -> Plan:
    """Returns the plan for a device by name, "cpu" or "here". `brief`: without the largest
    micro-batch, and advice only where the run does not fit. Raises ConfigError for
    what cannot be planned: no config.json, no such device or precision.
    """
    from harness.plan.workload import workload

    launch = launch or Launch()
    found = devices.device("cpu" if device == "here" and launch.cpu else device)
    # Without a number the launcher takes all GPUs.
    many = gpus() if device == "here" and found.is_gpu else 1
    work = workload(config)
    planner = Planner(
        config, found, launch, processes or launch.processes or many, work, work.encoder
    )
    made = advised(planner, brief)
    if device == "here" or processes or launch.processes or launch.single or not launch.name:
        return made
    return replace(
        made,
        warnings=[*made.warnings, f"1 process: give --processes N for {launch.name} on N devices"],
    )


def smaller_micro_batch(config: Config, processes: int) -> int:
    """Returns the largest half, quarter, ... of the micro-batch that fits the device that is here,
    in `processes` with DDP; 0 where none does. For a run whose own did not fit after all.
    """
    from harness.plan.workload import workload

    work = workload(config)
    planner = Planner(config, devices.here(), Launch(), processes, work, work.encoder)
    images = planner.images // 2
    while images and not planner.fits(images):
        images //= 2
    return images


def advised(planner: Planner, brief: bool) -> Plan:
    """Returns the planner's plan with what would make the run fit, where that could help."""
    made = planner.plan(brief)
    if made.refused:
        return made
    is_trained = planner.fits(planner.images)
    said = advice(planner, is_trained, made.largest_micro_batch)
    if is_trained and not made.fits:
        said = smaller_evaluation(planner)
    return replace(made, advice=said)


def check(
    config: Config,
    launch: Launch | None,
    processes: int | None,
    say: Callable[[str], None],
    force: bool = False,
) -> None:
    """Says in a few lines what the run needs on the device that is here; raises ConfigError where
    it cannot fit.

    `force` does not help a run that would be refused whatever its size. The plan is made in a
    process of its own: torch would stay in this one's memory for as long as the run lasts.
    """
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        made = pool.submit(plan, config, "here", launch, processes, True).result()
    for line in made.summary():
        say(line)
    if made.refused:
        raise ConfigError(f"refused: {made.refused}")
    if not made.fits and not force:
        remedy = "no change of the config that was tried makes it fit"
        if made.advice:
            remedy = made.advice[0]
        what, needed, limit = made.tightest
        raise ConfigError(
            f"the run needs {gb(needed)} of the {gb(limit)} of {what} that {made.device} has: "
            f"{remedy} (--force goes on nevertheless)"
        )
