"""What an evaluation leaves: scores and predictions as files, pictures, curves, a table for people.

An Evaluation -> files and a report; reports -> one Markdown table, a column each.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import ConfigError
from harness.evaluate import vqa
from harness.evaluate.beside_table import beside_tables
from harness.evaluate.measures import TASKS, is_right
from harness.evaluate.predict import results, set_name
from harness.evaluate.told import further_tables, recall_rows, term_rows, verdict_lines
from harness.redact import masked_document
from harness.report.pictures import Shown, loss_curves, markdown_table, predictions_picture
from harness.tracking.journal import every_row
from shards.cache import Cache
from shards.files import decode, write_whole
from shards.manifest import Manifest
from shards.origin import pictures_of
from shards.read import Reader

if TYPE_CHECKING:
    from harness.evaluate.results import Evaluation

SCORES = "scores.json"
SUMMARY = "report.md"
PREDICTIONS = "predictions.jsonl"
PICTURES = 12  # test images with their answers
CURVES = {"train/loss": "training images", "dev/loss": "dev images"}
# Figures of a task -> what they are beside the score, in the order of the table.
FLOORS = {
    "accuracy": "right answers, all test questions",
    "text_only_accuracy": "the same language model without images (floor)",
    "majority_accuracy": "most common answer to each question (floor)",
    "shuffled_accuracy": "images shuffled among the questions",
    "blank_accuracy": "a blank image",
    "no_image_accuracy": "image tokens left out",
    "CIDEr": "CIDEr, all test images",
    "shuffled_CIDEr": "CIDEr x 100, images shuffled among the texts",
    "blank_CIDEr": "CIDEr x 100, a blank image",
    "no_image_CIDEr": "CIDEr x 100, image tokens left out",
}


def write_report(
    evaluation: Evaluation,
    out: Path,
    paths: Sequence[str],
    checkpoint: str,
    step: int | None,
    **further: Any,
) -> tuple[dict[str, Any], list[Path]]:
    """Returns the report with what is `further` known, and the files that hold it and the
    predictions.

    predictions.jsonl has a line for each text, whatever its task: its set, key and id, what was
    said, the most common answer to a question, the score (of a VQA answer in [0, 1], of a caption
    its CIDEr-D) and the loss of the truth in nats a token; "has_picture": false where it has none.
    """
    report = report_of(evaluation, paths, checkpoint, step) | further
    out.mkdir(parents=True, exist_ok=True)
    predictions = [p for result in evaluation.tasks.values() for p in result.predictions]
    files = [write_json(out / name, entries) for name, entries in results(predictions).items()]
    lines = [json.dumps(row, ensure_ascii=False) for row in prediction_rows(evaluation)]
    write_whole(out / PREDICTIONS, "".join(f"{line}\n" for line in lines).encode())
    files.append(out / PREDICTIONS)
    return report, [*files, write_json(out / SCORES, report)]


def prediction_rows(evaluation: Evaluation) -> Iterator[dict[str, Any]]:
    """Yields what predictions.jsonl says of each text."""
    for task, result in evaluation.tasks.items():
        said = result.predictions
        known = TASKS[task]
        scores = known.scores([p.answer for p in said], [p.references for p in said])
        for prediction, score in zip(said, scores, strict=True):
            truth = vqa.most_common(prediction.references) if known.has_right else None
            yield {
                "set": prediction.set,
                "key": prediction.key,
                "text_id": prediction.text_id,
                "task": task,
                "answer": prediction.answer,
                "truth": truth,
                "score": round(float(score), 4),
                "loss": round(prediction.loss, 5) if math.isfinite(prediction.loss) else None,
                **({} if prediction.has_picture else {"has_picture": False}),
            }


def report_of(
    evaluation: Evaluation, paths: Sequence[str], checkpoint: str, step: int | None
) -> dict[str, Any]:
    """Returns what scores.json holds. `step`: None for a model that was not trained here."""
    return {
        "checkpoint": checkpoint,
        "step": step,
        "data": masked_document(list(paths)),
        "images": evaluation.images,
        **({"without_picture": evaluation.without_picture} if evaluation.without_picture else {}),
        "unreadable": evaluation.unreadable,
        **({"pixels": evaluation.pixels} if evaluation.pixels else {}),
        "tasks": evaluation.by_task(),
    }


def read_scores(path: Path) -> dict[str, Any]:
    """Returns the report that an evaluation left. Raises ConfigError where it is none."""
    try:
        report = json.loads(decode(path.read_bytes(), str(path)))
        figures = dict(report.get("tasks", {})).values()
        is_one = all(isinstance(place, str) for place in report["data"])
        is_one = is_one and all(isinstance(figure, dict) for figure in figures)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is not what `harness evaluate` leaves: {error!r}") from error
    if not is_one:
        raise ConfigError(f"{path} is not what `harness evaluate` leaves: move it away")
    return report


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """Returns the lines of predictions.jsonl that an evaluation left. Raises ConfigError."""
    file = folder / PREDICTIONS
    if not file.is_file():
        raise ConfigError(f"{file} is missing: harness evaluate writes it")
    try:
        return [json.loads(line) for line in decode(file.read_bytes(), str(file)).splitlines()]
    except ValueError as error:
        raise ConfigError(f"{file} is damaged, evaluate again: {error}") from error


def draw_curves(home: Path, out: Path) -> list[Path]:
    """Draws the losses on training and dev images by step into OUT/loss.png; [] without any."""
    rows = list(every_row(home))
    series = {
        label: [(row["step"], float(row["values"][key])) for row in rows if key in row["values"]]
        for key, label in CURVES.items()
    }
    drawn = {label: points for label, points in series.items() if points}
    return [loss_curves(drawn, out / "loss.png")] if drawn else []


def draw_answers(
    evaluation: Evaluation, place: str, out: Path, cache: Cache | None = None
) -> list[Path]:
    """Draws images of the set `place` with what was asked, expected and said of them.

    They are evenly spaced over the set, not chosen. Of features those are drawn that they were made
    from; [] where these are gone.
    """
    manifest = Manifest.open(place, cache)
    said = {
        (prediction.key, prediction.text_id): prediction.answer
        for result in evaluation.tasks.values()
        for prediction in result.predictions
    }
    reader = Reader(manifest, cache)
    count = min(PICTURES, manifest.samples)
    indices = [number * manifest.samples // count for number in range(count)]
    items = []
    for number, picture in enumerate(pictures_of(manifest, indices, cache)):
        if picture is None:  # the evaluation has counted and named it, or all are gone
            continue
        record = reader.read(indices[number]).known
        text = record.texts[number % len(record.texts)]
        answer = said.get((record.key, text.id))
        if answer is not None:
            right = is_right(text.task, answer, text.targets)
            items.append(Shown(picture, text.prompt or "", text.targets, answer, right))
    return [predictions_picture(items, out / "predictions.png")] if items else []


def floors(figures: Mapping[str, Any]) -> list[list[str]]:
    """Returns a task's score beside its floors, and the verdict, as rows of a table."""
    rows = [
        [label, f"{figures[key]:.2f}{'%' if 'accuracy' in key else ''}"]
        for key, label in FLOORS.items()
        if figures.get(key) is not None
    ]
    gap = figures.get("loss_gap_nats")
    if gap is not None:
        bounds = [figures.get(f"loss_gap_nats_{end}") for end in ("low", "high")]
        words = ", ".join("unknown" if bound is None else f"{bound:.3f}" for bound in bounds)
        rows.append(["loss with shuffled images - true loss", f"{gap:.3f} nats [{words}]"])
    for name in ("Bleu_4", "CIDEr"):
        if name in figures.get("stripped", {}):
            label = f"{name}, texts stripped (not the official way)"
            rows.append([label, f"{figures['stripped'][name]:.2f}"])
    rows += term_rows(figures)
    changed = figures.get("answers_changed_where_truth_differs")
    if changed is not None:
        rows.append(["answers that change where the truth does", f"{changed:.1f}%"])
    rows += recall_rows(figures)
    if "empty_rate" in figures:
        rows.append(["empty answers", f"{figures['empty_rate']:.1%}"])
    if figures.get("without_picture"):
        rows.append(["texts without a picture, not judged", f"{figures['without_picture']:,}"])
    if figures.get("verdict"):
        rows.append(["verdict", figures["verdict"]])
    return rows


