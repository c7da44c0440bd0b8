"""Planted cheats against the terms of the gate: `python benchmarks/cheats.py --json FILE`.

Judges every model of tests/support/cheats.py, three seeds each, prints a table of verdicts and of
how far each term is passed, and writes the figures as JSON. Takes about six minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))

from cheats import CASES, KINDS, Case, World, floors_made_once, judged, make_world
from harness.evaluate.image_use.evidence import ImageUse, Term
from harness.report.pictures import markdown_table

HEADING = {"vqa": "questions", "caption": "captions"}
TERMS = {
    "vqa": ("exchange", "matched exchange", "shallow floor", "images of another set"),
    "caption": (
        "exchange",
        "matched exchange",
        "recall",
        "neighbour floor",
        "images of another set",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="file that the figures are written to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test", type=int, default=400, help="pictures that are judged")
    parser.add_argument("--train", type=int, default=2000, help="pictures that are learnt from")
    parser.add_argument("--trees", type=int, default=100, help="of the shallow floor")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    order = [case.name for case in CASES]
    for seed in given.seeds:
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as folder:
                world = make_world(Path(folder), kind, seed, test=given.test, train=given.train)
                rows += judged_in(world, given.trees)
    rows.sort(key=lambda row: (order.index(row["case"]), row["seed"]))
    if given.json:
        lines = ",\n".join(map(json.dumps, rows))  # one for each: changes of a model show
        sizes = json.dumps({"test": given.test, "train": given.train, "trees": given.trees})
        given.json.write_text(f'{{"pictures": {sizes},\n"rows": [\n{lines}\n]}}\n')
    for task in TERMS:
        print(f"\n{table(rows, task)}")


def judged_in(world: World, trees: int) -> list[dict[str, Any]]:
    """Returns the figures of all models over the sets of one kind and seed."""
    rows = []
    with floors_made_once(trees):
        for case in CASES:
            if case.kind != world.kind:
                continue
            for task, use in judged(case, world).items():
                rows.append(figures(case, world.seed, task, use))
                print(f"seed {world.seed}, {case.name}, {task}: {use.verdict}", file=sys.stderr)
    return rows


def figures(case: Case, seed: int, task: str, use: ImageUse) -> dict[str, Any]:
    """Returns a verdict and its terms, JSON-ready."""
    return {
        "case": case.name,
        "set": case.kind,
        "task": task,
        "seed": seed,
        "verdict": use.verdict,
        "expected": list(case.expected[task]),
        "score": use.scores["true"],
        "images": use.images,
        "reason": use.reason,
        "terms": {term.name: known(term) for term in use.terms},
    }


def known(term: Term) -> dict[str, Any]:
    """Returns a term's figures, in points and nats."""
    if term.advantage is None:
        return {"missing": term.missing, "passed": False}
    return {
        "passed": term.passed,
        "points": term.advantage.to_dict(2),
        "nats": term.nats.to_dict(3) if term.nats else None,
        "score": term.score,
        "images": term.images,
        "about": term.about,
    }


def table(rows: list[dict[str, Any]], task: str) -> str:
    """Returns a line for each model: verdicts of all seeds, score and terms of the first one."""
    lines = []
    own_task = [row for row in rows if row["task"] == task]
    for case in dict.fromkeys(row["case"] for row in own_task):
        own = [row for row in own_task if row["case"] == case]
        counts = Counter(row["verdict"] for row in own)
        several = len(counts) > 1
        verdicts = ", ".join(f"{v} ({n})" if several else v for v, n in counts.items())
        terms = own[0]["terms"]
        cells = [cell(terms.get(name)) for name in TERMS[task]]
        lines.append([case, verdicts, f"{own[0]['score']:.1f}", *cells])
    return markdown_table(lines, [HEADING[task], "verdict", "score", *TERMS[task]])


def cell(term: dict[str, Any] | None) -> str:
    """Returns a term's points; one that is not passed is bold."""
    if term is None:
        return ""
    if "points" not in term:
        return "**none**"
    value, low, high = term["points"].values()
    told = f"{value:.1f} [{low:.1f}, {high:.1f}]"
    return told if term["passed"] else f"**{told}**"


if __name__ == "__main__":
    main()
