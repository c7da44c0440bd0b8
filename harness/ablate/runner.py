"""`harness ablate FILE`: named variants x seeds of one experiment, as the children of one run in
MLflow, and a report.

A YAML file of configs/ablations -> OUT/VARIANT/seed-N, each a run with its evaluation on data.test
-> OUT/report.html, report.md and report.json. A child whose evaluation is there is finished and is
not run again, any other goes on from its newest checkpoint; one that fails leaves its error in the
report and the rest run on.

Nothing is chosen here: whatever a variant was tuned on was the dev set, and data.test is scored
once per child.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from harness.ablate.experiment import CONFIG, LOG, MODEL, SCORES, Child, children_of, load
from harness.config.keys import flatten
from harness.config.load import dump
from harness.config.load import load as load_config
from harness.config.schema import Config
from harness.errors import ConfigError


class Process(Protocol):
    """A child that was started, as subprocess.Popen."""

    def poll(self) -> int | None: ...
    def send_signal(self, number: int) -> None: ...


Start = Callable[[Child, Mapping[str, str]], Process]


def run(
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    offline: bool = False,
    seeds: Sequence[int] = (),
    out: Path | None = None,
    jobs: int = 1,
    start: Start | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Runs what is not finished, `jobs` children at a time, and returns what OUT/report.json holds.

    `overrides` come last, for every child. Raises ConfigError for a file or overrides that cannot
    be used and where no variant can be started. After SIGTERM or SIGINT every child saves, the
    report is written, and SystemExit is raised.
    """
    from harness.ablate.report import write
    from harness.machine.signals import stop_requests
    from harness.tracking.tracker import open_tracker, recorded_run_id, store_uri

    ablation = load(file).in_form(offline)
    out = out or Path("runs/ablations") / ablation.name
    seeds = list(dict.fromkeys(seeds or ablation.seeds))
    own = [f"out={out}", f"name={ablation.name}", f"seed={seeds[0]}"]
    parent = load_config(ablation.base, [*ablation.overrides, *overrides, *own])
    children = children_of(ablation, out, overrides, seeds)
    errors = refused(children)
    finished = sum(child.finished for child in children)
    say(
        f"{len(ablation.variants)} variants x seeds {', '.join(map(str, seeds))} in {out}, {finished} finished already"
    )
    tracker = open_tracker(parent, run_id=recorded_run_id(parent), resume_step=0)
    tracking = [
        f"tracking.parent_run_id={tracker.run_id or 'null'}",
        f"tracking.uri={store_uri(parent)}",
    ]
    status, number = "FAILED", 0
    try:
        with stop_requests() as stop_asked:
            todo = [child for child in children if not child.finished and child not in errors]
            errors |= run_all(todo, tracking, jobs, start or Launched, say, stop_asked)
            number = stop_asked()
        status = "KILLED" if number else "FINISHED"
        told = {(child.variant, child.seed): error for child, error in errors.items()}
        report = write(ablation, children, told, out, parent)
        done = sum(child.finished for child in children)
        say(f"\n{(out / 'report.md').read_text()}\n{out / 'report.html'}")
        tracker.metrics(report["metrics"] | {"children_finished": done}, done)
        for name in ("report.html", "report.md", "report.json"):
            tracker.artifact(out / name)
    finally:
        tracker.close(status)
    if number:
        raise SystemExit(128 + number)
    return report


def refused(children: Sequence[Child]) -> dict[Child, str]:
    """What can be told before anything is started. Raises ConfigError where it is everything, or a
    mixture of runs.
    """
    from harness.checks import check_before_launch
    from harness.errors import explain

    errors: dict[Child, str] = {}
    first: Exception | None = None
    for child in children:
        config = child.config()  # a wrong key of a variant is a wrong file
        check_same(child, config)
        if child.after is None and not child.finished:
            try:
                check_before_launch(config, ("train", "test"))
            except Exception as error:
                first, errors[child] = first or error, explain(error) or repr(error)
    if first and len(errors) + sum(child.after is not None for child in children) == len(children):
        raise first
    return errors


def check_same(child: Child, config: Config) -> None:
    """Raises ConfigError where a child was begun with another config: figures of two experiments
    are not to be mixed.

    Where it was tracked and what it started from may differ: folders may have moved.
    """
    if not (child.out / CONFIG).exists():
        return
    before, now = (flatten(c) for c in (load_config(child.out / CONFIG), config))
    for key in now:
        free = key in ("out", "model.init_from") or key.startswith("tracking.")
        if not free and before.get(key) != now[key]:
            raise ConfigError(
                f"{child.out} was begun with {key}={before.get(key)}, now it is {now[key]}: "
                "choose another folder with --out, or remove this one"
            )


