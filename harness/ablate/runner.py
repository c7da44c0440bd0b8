"""`harness ablate FILE`: named variants x seeds of one experiment, as the children of one run in
MLflow, and a report.

A YAML file of configs/ablations -> OUT/VARIANT/seed-N, each a run with its evaluation on data.test
-> OUT/report.html, report.md and report.json. A child whose evaluation is there is finished and is
not run again, any other goes on from its newest checkpoint; one that fails leaves its error in the
report and the rest run on.

Nothing is chosen here: whatever a variant was tuned on was the dev set, and data.test is scored
once per child. Imports no torch: it is the children that compute.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness.ablate.experiment import CONFIG, LOG, MODEL, SCORES, Ablation, Child, children_of, load
from harness.ablate.report import write
from harness.checks import check_before_launch
from harness.config.keys import flatten
from harness.config.load import dump
from harness.config.load import load as load_config
from harness.config.schema import Config
from harness.errors import ConfigError, explain
from harness.machine.devices import cores
from harness.machine.launcher import gpus
from harness.machine.lock import RunLock
from harness.machine.parent import as_parent
from harness.machine.signals import stop_requests
from harness.redact import clean, for_children, masked_document
from harness.redact import say as tell
from harness.tracking.tracker import open_tracker, recorded_run_id, store_uri

POLL_SECONDS = 0.2


class Process(Protocol):
    """A child that was started, as subprocess.Popen."""

    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...


Start = Callable[[Child, Mapping[str, str]], Process]


@dataclass(frozen=True)
class Running:
    """A child's process, the slot it takes among those that run at a time, and when it began."""

    process: Process
    slot: int
    began: float


def run(
    file: str | Path,
    overrides: Sequence[str] = (),
    *,
    offline: bool = False,
    seeds: Sequence[int] = (),
    out: Path | None = None,
    jobs: int = 1,
    start: Start | None = None,
    say: Callable[[str], None] = tell,
) -> dict[str, Any]:
    """Runs what is not finished, `jobs` children at a time, and returns what OUT/report.json holds.

    `overrides` come last, for every child. Raises ConfigError for a file or overrides that cannot
    be used and where no variant can be started. After SIGTERM or SIGINT every child saves, the
    report is written, and SystemExit is raised.
    """
    ablation = load(file, offline)
    out = out or Path("runs/ablations") / ablation.name
    lock = RunLock.take(out, "harness ablate", waits=True, say=say)
    try:
        return _run(ablation, overrides, seeds, out, jobs, start or launched, say)
    finally:
        lock.release()


def _run(
    ablation: Ablation,
    overrides: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    jobs: int,
    start: Start,
    say: Callable[[str], None],
) -> dict[str, Any]:
    seeds = list(dict.fromkeys(seeds or ablation.seeds))
    own = (f"out={out}", f"name={ablation.name}", f"seed={seeds[0]}")
    parent = load_config(ablation.base, [*ablation.overrides, *overrides, *own])
    children = children_of(ablation, out, overrides, seeds)
    errors = refused(children)
    todo = [child for child in children if not child.finished and child not in errors]
    finished = sum(child.finished for child in children)
    named = ", ".join(map(str, seeds))
    say(f"{len(ablation.variants)} variants x seeds {named} in {out}, {finished} finished already")
    tracker = open_tracker(parent, run_id=recorded_run_id(parent), resume_step=0)
    tracking = [f"tracking.parent_run_id={tracker.run_id or 'null'}"]
    if parent.tracking.kind == "mlflow":
        tracking.append(f"tracking.uri={json.dumps(store_uri(parent))}")
    status = "FAILED"
    try:
        with stop_requests() as stop_asked:
            errors |= run_all(todo, tracking, jobs, start, say, stop_asked)
            number = stop_asked()
        status = "KILLED" if number else "FINISHED"
        report = write(ablation, children, errors, out, parent)
        finished = sum(child.finished for child in children)
        say(f"\n{(out / 'report.md').read_text()}\n{out / 'report.html'}")
        tracker.metrics(report["metrics"] | {"children_finished": finished}, finished)
        for name in ("report.html", "report.md", "report.json"):
            tracker.artifact(out / name)
    finally:
        tracker.close(status)
    if number:
        raise SystemExit(128 + number)
    return report


def refused(children: Sequence[Child]) -> dict[Child, str]:
    """Returns what can be told before anything is started. Raises ConfigError where no child could
    be, or where a folder holds another experiment.
    """
    errors: dict[Child, str] = {}
    raised: list[Exception] = []
    for child in children:
        config = child.config()  # a wrong key of a variant is a wrong file
        check_same(child, config)
        if child.after is None and not child.finished:
            try:
                check_before_launch(config, ("train", "test"))
            except Exception as error:
                raised.append(error)
                errors[child] = explain(error) or clean(repr(error))
    if raised and len(raised) == sum(child.after is None for child in children):
        raise raised[0]
    return errors


