"""What a run leaves in its own folder, with or without MLflow: every figure by step, and pages of
answers.

{"step": 10, "time": 1760000000000, "values": {"train/loss": 1.25}}

A line; time in ms since 1970.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.report.pages import predictions_html
from harness.report.pictures import Shown
from shards.files import write_whole

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
DESCRIPTION = "mlflow.note.content"
MAX_TAG = 5000  # characters
RUN_ID = "mlflow_run_id"  # a file too: MLflow's run
TRACKED = "tracking.json"  # what MLflow is told of the run as a whole


class Journal:
    """OUT/metrics.jsonl. A resumed run keeps the lines up to its checkpoint and writes the rest
    again.
    """

    def __init__(self, out: Path, keep: int | None) -> None:
        """Opens the journal. `keep`: lines of later steps are dropped; 0 drops all, None
        keeps all.
        """
        self.path = out / METRICS
        out.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        kept = [
            (line, row)
            for line in lines
            if (row := parsed_row(line)) and (keep is None or row["step"] <= keep > 0)
        ]
        if keep is not None and len(kept) < len(lines):  # a line torn by a kill goes too
            write_whole(self.path, b"".join(line for line, _ in kept))
        self.last = (
            {} if keep is None else {key: row["step"] for _, row in kept for key in row["values"]}
        )
        self._file = self.path.open("ab")
        if keep is None and lines and not lines[-1].endswith(b"\n"):
            self._file.write(b"\n")

    def write(self, values: Mapping[str, float], step: int) -> dict[str, Any] | None:
        """Writes the figures that are new and returns the line as a document; None: there are
        none.
        """
        new = {key: float(value) for key, value in values.items() if step > self.last.get(key, -1)}
        row = {
            k: v if math.isfinite(v) else str(v) for k, v in new.items()
        }  # "nan", "inf": JSON has no word for them
        if not row:
            return None
        document = {"step": step, "time": int(time.time() * 1000), "values": row}
        self._file.write(json.dumps(document).encode() + b"\n")
        self._file.flush()
        return document

    def history(self, name: str) -> dict[int, float]:
        """Returns a figure's values by step, as far as they were written.

        Line by line: a run of days has a journal that is not to lie in memory.
        """
        found: dict[int, float] = {}
        quoted = json.dumps(name).encode()
        with self.path.open("rb") as file:
            for line in file:
                if quoted in line and (row := parsed_row(line)) and name in row["values"]:
                    found[row["step"]] = float(row["values"][name])
        return found

    def close(self) -> None:
        self._file.close()


def read_rows(path: Path, offset: int, most: float) -> tuple[list[dict[str, Any]], int]:
    """Returns whole lines of a journal from `offset` on, until they hold `most` figures, and the
    offset behind them.
    """
    rows: list[dict[str, Any]] = []
    count = 0
    with path.open("rb") as file:
        file.seek(offset)
        while count < most and (line := file.readline()).endswith(b"\n"):
            offset += len(line)
            if row := parsed_row(line):
                rows.append(row)
                count += len(row["values"])
    return rows, offset


def every_row(home: Path) -> Iterator[dict[str, Any]]:
    """Yields the lines of a run's journal but for torn ones; nothing where it has none."""
    file = home / METRICS
    if file.is_file():
        with file.open("rb") as lines:
            yield from filter(None, map(parsed_row, lines))


def parsed_row(line: bytes) -> dict[str, Any] | None:
    """Returns a line's step and values; None for a line that a kill has torn."""
    try:
        row = json.loads(line)
        return row if isinstance(row["step"], int) and isinstance(row["values"], dict) else None
    except (ValueError, KeyError, TypeError):
        return None


def run_id_in(folder: Path) -> str | None:
    """Returns MLflow's run that was begun in an output folder."""
    file = folder / RUN_ID
    return file.read_text().strip() or None if file.exists() else None


class JournalTracker:
    """Runs where mlflow is not installed. With an output folder it still writes metrics.jsonl and
    the answers.
    """

    run_id: str | None = None

    def __init__(self, out: Path | None = None, journal: Journal | None = None) -> None:
        self._out = out
        self._journal = journal
        self._told = False

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._write(values, step)

    def _write(self, values: Mapping[str, float], step: int) -> dict[str, Any] | None:
        if self._journal:
            try:
                return self._journal.write(values, step)
            except OSError as error:
                self._lost(f"{self._journal.path} cannot be written ({error}): figures")
        return None

    def _lost(self, what: str) -> None:
        """Says once what is being lost: a full disk must not end a run that may outlast it."""
        if not self._told:
            log.warning("%s are being lost", what)
        self._told = True

    def history(self, name: str) -> dict[int, float]:
        return self._journal.history(name) if self._journal else {}

    def predictions(
        self, items: Sequence[Shown], step: int, folder: str = "answers"
    ) -> Path | None:
        """Writes OUT/folder/step-N.html, returns its path; None where it cannot be written, and on
        a rank that reports nothing.
        """
        if self._out is None:
            return None
        page = self._out / folder / f"step-{step:06d}.html"
        try:
            return predictions_html(items, page, title=f"Step {step}")
        except OSError as error:
            self._lost(f"{page} cannot be written ({error}): answers")
            return None

    def artifact(self, path: Path, folder: str = "") -> None:
        pass

    def tags(self, values: Mapping[str, str]) -> None:
        pass

    def model(self, folder: Path, name: str) -> None:
        pass

    def describe(self, text: str) -> None:
        """Sets what stands at the top of the run's page, as Markdown."""
        self.tags({DESCRIPTION: text[:MAX_TAG]})

    def checkpoint(self, path: Path, digest: str, step: int) -> None:
        path = Path(path).absolute()
        self.tags(
            {
                "checkpoint.path": str(path),
                "checkpoint.sha256": digest,
                "checkpoint.step": str(step),
            }
        )

    def close(self, status: str = "FINISHED") -> None:
        if self._journal:
            self._journal.close()