def model_rows(facts: Mapping[str, int]) -> list[list[str]]:
    """Returns the sizes of the model as rows of the same table."""
    parameters = f"{facts['trainable_parameters']:,} / {facts['total_parameters']:,}"
    label = "trained / all parameters"
    if not facts["with_encoder"]:
        label += ", the encoder's aside"
    return [
        [label, parameters],
        ["layers in 4 bits", str(facts["quantized_modules"])],
    ]


def fact_rows(report: Mapping[str, Any]) -> list[list[str]]:
    """Returns how the pixels were made, which older reports do not know, and `model_rows`."""
    pixels = [["pixels", report["pixels"]]] if "pixels" in report else []
    return pixels + model_rows(report["model"])


def page(report: Mapping[str, Any], pictures: Sequence[Path]) -> str:
    """Returns report.md: every task's score beside its floors, the reason, the pictures."""
    lines = [f"# {Path(report['checkpoint']).parents[1].name}", ""]
    for task, figures in report["tasks"].items():
        rows = floors(figures) + fact_rows(report)
        lines.append(markdown_table(rows, [task, "value"]))
        if figures.get("reason"):
            lines.append(f"{figures['reason']}.\n")
        if figures.get("advice"):
            lines.append(f"What would change it: {figures['advice']}.\n")
        lines += further_tables(task, figures)
        lines += beside_tables(task, figures)
    lines += [f"![{picture.stem}]({picture.name})" for picture in pictures]
    return "\n".join(lines) + "\n"


