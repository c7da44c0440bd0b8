"""What a run wrote down while it went on, as charts and tables: losses, scores, speed, memory,
versions.

A run's folder -> charts of metrics.jsonl, and rows of (label, text).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from markupsafe import Markup

from harness.look.chart import Points, line_chart, number
from harness.report.speed import Shares
from harness.tracking.journal import TRACKED, every_row
from harness.tracking.provenance import git_tags, version_tags

# Title of a chart -> its lines: name, and the ends of the figures' names in metrics.jsonl.
CHARTS: Mapping[str, Mapping[str, str]] = {
    "loss, nats a token": {"training": "train/loss", "dev": "dev/loss"},
    "learning rate": {"": "train/learning_rate"},
    "right answers on dev, %": {
        "true images": "dev/accuracy",
        "shuffled": "dev/shuffled_accuracy",
        "none": "dev/no_image_accuracy",
    },
    "CIDEr x 100 on dev": {"true images": "dev/CIDEr", "shuffled": "dev/shuffled_CIDEr"},
    "points lost with another image": {
        "any": "dev/exchange_advantage",
        "most alike": "dev/matched_exchange_advantage",
    },
    "empty answers on dev, %": {"": "dev/empty_rate"},
    "gradient norm": {"": "train/grad_norm"},
    "share of time waiting for data, %": {"": "train/data_wait"},
    "memory, MB": {"": "train/memory_mb"},
}
HUNDREDFOLD = ("dev/CIDEr", "dev/empty_rate", "train/data_wait")
_NOT_TOLD = ("host", "mlflow.user")  # a page is passed on


class History:
    """The figures of one run by name: (step, value) in their order."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.series: dict[str, list[tuple[float, float]]] = {}
        self.times: list[int] = []  # ms since 1970, of the lines of training
        for row in every_row(home):
            for name, value in row["values"].items():
                self.series.setdefault(name, []).append((row["step"], float(value)))
            if "train/loss" in row["values"]:
                self.times.append(row["time"])

    def charts(self) -> list[Markup]:
        """Returns a chart of each title that has figures."""
        made = []
        for title, lines in CHARTS.items():
            shown: dict[str, Points] = {}
            for name, key in lines.items():
                for task, points in self._of(key).items():
                    times = 100 if key in HUNDREDFOLD else 1
                    shown[" ".join(filter(None, (name, task)))] = [
                        (x, times * y) for x, y in points
                    ]
            made.append(line_chart(title, shown))
        return list(filter(None, made))

    def _of(self, key: str) -> dict[str, Points]:
        """Returns a figure by task, which stands in its name where a run has several."""
        if key in self.series:
            return {"": self.series[key]}
        ends = key.split("/")
        tasks = (found.split("/") for found in self.series)
        return {
            parts[1]: self.series["/".join(parts)]
            for parts in tasks
            if len(parts) == 3 and [parts[0], parts[2]] == ends
        }

    def facts(self) -> list[tuple[str, str]]:
        """Returns what the training took."""
        rows = []
        for label, key, told in _FACTS:
            values = [value for _, value in self.series.get(key, ())]
            if values:
                rows.append((label, told(values)))
        last = {key.removeprefix("train/"): points[-1][1] for key, points in self.series.items()}
        if shares := Shares.among(last):
            rows.append(("what limits the speed", "; ".join(shares.lines())))
        if len(self.times) > 1:
            took = timedelta(seconds=round((self.times[-1] - self.times[0]) / 1000))
            rows.append(("from the first logged step to the last", str(took)))
        return rows

    def environment(self) -> list[tuple[str, str]]:
        """Returns versions, revision and precision, those of the training where they are known."""
        file = self.home / TRACKED
        try:
            tags: dict[str, Any] = json.loads(file.read_bytes())["tags"]
        except (OSError, ValueError, KeyError, TypeError):
            tags = {**version_tags(), **git_tags(), "read": "as this page was made"}
        return [(name, str(value)) for name, value in tags.items() if name not in _NOT_TOLD]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


_FACTS: Sequence[tuple[str, str, Callable[[Sequence[float]], str]]] = (
    ("time spent waiting for data", "train/data_wait", lambda v: f"{_mean(v):.1%}"),
    ("MFU: of the GPUs' arithmetic, used", "train/mfu", lambda v: f"{_mean(v):.1%}"),
    ("images a second", "train/images_per_second", lambda v: number(_mean(v))),
    ("targets a second", "train/targets_per_second", lambda v: number(_mean(v))),
    ("memory at most", "train/memory_mb", lambda v: f"{max(v):,.0f} MB"),
    ("steps skipped, loss or gradient not finite", "train/skipped_steps", lambda v: f"{v[-1]:.0f}"),
    ("samples that could not be read", "train/quarantined_samples", lambda v: f"{v[-1]:.0f}"),
    ("texts that were cut", "train/truncated_texts", lambda v: f"{v[-1]:.0f}"),
    ("share of time for checkpoints", "save/share_of_time", lambda v: f"{v[-1]:.1%}"),
)
