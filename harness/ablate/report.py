"""The report of an ablation: expectation against observation, loss curves, verdicts, and the same
images side by side.

Finished children -> OUT/report.json, report.md and one self-contained report.html of less than 2
MB.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness.ablate.experiment import Ablation, Child
from harness.ablate.observe import DIGITS, Observed, mean_curves, observe, row_of
from harness.config.schema import Config, EvaluationConfig
from harness.data.images import cache_of
from harness.evaluate.measures import is_right
from harness.machine.devices import cores
from harness.machine.launcher import gpus
from harness.report.pages import write_page
from harness.report.pictures import Shown, loss_curves, markdown_table
from shards.cache import Cache
from shards.files import ShardError, write_whole
from shards.manifest import Manifest
from shards.origin import source_of
from shards.read import Reader
from shards.record import Text

PICTURES = 12  # rows of a grid; the page stays under 2 MB
TRUTHS = 3  # the most frequent ones
HEADERS = (
    *("variant", "expected", "observed", "score", "interval", "seeds"),
    *("test loss, nats", "lost with exchanged images", "verdict of the gate"),
)


def write(
    ablation: Ablation,
    children: Sequence[Child],
    errors: Mapping[Child, str],
    out: Path,
    config: Config,
) -> dict[str, Any]:
    """Writes the three files and returns what report.json holds; with no child finished, a report
    of errors.

    `config`: of the experiment as a whole; its `evaluation` and the cache of its `data` are used.
    """
    cache = cache_of(config)
    observed = observe([child for child in children if child.finished], cache)
    report = facts(ablation, children, errors, observed, config.evaluation)
    write_whole(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    write_whole(out / "report.md", markdown(report).encode())
    sets = [*ablation.pictures, *(path for one in observed for path in one.paths)]
    write_page(
        out / "report.html",
        "ablation.html",
        title=report["name"],
        question=report["question"],
        how=how(report),
        headers=HEADERS,
        tables=tables(report),
        trouble=trouble(report),
        curves=loss_curves(mean_curves(children), out / "loss.png").read_bytes(),
        grids=grids(observed, Pictures(sets, cache)),
    )
    return report


def facts(
    ablation: Ablation,
    children: Sequence[Child],
    errors: Mapping[Child, str],
    observed: Sequence[Observed],
    settings: EvaluationConfig,
) -> dict[str, Any]:
    """Returns what report.json holds."""
    rows = [row_of(one, ablation.variants[one.variant], observed, settings) for one in observed]
    left = [child for child in children if not child.finished and child not in errors]
    return {
        "name": ablation.name,
        "question": ablation.question,
        "seeds": sorted({child.seed for child in children}),
        "machine": machine(),
        "confidence": settings.confidence,
        "rows": rows,
        "failed": [
            {"variant": child.variant, "seed": child.seed, "error": error}
            for child, error in errors.items()
        ],
        "unfinished": [f"{child.variant}, seed {child.seed}" for child in left],
        "metrics": {
            f"{row['variant']}/{row['task']}/{name}": row[name]
            for row in rows
            for name in ("score", "score_low", "score_high", "loss_nats")
            if row[name] is not None
        },
    }


def machine() -> str:
    count = gpus()
    plural = "s" if count > 1 else ""
    return f"{cores()} CPU cores, " + (f"{count} GPU{plural}" if count else "no GPU")


# ---- how it looks --------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    parts = [f"## {report['name']}\n\n{report['question']}\n", how(report) + "\n"]
    for measure, rows in tables(report).items():
        parts.append(f"{measure}\n\n" + markdown_table(rows, HEADERS))
    parts += [f"- {line}" for line in trouble(report)]
    return "\n".join(parts) + "\n"


def how(report: Mapping[str, Any]) -> str:
    """Says how the scores came about."""
    seeds = ", ".join(map(str, report["seeds"]))
    return (
        f"Seeds {seeds}; {report['machine']}. Scores are means over seeds on the test images, "
        f"each child scored once; intervals of {report['confidence']:.0%} for other seeds and "
        "other images (Student's t and bootstrap, paired)."
    )


def tables(report: Mapping[str, Any]) -> dict[str, list[list[Any]]]:
    """Returns the cells under HEADERS, by measure."""
    found: dict[str, list[list[Any]]] = {}
    for row in report["rows"]:
        measure = f"{row['task']}: {row['measure']}, {row['images']} images"
        found.setdefault(measure, []).append(cells(row))
    return found


def cells(row: Mapping[str, Any]) -> list[Any]:
    digits = DIGITS[row["task"]]
    figures = {
        name: "" if row[name] is None else f"{row[name]:.{digits}f}"
        for name in ("score", "score_low", "score_high", "lost")
    }
    return [
        row["variant"],
        row["expected"],
        row["observed"],
        figures["score"],
        f"[{figures['score_low']}, {figures['score_high']}]",
        len(row["per_seed"]),
        f"{row['loss_nats']:.3f}",
        figures["lost"],
        ", ".join(f"{name} ({count})" for name, count in row["verdicts"].items()),
    ]


def trouble(report: Mapping[str, Any]) -> list[str]:
    """Returns a line for every child that has no result, and for every task of which texts had to
    be left out.
    """
    left_out = {(row["task"], row["left_out"]) for row in report["rows"] if row["left_out"]}
    return [
        *(
            f"{child['variant']}, seed {child['seed']}, failed: {child['error']}"
            for child in report["failed"]
        ),
        *(f"{name}: not finished" for name in report["unfinished"]),
        *(
            f"{task}: {count} texts left out, their images could not be read"
            for task, count in sorted(left_out)
        ),
    ]


def grids(
    observed: Sequence[Observed], pictures: Pictures
) -> list[tuple[str, list[str], list[list[Shown]]]]:
    """Returns for each task and test set the task, the names of its variants and the rows: one for
    each of PICTURES test images, evenly spaced and not chosen, with the answer of each variant.
    """
    groups: dict[tuple[Any, str], list[Observed]] = defaultdict(list)
    for one in observed:
        groups[one.paths, one.task].append(one)
    found = []
    for (_, task), group in groups.items():
        asked = group[0].asked
        texts_of: dict[str, list[str]] = defaultdict(list)
        for name, (image, _) in asked.items():
            texts_of[image].append(name)
        images = sorted(texts_of)
        count = min(PICTURES, len(images))
        rows = []
        for number in range(count):
            image = images[number * len(images) // count]
            name = texts_of[image][number % len(texts_of[image])]
            answers = [one.said.get(name, "(unreadable)") for one in group]
            picture = pictures.read(image)
            rows.append([shown(picture, asked[name][1], answer) for answer in answers])
        found.append((task, [one.variant for one in group], rows))
    return found


def shown(image: bytes | None, text: Text, answer: str) -> Shown:
    right = is_right(text.task, answer.strip(), text.targets)
    truths = tuple(truth for truth, _ in Counter(text.targets).most_common(TRUTHS))
    return Shown(image, text.prompt or "", truths, answer, right)


class Pictures:
    """The images of those sets that are there, of features those that they were made from, by
    DATASET_SPLIT/KEY.
    """

    def __init__(self, paths: Sequence[str], cache: Cache | None) -> None:
        self._places: dict[str, tuple[Reader, int]] = {}
        for path in dict.fromkeys(paths):
            with suppress(ShardError, OSError):  # moved or never made
                source = source_of(Manifest.open(path, cache))
                if source is not None:
                    reader = Reader(source)
                    for n in range(source.samples):
                        name = f"{source.dataset}_{source.split}/{source.key(n)}"
                        self._places[name] = (reader, n)

    def read(self, image: str) -> bytes | None:
        """Returns an encoded picture, or None, a grey square on the page, where no set has it."""
        with suppress(KeyError, ShardError):
            reader, number = self._places[image]
            return reader.read(number).payload
        return None