def check_same(child: Child, config: Config) -> None:
    """Raises ConfigError where a child was begun with another config: figures of two experiments
    are not to be mixed.

    Where it was tracked, copied to, and what it started from may differ: folders may have moved.
    """
    if not (child.out / CONFIG).exists():
        return
    before = masked_document(flatten(load_config(child.out / CONFIG)))
    for key, now in masked_document(flatten(config)).items():
        free = key in ("out", "model.init_from", "train.copy_to") or key.startswith("tracking.")
        if not free and before.get(key) != now:
            raise ConfigError(
                f"{child.out} was begun with {key}={before.get(key)}, now it is {now}: "
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
    queue = list(waiting)
    slots = list(range(jobs))
    running: dict[Child, Running] = {}
    errors: dict[Child, str] = {}
    stopping = False
    while queue or running:
        if stop_asked() and not stopping:
            stopping = True
            queue.clear()
            for one in running.values():
                one.process.send_signal(stop_asked())
        for child in [c for c, one in running.items() if one.process.poll() is not None]:
            ended = running.pop(child)
            slots.append(ended.slot)
            if not child.finished and not stopping:
                errors[child] = last_words(child.out / LOG)
            result = summary(child) if child.finished else errors.get(child, "stopped")
            seconds = time.monotonic() - ended.began
            say(f"{child.variant}, seed {child.seed}: {result} ({seconds:.0f} s)")
        busy = {child.out for child in (*queue, *running)}
        ready = next((child for child in queue if child.after not in busy), None)
        if ready is None or not slots:
            time.sleep(POLL_SECONDS if running else 0)
            continue
        queue.remove(ready)
        try:
            write_config(ready, tracking)
        except ConfigError as error:
            errors[ready] = clean(str(error))
            continue
        slot = slots.pop(0)
        process = start(ready, environment(jobs, slot))
        running[ready] = Running(process, slot, time.monotonic())
    return errors


def write_config(child: Child, tracking: Sequence[str]) -> None:
    """Puts the config into the child's folder. Raises ConfigError where the run whose model it
    starts from is not finished.
    """
    overrides = [*child.overrides, *tracking, f"tracking.run_name={child.variant}-{child.seed}"]
    if child.after:
        if not (child.after / SCORES).is_file():
            raise ConfigError(
                f"not run: {child.after}, whose model it starts from, is not finished"
            )
        overrides = [override.replace(MODEL, str(child.after)) for override in overrides]
    config = load_config(child.base, overrides)
    if target := config.train.copy_to:  # a place for each: they would write over each other
        own = f"train.copy_to={target.rstrip('/')}/{child.variant}/seed-{child.seed}"
        config = load_config(child.base, [*overrides, own])
    child.out.mkdir(parents=True, exist_ok=True)
    (child.out / CONFIG).write_text(dump(config), encoding="utf-8")


def environment(jobs: int, slot: int) -> dict[str, str]:
    """Returns the environment of a child among `jobs` at a time: its share of the cores, one GPU
    where there are several children, and the secrets that its config holds masked.
    """
    changed = dict(os.environ) | for_children()
    if jobs > 1:
        changed.setdefault("OMP_NUM_THREADS", str(max(1, cores() // jobs)))
        if count := gpus():
            changed.setdefault("CUDA_VISIBLE_DEVICES", str(slot % count))
    return changed


def launched(child: Child, environment: Mapping[str, str]) -> Process:
    """Starts a child as a process of its own, whose output is OUT/VARIANT/seed-N/log.txt."""
    line = [sys.executable, "-m", "harness.ablate.child", str(child.out)]
    # Only of this attempt: its last words are to be its own.
    with (child.out / LOG).open("wb") as log:
        # A session of its own: a Ctrl-C reaches it once, through `run_all`.
        return subprocess.Popen(
            line, env={**environment, **as_parent()}, stdout=log, stderr=log, start_new_session=True
        )


def last_words(log: Path) -> str:
    """Says why a child failed: the sentence after the last traceback, else its last line."""
    text = log.read_text(errors="replace").strip() or "no output"
    end = re.split(r"^Traceback", text, flags=re.MULTILINE)[-1]
    sentences = re.findall(r"^harness: (.*)", end, re.MULTILINE)
    return clean((sentences or text.splitlines())[-1].strip())[:500]


def summary(child: Child) -> str:
    """Returns scores and verdict of a finished child in one line."""
    parts = []
    for task, known in json.loads((child.out / SCORES).read_text())["tasks"].items():
        figures = [
            f"{key} {known[key]:.4g}"
            for key in ("accuracy", "CIDEr", "loss_nats")
            if isinstance(known.get(key), float)
        ]
        parts.append(f"{task}: {', '.join([*figures, known.get('verdict') or 'no verdict'])}")
    return "; ".join(parts)