def variant(limit: int | None, overrides: Sequence[str]) -> list[str]:
    """Returns what an evaluation did otherwise than its config says."""
    return ([f"first-{limit}"] if limit else []) + masked_document(list(overrides))


def names(manifests: Sequence[Manifest]) -> list[str]:
    """Returns the sets' names as one."""
    return ["+".join(map(set_name, manifests))]


def folder(parts: Sequence[str]) -> str:
    """Returns one name for a folder, not longer than a file system takes."""
    name = "+".join(parts).replace("/", "_")
    if len(name) < 120:
        return name
    return f"{name[:100]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"


def write_json(path: Path, document: Any) -> Path:
    """Writes a JSON file whole, and returns its path."""
    write_whole(path, json.dumps(document, indent=1, ensure_ascii=False).encode())
    return path


def table(*reports: Mapping[str, Any]) -> str:
    """Returns all figures of reports, a column each, then the verdicts with their reasons."""
    columns_by = [Path(report["checkpoint"]).name for report in reports]
    blocks = []
    for task in dict.fromkeys(task for report in reports for task in report["tasks"]):
        columns = [report["tasks"].get(task, {}) for report in reports]
        keys = dict.fromkeys(
            key
            for figures in columns
            for key, value in figures.items()
            if isinstance(value, int | float)
        )
        rows = [
            [key.replace("_", " "), *("" if f.get(key) is None else f[key] for f in columns)]
            for key in keys
        ]
        blocks.append(markdown_table(rows, [task, *columns_by]))
        for name, figures in zip(columns_by, columns, strict=True):
            if figures.get("verdict"):
                blocks.append("\n".join(verdict_lines(f"{task}, {name}", figures)) + "\n")
    return "\n".join(blocks)
