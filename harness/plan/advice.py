"""What would make a run fit: the cheapest change first, each kept for the next and planned before
it is named.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from harness.machine.devices import DEVICES
from harness.machine.launch_file import read_launch
from harness.plan.report import gb, tightest

if TYPE_CHECKING:
    from harness.plan.planner import Planner

Change = Callable[["Planner"], "Planner"]


def advice(planner: Planner, fits: bool, largest: int | None) -> list[str]:
    """Returns one sentence, or none where nothing is to be gained."""
    images = planner.images
    if fits:
        more = min(largest or 0, planner.share)
        return (
            [f"train.micro_batch={more} fits as well: fewer and larger products"]
            if more > images
            else []
        )
    short = planner.short_of(images)
    if short == "main memory" and (fewer := _fewer(planner)):
        there = planner.changed(processes=fewer)
        needed = there.limits(images, there.without_gradients)[short][0]
        return [f"--processes {fewer} fits: {gb(needed)} of {short}"]
    if largest:
        return [f"train.micro_batch={largest}, with the same global_batch, fits"]
    said: list[str] = []
    now = planner
    for words, change in _changes(planner):
        now = change(now)
        said.append(words)
        if best := images if now.fits(images) else now.largest():
            smaller = f", train.micro_batch={best}" if best < images else ""
            offload = now.launch.offload_optimizer
            host = f", and {gb(now.host(best, 0))} of main memory" if offload else ""
            return [f"{', '.join(said)}{smaller} fits: {gb(now.bytes(best))}{host}"]
    tried = ", ".join(["train.micro_batch=1", *said])
    if short == "main memory" and planner.device.is_gpu:
        return [
            f"even {tried} needs {gb(now.host(1, 0))} of main memory: data.workers=0, "
            "or a larger machine"
        ]
    for device in sorted(DEVICES.values(), key=lambda device: device.memory):
        there = replace(now, device=device, passes={})
        if device.usable > now.bytes(1) and there.fits(1):
            return [
                f"even {tried} does not fit {planner.device.name}; {device.name} does: "
                f"{gb(there.bytes(1))}"
            ]
    return [
        f"even {tried} needs {gb(now.bytes(1))}: use smaller models, or more processes and "
        "--launch zero3_offload"
    ]


def smaller_evaluation(planner: Planner) -> list[str]:
    """Returns one sentence for a run that fits but for its evaluation."""
    images = planner.config.evaluation.batch_images // 2
    while images:
        needed = sum(planner.evaluation_of(images).values())
        worst = tightest(planner.limits(planner.images, at_least=needed))
        if worst.needed <= worst.limit:
            return [f"evaluation.batch_images={images} fits: {gb(needed)}"]
        images //= 2
    return ["no evaluation fits beside the model: " + planner.device.name]


def _fewer(planner: Planner) -> int | None:
    """Returns the number of processes for which the main memory suffices, guessed from what each
    needs now, else one; None where neither fits.
    """
    memory = planner.limits(planner.images, planner.without_gradients)["main memory"]
    guess = planner.processes * memory[1] // memory[0]
    tried = sorted({max(1, guess), 1} - {planner.processes}, reverse=True)
    return next((n for n in tried if planner.changed(processes=n).fits_whole(planner.images)), None)


def _changes(planner: Planner) -> list[tuple[str, Change]]:
    """Returns the words for each change that applies, and the change itself."""
    found: list[tuple[str, Change]] = []
    if planner.processes > 1 and planner.short_of(planner.images) == "main memory":
        found.append(("--processes 1", lambda now: now.changed(processes=1)))
    if not planner.config.train.activation_checkpointing:
        found.append(("train.activation_checkpointing=true", _checkpointing))
    if not planner.encoder:
        found.append(("features made beforehand by `harness shards features`", _features))
    if planner.config.model.lm.tuning in ("lora", "full"):
        found.append(("model.lm.tuning=qlora", _qlora))
    # The engine refuses DeepSpeed with fp16.
    if planner.device.is_gpu and planner.skeleton.precision.name != "fp16":
        names = ["zero2_offload", "zero3_offload"]
        if planner.launch.name in names:
            names = names[names.index(planner.launch.name) + 1 :]
        found += [(f"--launch {name}", partial(_launched, name)) for name in names]
    return found


def _launched(name: str, now: Planner) -> Planner:
    return now.changed(launch=read_launch(name))


def _checkpointing(now: Planner) -> Planner:
    train = now.config.train.model_copy(update={"activation_checkpointing": True})
    return now.changed(config=now.config.model_copy(update={"train": train}))


def _features(now: Planner) -> Planner:
    return now.changed(encoder=now.skeleton.encoder, same_model=False)


def _qlora(now: Planner) -> Planner:
    lm = now.config.model.lm.model_copy(update={"tuning": "qlora"})
    model = now.config.model.model_copy(update={"lm": lm})
    return now.changed(config=now.config.model_copy(update={"model": model}), same_model=False)
