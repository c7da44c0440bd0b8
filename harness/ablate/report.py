"""The report of an ablation: expectation against observation, loss curves, verdicts, and the same
images side by side.

Finished children -> OUT/report.json, report.md and one self-contained report.html of less than 2
MB.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.ablate.observe import DIGITS, Observed, mean_curves, observe, row_of
from harness.config.schema import Config
from harness.evaluate import vqa
from harness.report.pictures import loss_curves, markdown_table, thumbnail
from shards.cache import Cache
from shards.files import ShardError, write_whole
from shards.manifest import Manifest
from shards.read import Reader

if TYPE_CHECKING:
    from harness.ablate.experiment import Ablation, Child

PICTURES, SIDE, QUALITY = (
    12,
    112,
    70,
)  # rows of a grid; longer edge in pixels and JPEG quality, for a page under 2 MB
HEADERS = (
    *("variant", "expected", "observed", "score", "interval", "seeds"),
    *("test loss, nats", "lost with exchanged images", "verdict of the gate"),
)


def write(
    ablation: Ablation,
    children: Sequence[Child],
    errors: Mapping[tuple[str, int], str],
    out: Path,
    config: Config,
) -> dict[str, Any]:
    """Writes the three files and returns what report.json holds; with no child finished, a report
    of errors.

    `config`: of the experiment as a whole; its `evaluation` and the cache of its `data` are used.
    """
    settings, cache = config.evaluation, Cache.at(config.data.cache_dir, config.data.cache_gb * 1e9)
    observed = observe([child for child in children if child.finished], cache)
    rows = [row_of(one, ablation.variants[one.variant], observed, settings) for one in observed]
    failed = [
        {"variant": name, "seed": seed, "error": error} for (name, seed), error in errors.items()
    ]
    left = [
        child
        for child in children
        if not child.finished and (child.variant, child.seed) not in errors
    ]
    report = {
        "name": ablation.name,
        "question": ablation.question,
        "seeds": sorted({child.seed for child in children}),
        "machine": machine(),
        "confidence": settings.confidence,
        "rows": rows,
        "failed": failed,
        "unfinished": [f"{child.variant}, seed {child.seed}" for child in left],
        "metrics": {
            f"{row['variant']}/{row['task']}/{name}": row[name]
            for row in rows
            for name in ("score", "score_low", "score_high", "loss_nats")
            if row[name] is not None
        },
    }
    write_whole(out / "report.json", json.dumps(report, indent=1, ensure_ascii=False).encode())
    write_whole(out / "report.md", markdown(report).encode())
    curves = loss_curves(mean_curves(children), out / "loss.png")
    sets = [*ablation.pictures, *(path for one in observed for path in one.test.paths)]
    write_whole(
        out / "report.html", page(report, observed, curves, image_sets(sets, cache)).encode()
    )
    return report


def machine() -> str:
    from harness.machine.launcher import gpus

    cores = len(os.sched_getaffinity(0))
    return f"{cores} CPU cores, " + (
        f"{count} GPU" + "s" * (count > 1) if (count := gpus()) else "no GPU"
    )


# ---- how it looks --------------------------------------------------------------------------------


def markdown(report: Mapping[str, Any]) -> str:
    parts = [f"## {report['name']}\n\n{report['question']}\n", how(report) + "\n"]
    for measure, rows in by_measure(report).items():
        parts.append(f"{measure}\n\n" + markdown_table([cells(row) for row in rows], HEADERS))
    parts += [f"- {line}" for line in trouble(report)]
    return "\n".join(parts) + "\n"


def how(report: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, report["seeds"]))
    return (
        f"Seeds {seeds}; {report['machine']}. Scores are means over seeds on the test images, each child scored once; "
        f"intervals of {report['confidence']:.0%} for other seeds and other images (Student's t and bootstrap, paired)."
    )


def by_measure(report: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in report["rows"]:
        found.setdefault(f"{row['task']}: {row['measure']}, {row['images']} images", []).append(row)
    return found


def cells(row: Mapping[str, Any]) -> list[Any]:
    verdicts = ", ".join(f"{name} ({count})" for name, count in row["verdicts"].items())
    digits, loss = DIGITS[row["task"]], f"{row['loss_nats']:.3f}"
    score, low, high, lost = (
        "" if row[name] is None else f"{row[name]:.{digits}f}"
        for name in ("score", "score_low", "score_high", "lost")
    )
    bounds = f"[{low}, {high}]"
    return [
        row["variant"],
        row["expected"],
        row["observed"],
        score,
        bounds,
        len(row["per_seed"]),
        loss,
        lost,
        verdicts,
    ]


def trouble(report: Mapping[str, Any]) -> list[str]:
    """A line for every child that has no result, and for every task of which texts had to be left
    out.
    """
    failed = [
        f"{child['variant']}, seed {child['seed']}, failed: {child['error']}"
        for child in report["failed"]
    ]
    left_out = {(row["task"], row["left_out"]) for row in report["rows"] if row["left_out"]}
    return [
        *failed,
        *(f"{name}: not finished" for name in report["unfinished"]),
        *(
            f"{task}: {count} texts left out, their images could not be read"
            for task, count in sorted(left_out)
        ),
    ]


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2328; margin: 24px; max-width: 110em; }
table { border-collapse: collapse; margin: 12px 0 28px; } 
th, td { padding: 6px 10px; text-align: left; vertical-align: top; }
th { border-bottom: 2px solid #d0d7de; } td { border-bottom: 1px solid #d0d7de; max-width: 22em; }
img { display: block; } .right { color: #1a7f37; } .wrong { color: #c62828; } .faint { color: #6e7781; }
"""


