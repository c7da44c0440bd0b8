"""The demo with several seeds: `python benchmarks/demo_seeds.py --out runs/seeds --seeds 0 1 2`.

Prints one table: accuracy on the test set, its floors, times and memory of each seed, and their
mean and worst. A seed whose report is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from statistics import mean

from harness.report.pictures import markdown_table

COLUMNS = {
    "accuracy": "accuracy %",
    "text_only_accuracy": "words alone %",
    "majority_accuracy": "majority %",
    "shuffled_accuracy": "images shuffled %",
    "loss_gap_nats": "loss gap, nats",
    "verdict": "verdict",
    "cpu_seconds": "CPU s",
    "peak_rss_mb": "largest process MB",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    given = parser.parse_args()
    reports = {}
    for seed in given.seeds:
        out = given.out / f"seed{seed}"
        if not (out / "report.json").exists():
            line = [sys.executable, "-m", "harness", "demo", "--out", str(out), "--seed", str(seed)]
            subprocess.run(line, check=True, env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE"})
        reports[seed] = json.loads((out / "report.json").read_text())
    rows = [
        [seed, *(report[key] for key in COLUMNS), f"{report['seconds']['all']:.0f}"]
        for seed, report in reports.items()
    ]
    accuracies = [report["accuracy"] for report in reports.values()]
    print(
        f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, no GPU unless "
        f"said\n"
    )
    print(markdown_table(rows, ["seed", *COLUMNS.values(), "s"]))
    print(f"\nmean accuracy {mean(accuracies):.2f}%, worst {min(accuracies):.2f}%")


if __name__ == "__main__":
    main()
