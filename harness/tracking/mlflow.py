"""A run in MLflow that follows metrics.jsonl: one thread of its own sends what is not yet there.

In: the journal, and a queue of files, tables and tags. A store that does not answer costs the run a
warning and no time; it gets everything as soon as it answers, or when the run is resumed. Imports
mlflow where it is first used.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config.keys import flatten
from harness.config.load import dump
from harness.config.schema import Config
from harness.report.pictures import Shown, thumbnail
from harness.tracking.journal import Journal, JournalTracker
from harness.tracking.provenance import dataset_inputs, git_tags, source_tags, version_tags
from harness.tracking.store import database, store_uri, without_password
from shards.files import write_whole

if TYPE_CHECKING:
    from shards.manifest import Manifest

log = logging.getLogger(__name__)

RUN_ID = "mlflow_run_id"
PERIOD = 2.0  # seconds between two batches
# a new database is migrated in about 3 s; slower than this and the run starts without waiting
START_SECONDS = 60.0
CLOSE_SECONDS = 60.0  # without progress, then what is left stays in metrics.jsonl
LONGEST_PAUSE = 60.0  # between two attempts at a store that does not answer
SYSTEM_SECONDS = 10.0
# limits of mlflow 3.17: characters of one, how many at once
MAX_PARAM = 6000
MAX_PARAMS = 100
MAX_METRICS = 1000


class MLflowTracker(JournalTracker):
    """A run in MLflow, fed by one thread from metrics.jsonl and a queue of files and tags.

    Steps that are run again after a kill appear once: what MLflow already has (for each figure, up
    to its last step) is not sent again. The steps run again are bit-identical by design; of the
    clock's figures the first reading stays.
    """

    def __init__(
        self,
        config: Config,
        journal: Journal,
        run_id: str | None,
        *,
        adds_only: bool,
        facts: Mapping[str, str],
        datasets: Sequence[Manifest],
    ) -> None:
        super().__init__(config.out_dir, journal)
        self._follows = journal
        self._folder = config.out_dir
        self.run_id = run_id
        self._config = config
        self._facts = dict(facts)
        self._datasets = datasets
        self._adds_only = adds_only
        self._uri = store_uri(config)
        self._client: Any = None
        self._sent = (
            journal.size_at_open if adds_only else 0
        )  # bytes of the journal that are in MLflow
        self._there: dict[str, int] = {}  # last step of each figure that MLflow had when we came
        self._jobs: deque[tuple[str, Callable[[], Any]]] = deque()
        self._infinite: set[str] = set()
        self._monitor: Any = None
        self._system_step, self._system_due = 0, 0.0
        self._warned = False
        self._status = "FINISHED"
        self._progress = time.monotonic()
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        self._ready.wait(START_SECONDS)

    # ---- called by the loop; these only write a line or put something into the queue

    def predictions(
        self, items: Sequence[Shown], step: int, folder: str = "answers"
    ) -> Path | None:
        """Logs a page and a table with images, which the UI shows among the run's artifacts."""
        page = super().predictions(items, step, folder)
        assert page is not None  # there is an output folder
        self.artifact(page, folder)
        name = f"{folder}/{page.stem}.json"
        columns: dict[str, list[Any]] = {
            "image": [thumbnail(item.image, 192) for item in items],
            "prompt": [item.prompt for item in items],
            "truth": [item.expected for item in items],
            "prediction": [item.said for item in items],
            "right": [{True: "yes", False: "no", None: ""}[item.right] for item in items],
            "note": [item.note for item in items],
        }
        self._jobs.append((name, lambda: self._log_table(columns, name, folder)))
        return page

    def artifact(self, path: Path, folder: str = "") -> None:
        path = Path(path).absolute()

        def send() -> None:
            if path.is_dir():
                self._client.log_artifacts(
                    self.run_id, str(path), "/".join(filter(None, [folder, path.name]))
                )
            else:
                self._client.log_artifact(self.run_id, str(path), folder or None)

        self._jobs.append((str(path), send))

    def tags(self, values: Mapping[str, str]) -> None:
        self._jobs.append((", ".join(values), lambda: self._set_tags(values)))

    def close(self, status: str = "FINISHED") -> None:
        """Sends what is left; gives up after CLOSE_SECONDS without progress. A second call does
        nothing.
        """
        self._status = status
        self._progress = time.monotonic()
        self._stop.set()
        while self._thread.is_alive() and time.monotonic() - self._progress < CLOSE_SECONDS:
            self._thread.join(0.2)
        if not self._thread.is_alive():
            super().close(status)
        elif not self._warned:
            self._tell("it takes too long")

    # ---- the thread

    def _work(self) -> None:
        pause = PERIOD
        while not self._stop.is_set():
            pause = PERIOD if self._attempt() else min(2 * pause, LONGEST_PAUSE)
            self._ready.set()
            self._stop.wait(pause)
        self._system_due = 0.0
        if self._attempt() and not self._adds_only:
            self._attempt(lambda: self._client.set_terminated(self.run_id, self._status))

    def _attempt(self, act: Callable[[], None] | None = None) -> bool:
        """Tells whether everything so far is in the store. Whatever a store raises, training goes
        on.
        """
        try:
            (act or self._send_all)()
        except Exception as error:
            if not self._warned:
                self._tell(" ".join(str(error).split())[:300] or type(error).__name__)
            self._warned = True
            return False
        if self._warned:
            log.warning("%s answers again: everything was sent", without_password(self._uri))
        self._warned = False
        return True

    def _tell(self, why: str) -> None:
        log.warning(
            "the MLflow store %s does not take this run's figures (%s): training goes on, %s "
            "holds them",
            *(without_password(self._uri), without_password(why), self._follows.path),
        )

    def _send_all(self) -> None:
        if self._client is None:
            self._connect()
        while self._send_batch():
            self._progress = time.monotonic()
        while self._jobs:
            name, job = self._jobs[0]
            self._unless_refused(job, name)
            self._jobs.popleft()
            self._progress = time.monotonic()
        self._send_system()

    def _unless_refused(self, act: Callable[[], Any], name: str) -> None:
        """Names and leaves out what cannot succeed by waiting (a bad name, a file that is gone)."""
        try:
            act()
        except Exception as error:
            if not (
                isinstance(error, FileNotFoundError) or _code(error) == "INVALID_PARAMETER_VALUE"
            ):
                raise
            log.warning("not in MLflow: %s (%s)", name, " ".join(str(error).split())[:300])

    def _send_batch(self) -> bool:
        """Sends the next lines of the journal; a batch sent twice after a lost answer is stored
        once (same times).
        """
        from mlflow.entities import Metric

        rows, offset = self._follows.read(self._sent, MAX_METRICS)
        metrics, infinite = [], {}
        for row in rows:
            for name, value in row["values"].items():
                key = re.sub(r"[^\w\-. :/]", "_", name)[:250]
                value = float(value)
                if row["step"] <= self._there.get(key, -1):
                    continue
                if math.isinf(
                    value
                ):  # mlflow would store 1.8e308, which flattens the chart: a gap and a tag instead
                    if key not in self._infinite:
                        infinite[f"infinite.{key}"] = f"{value} at step {row['step']}"
                        self._infinite.add(key)
                    value = math.nan
                metrics.append(Metric(key, value, row["time"], row["step"]))
        for batch in _batches(metrics, MAX_METRICS):
            self._unless_refused(
                partial(self._client.log_batch, self.run_id, batch), f"{len(batch)} figures"
            )
        if infinite:
            self._set_tags(infinite)
        self._sent, more = offset, offset > self._sent
        return more

    def _send_system(self) -> None:
        from mlflow.entities import Metric

        if self._monitor is None or time.monotonic() < self._system_due:
            return
        self._system_due = time.monotonic() + SYSTEM_SECONDS
        values = self._read_system()
        now = int(time.time() * 1000)
        metrics = [
            Metric(f"system/{key}", float(value), now, self._system_step)
            for key, value in values.items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)
        self._system_step += 1

    def _read_system(self) -> dict[str, float]:
        self._monitor.collect_metrics()
        values = self._monitor.aggregate_metrics()
        for monitor in self._monitor.monitors:
            monitor.clear_metrics()
        return values

    def _connect(self) -> None:
        """Finds or makes the run and describes it. May be tried again from the start at any
        point.
        """
        from mlflow import MlflowClient
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if self._uri.startswith("sqlite"):
            database(self._uri).parent.mkdir(parents=True, exist_ok=True)
        client = MlflowClient(self._uri)
        run = self._find_run(client) if self.run_id else None
        if run is None:
            name = self._config.tracking.run_name or self._config.name
            parent = self._config.tracking.parent_run_id
            tags = source_tags() | ({"mlflow.parentRunId": parent} if parent else {})
            run = client.create_run(self._experiment(client), tags=tags, run_name=name)
            self._adds_only = False
        elif not self._adds_only:
            client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        write_whole(self._folder / RUN_ID, self.run_id.encode())
        if not self._adds_only:
            self._there = {
                m.key: m.step for m in run.data._metric_objs
            }  # as mlflow's own monitor does; no public name
            self._describe(client, run)
            if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() != "false":
                self._monitor = SystemMetricsMonitor(
                    self.run_id, tracking_uri=self._uri
                )  # never started: only read
                self._read_system()  # the first reading of the CPU is always 0
                self._system_due = time.monotonic() + SYSTEM_SECONDS
                self._system_step = 1 + max(
                    [s for k, s in self._there.items() if k.startswith("system/")], default=-1
                )
        self._client = client

    def _find_run(self, client: Any) -> Any:
        try:
            run = client.get_run(self.run_id)
        except Exception as error:
            if _code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            log.warning(
                "run %s is no longer in %s: a new one is begun",
                self.run_id,
                without_password(self._uri),
            )
            self._sent = 0
            return None
        return run

    def _experiment(self, client: Any) -> str:
        name = self._config.tracking.experiment
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        place = (
            database(self._uri).parent / "mlartifacts" if self._uri.startswith("sqlite") else None
        )
        try:
            return client.create_experiment(name, artifact_location=place and place.as_uri())
        except Exception as error:  # another job was faster
            if _code(error) != "RESOURCE_ALREADY_EXISTS":
                raise
            return client.get_experiment_by_name(name).experiment_id

    def _describe(self, client: Any, run: Any) -> None:
        """Params, facts, versions, data and the config's file. Params are immutable: a changed one
        becomes a tag.
        """
        from mlflow.entities import Param, RunTag

        values = {
            k: v if isinstance(v, str) else json.dumps(v) for k, v in flatten(self._config).items()
        }
        params = {
            k: without_password(v) for k, v in values.items() if len(v) <= MAX_PARAM
        }  # the rest: config.yaml
        known = run.data.params
        tags = {f"resumed.{k}": v for k, v in params.items() if known.get(k, v) != v}
        tags |= {**version_tags(), **git_tags(), **self._facts, "host": os.uname().nodename}
        new = [Param(k, v) for k, v in params.items() if k not in known]
        for batch in _batches(new, MAX_PARAMS):
            client.log_batch(run.info.run_id, params=batch)
        for batch in _batches([RunTag(key, str(value)) for key, value in tags.items()], MAX_PARAMS):
            client.log_batch(run.info.run_id, tags=batch)
        if self._datasets:
            client.log_inputs(run.info.run_id, dataset_inputs(self._datasets))
        client.log_text(run.info.run_id, without_password(dump(self._config)), "config.yaml")

    def _set_tags(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(
            self.run_id, tags=[RunTag(key, str(value)) for key, value in values.items()]
        )

    def _log_table(self, columns: dict[str, list[Any]], name: str, folder: str) -> None:
        """log_table appends to a table that is there: one that was logged before a kill stays as it
        is.
        """
        import pandas

        if all(file.path != name for file in self._client.list_artifacts(self.run_id, folder)):
            self._client.log_table(self.run_id, pandas.DataFrame(columns, dtype=object), name)


def _code(error: Exception) -> str:
    """MLflow's own name of an error; "" for any other."""
    return getattr(error, "error_code", "")


def _batches(entries: list[Any], size: int) -> list[list[Any]]:
    return [entries[start : start + size] for start in range(0, len(entries), size)]