def page(
    report: Mapping[str, Any],
    observed: Sequence[Observed],
    curves: Path,
    pictures: Sequence[Reader],
) -> str:
    """One HTML page that needs nothing beside it; everything in it is escaped."""
    name = html.escape(report["name"])
    parts = [
        f"<h1>{name}</h1><p>{html.escape(report['question'])}</p><p class='faint'>{html.escape(how(report))}</p>"
    ]
    for measure, rows in by_measure(report).items():
        shown = [[html.escape(str(cell)) for cell in cells(row)] for row in rows]
        parts.append(f"<h2>{html.escape(measure)}</h2>{table(shown, HEADERS)}")
    if lines := trouble(report):
        items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        parts.append(f"<h2>Without a result</h2><ul>{items}</ul>")
    curve = f"<img alt='' src='{data_uri('png', curves.read_bytes())}'>"
    parts.append(f"<h2>Loss on the training images, mean over seeds</h2>{curve}")
    groups: dict[tuple[Any, str], list[Observed]] = defaultdict(list)
    for one in observed:
        groups[one.test.paths, one.task].append(one)
    for (_, task), group in groups.items():
        parts.append(f"<h2>{task}: the same test images, first seed</h2>{grid(group, pictures)}")
    head = f"<head><meta charset='utf-8'><title>{name}</title><style>{_STYLE}</style></head>"
    return f"<!doctype html>\n<html lang='en'>{head}<body>{''.join(parts)}</body></html>\n"


def table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Cells are HTML already."""
    head = "".join(f"<th>{html.escape(header)}</th>" for header in headers)
    body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def grid(group: Sequence[Observed], pictures: Sequence[Reader]) -> str:
    """A row for each of PICTURES test images, evenly spaced and not chosen; a column for each
    variant.
    """
    texts = group[0].test.texts[group[0].task]
    images = sorted({(i[0], i[1], key) for i, (key, _) in texts.items()})
    count = min(PICTURES, len(images))
    chosen = [images[n * len(images) // count] for n in range(count)]
    shown, rows = payloads(pictures, chosen), []
    for number, image in enumerate(chosen):
        own = [(i, text) for i, (key, text) in texts.items() if (i[0], i[1], key) == image]
        name, text = own[number % len(own)]
        truth = " / ".join(truth for truth, _ in Counter(text.targets).most_common(3))
        row = [
            picture(shown.get(image)),
            html.escape(text.prompt or ""),
            f"<span class='faint'>{html.escape(truth)}</span>",
        ]
        for one in group:
            said = one.said.get(name, "(unreadable)").strip()
            right = text.task == "vqa" and vqa.accuracy(said, text.targets) >= 0.5
            kind = "" if text.task != "vqa" else "right" if right else "wrong"
            row.append(f"<span class='{kind}'>{html.escape(said or '(empty)')}</span>")
        rows.append(row)
    return table(rows, ["image", "asked", "truth", *(one.variant for one in group)])


def image_sets(paths: Sequence[str], cache: Cache | None) -> list[Reader]:
    """Those of the sets that hold images and are there: what is in no other has a grey square in
    the grid.
    """
    found = []
    for path in dict.fromkeys(paths):
        with suppress(ShardError, OSError):  # moved or never made
            manifest = Manifest.open(path, cache)
            found += [Reader(manifest)] if manifest.kind == "images" else []
    return found


def payloads(
    readers: Sequence[Reader], wanted: Sequence[tuple[str, str, str]]
) -> dict[tuple[str, str, str], bytes]:
    """The encoded pictures of these (dataset, split, key), from whichever set has them; or none."""
    found: dict[tuple[str, str, str], bytes] = {}
    for reader in readers:
        manifest = reader.manifest
        index_of = {
            (manifest.dataset, manifest.split, manifest.key(n)): n for n in range(manifest.samples)
        }
        for name in wanted:
            with suppress(KeyError, ShardError):
                found[name] = reader.read(index_of[name]).payload
    return found


def picture(payload: bytes | None) -> str:
    try:
        small = thumbnail(payload, SIDE)
    except OSError:  # damaged: the evaluation named it
        small = thumbnail(None, SIDE)
    encoded = io.BytesIO()
    small.save(encoded, "JPEG", quality=QUALITY)
    return f"<img width='{small.width}' height='{small.height}' alt='' src='{data_uri('jpeg', encoded.getvalue())}'>"


def data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