def run_all(
    waiting: Sequence[Child],
    tracking: Sequence[str],
    jobs: int,
    start: Start,
    say: Callable[[str], None],
    stop_asked: Callable[[], int],
) -> dict[Child, str]:
    """Starts each child as soon as there is room and what it starts from is finished; returns the
    errors.
    """
    queue, slots = deque(waiting), deque(range(jobs))
    running: dict[Child, tuple[Process, int, float]] = {}
    errors: dict[Child, str] = {}
    stopping = False
    while queue or running:
        if stop_asked() and not stopping:
            stopping = True
            queue.clear()
            for process, _, _ in running.values():
                process.send_signal(stop_asked())
        for child, (process, slot, began) in list(running.items()):
            if process.poll() is not None:
                del running[child]
                slots.append(slot)
                if not child.finished and not stopping:
                    errors[child] = last_words(child.out / LOG)
                result = errors.get(child, "stopped" if not child.finished else summary(child))
                say(
                    f"{child.variant}, seed {child.seed}: {result} ({time.monotonic() - began:.0f} s)"
                )
        busy = {child.out for child in (*queue, *running)}
        ready = next((child for child in queue if child.after not in busy), None)
        if ready is None or not slots:
            time.sleep(0.2 if running else 0)
            continue
        queue.remove(ready)
        try:
            overrides = with_model(ready)
            config = load_config(
                ready.base,
                [*overrides, *tracking, f"tracking.run_name={ready.variant}-{ready.seed}"],
            )
        except ConfigError as error:
            errors[ready] = str(error)
            continue
        ready.out.mkdir(parents=True, exist_ok=True)
        (ready.out / CONFIG).write_text(dump(config), encoding="utf-8")
        slot = slots.popleft()
        running[ready] = (start(ready, environment(jobs, slot)), slot, time.monotonic())
    return errors


def with_model(child: Child) -> list[str]:
    """Its overrides with the folder of the model that it starts from. Raises ConfigError where that
    was not made.
    """
    if child.after is None:
        return list(child.overrides)
    from harness import checkpoint

    found = checkpoint.newest(child.after) if (child.after / SCORES).is_file() else None
    if found is None:
        raise ConfigError(f"not run: {child.after}, whose model it starts from, is not finished")
    return [override.replace(MODEL, str(found.model)) for override in child.overrides]


def environment(jobs: int, slot: int) -> dict[str, str]:
    """Of a child among `jobs` at a time: its share of the cores, and one GPU where there are
    several children.
    """
    from harness.machine.launcher import gpus

    changed = dict(os.environ)
    if jobs > 1:
        changed.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // jobs)))
        if (found := gpus()) and "CUDA_VISIBLE_DEVICES" not in changed:
            changed["CUDA_VISIBLE_DEVICES"] = str(slot % found)
    return changed


class Launched(subprocess.Popen):
    """A child as a process of its own (`main` below), which writes into OUT/VARIANT/seed-N/log.txt."""

    def __init__(self, child: Child, environment: Mapping[str, str]) -> None:
        with (child.out / LOG).open(
            "wb"
        ) as log:  # of this attempt: its last words are to be its own
            line = [sys.executable, "-m", "harness.ablate.runner", str(child.out)]
            # A session of its own: a Ctrl-C reaches it once, through `run_all`.
            super().__init__(line, env=environment, stdout=log, stderr=log, start_new_session=True)


def last_words(log: Path) -> str:
    """Why a child failed: the sentence for users after the last traceback, else its last line."""
    lines = [
        line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()
    ] or ["no output"]
    begun = max((n for n, line in enumerate(lines) if line.startswith("Traceback")), default=0)
    told = [
        line.removeprefix("harness: ") for line in lines[begun:] if line.startswith("harness: ")
    ]
    return (told or lines)[-1][:500]


def summary(child: Child) -> str:
    """Scores and verdict of a finished child in one line."""
    parts = []
    for task, known in json.loads((child.out / SCORES).read_text())["tasks"].items():
        keys = [
            key for key in ("accuracy", "CIDEr", "loss_nats") if isinstance(known.get(key), float)
        ]
        figures = [f"{key} {known[key]:.4g}" for key in keys]
        parts.append(f"{task}: {', '.join([*figures, known.get('verdict') or 'no verdict'])}")
    return "; ".join(parts)


def train_and_score(out: Path) -> None:
    """A child's whole life in this process: trains through the launcher, then scores data.test."""
    from harness.evaluate.run_on_disk import evaluate_run
    from harness.machine.launcher import launch

    if code := launch([str(out / CONFIG), "--resume", "auto"]):
        sys.exit(code)
    evaluate_run(out)


def main() -> None:
    from harness.errors import explain

    try:
        train_and_score(Path(sys.argv[1]))
    except Exception as error:
        if (sentence := explain(error)) is None:
            raise
        sys.exit(f"harness: {sentence}")


if __name__ == "__main__":
    main()
