"""What an evaluation leaves: scores.json and the predictions in the official formats, and a table
for people.

An Evaluation -> files and a report; reports -> one Markdown table, a column each.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.evaluate.predict import results
from harness.report.pictures import markdown_table
from shards.files import write_whole
from shards.manifest import Manifest

if TYPE_CHECKING:
    from harness.evaluate.results import Evaluation


def write_report(
    evaluation: Evaluation, out: Path, paths: Sequence[str], checkpoint: str, step: int | None
) -> tuple[dict[str, Any], list[Path]]:
    """The report, and the files it was written to with the predictions; `step` None: of a published
    model.
    """
    report = {
        "checkpoint": checkpoint,
        "step": step,
        "data": list(paths),
        "images": evaluation.images,
        "unreadable": evaluation.unreadable,
        "tasks": {task: result.to_dict() for task, result in evaluation.tasks.items()},
    }
    out.mkdir(parents=True, exist_ok=True)
    predictions = [p for result in evaluation.tasks.values() for p in result.predictions]
    files = [write_json(out / name, entries) for name, entries in results(predictions).items()]
    return report, [*files, write_json(out / "scores.json", report)]


def variant(limit: int | None, overrides: Sequence[str]) -> list[str]:
    """What an evaluation did otherwise than its config says."""
    return [f"first-{limit}"] * bool(limit) + list(overrides)


def names(manifests: Sequence[Manifest]) -> list[str]:
    return ["+".join(f"{manifest.dataset}_{manifest.split}" for manifest in manifests)]


def folder(parts: Sequence[str]) -> str:
    """One name for a folder, not longer than a file system takes."""
    name = "+".join(parts).replace("/", "_")
    return (
        name
        if len(name) < 120
        else f"{name[:100]}-{hashlib.blake2b(name.encode(), digest_size=4).hexdigest()}"
    )


def write_json(path: Path, document: Any) -> Path:
    write_whole(path, json.dumps(document, indent=1, ensure_ascii=False).encode())
    return path


def table(*reports: Mapping[str, Any]) -> str:
    """Reports for people, a column each: the scores beside their floors, then the verdicts with
    their reasons.
    """
    names, blocks = [Path(report["checkpoint"]).name for report in reports], []
    for task in dict.fromkeys(task for report in reports for task in report["tasks"]):
        columns = [report["tasks"].get(task, {}) for report in reports]
        shown = dict.fromkeys(
            k for known in columns for k, v in known.items() if isinstance(v, int | float)
        )
        cells = [
            [("" if known.get(key) is None else known[key]) for known in columns] for key in shown
        ]
        rows = [[key.replace("_", " "), *values] for key, values in zip(shown, cells, strict=True)]
        blocks.append(markdown_table(rows, [task, *names]))
        for name, known in zip(names, columns, strict=True):
            if known.get("verdict"):
                blocks.append(f"{task}, {name}: {known['verdict']}: {known['reason']}\n")
    return "\n".join(blocks)
