"""A run in MLflow that follows metrics.jsonl: one thread of its own sends what is not yet there.

In: the journal, and the outbox of files, tables and tags. A store that does not answer costs the
run a warning and no time; it gets everything as soon as it answers, when the run is resumed, or by
`harness sync RUN`. Imports mlflow where it is first used.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import math
import os
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from harness.config.keys import flatten
from harness.config.load import dump
from harness.config.schema import Config
from harness.errors import ConfigError
from harness.redact import clean, masked_document
from harness.report.pictures import Shown, thumbnail
from harness.tracking.journal import (
    METRICS,
    RUN_ID,
    TRACKED,
    Journal,
    JournalTracker,
    read_rows,
    run_id_in,
)
from harness.tracking.outbox import Outbox
from harness.tracking.provenance import dataset_inputs, git_tags, source_tags, version_tags
from harness.tracking.served import log_export
from harness.tracking.store import (
    ARTIFACTS,
    database,
    environment_tags,
    experiment_name,
    follow_move,
    refuse_deleted,
    run_name,
    store_of,
    store_uri,
)
from shards.files import write_whole

if TYPE_CHECKING:
    from shards.manifest import Manifest

log = logging.getLogger(__name__)

PARTS = ("uri", "experiment", "name", "key", "time", "source", "params", "tags", "inputs", "config")
PERIOD = 2.0  # seconds between two batches
# Until the run's id is known. A new database is migrated in about 3 s; a server is quick or down.
START_SECONDS = {True: 60.0, False: 10.0}
LONGEST_PAUSE = 60.0  # between two attempts at a store that does not answer
SYSTEM_SECONDS = 10.0
# limits of mlflow 3.17: characters of one, how many at once
MAX_PARAM = 6000
MAX_PARAMS = 100
MAX_METRICS = 1000


def description(
    config: Config, facts: Mapping[str, str], datasets: Sequence[Manifest]
) -> dict[str, Any]:
    """Returns what MLflow is told of a run as a whole, as a JSON document without secrets.

    It is all that `harness sync` needs. `key` finds a run whose making was not answered.
    """
    parent = config.tracking.parent_run_id
    values = {k: v if isinstance(v, str) else json.dumps(v) for k, v in flatten(config).items()}
    document = {
        "uri": config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI"),
        "experiment": experiment_name(config),
        "name": run_name(config),
        "key": uuid.uuid4().hex,
        "time": _now(),
        "source": source_tags() | ({"mlflow.parentRunId": parent} if parent else {}),
        "params": {k: v for k, v in values.items() if len(v) <= MAX_PARAM},  # the rest: config.yaml
        "tags": {
            **version_tags(),
            **git_tags(),
            **facts,
            "host": os.uname().nodename,
            **environment_tags(),
        },
        "inputs": dataset_inputs(datasets),
    }
    return masked_document(document) | {"config": dump(config)}


class Sender:
    """The way from a run's folder into MLflow: what it holds, in order, each thing once.

    Steps that are run again after a kill appear once: what MLflow already has (for each figure, up
    to its last step) is not sent again. The steps run again are bit-identical by design; of the
    clock's figures the first reading stays.
    """

    def __init__(
        self, folder: Path, uri: str, run_id: str | None, told: Mapping[str, Any], adds_only: bool
    ) -> None:
        """`told`: as `description` gives it. `adds_only`: jobs of its own to a run of another."""
        self.uri = uri
        self.name = clean(uri)  # to be shown
        self.run_id = run_id
        self.jobs: deque[Path] = deque()
        self.figures = 0  # sent
        self.things = 0
        self.gives_up = False  # what is on its way may end, nothing new begins
        self.monitors = False
        self._folder = folder
        self._told = told
        self._adds_only = adds_only
        self._client: Any = None
        self._sent = 0  # bytes of the journal that are in MLflow
        self._there: dict[str, int] = {}  # last step of each figure that MLflow had when we came
        self._infinite: set[str] = set()
        self._monitor: Any = None
        self._system_step = 0
        self.system_due = 0.0

    def send_all(self) -> None:
        """Sends what is not there yet. Raises whatever the store does."""
        if self._client is None:
            self._connect()
        while not self._adds_only and self._send_batch():
            self._check_still_wanted()
        while self.jobs:
            self._check_still_wanted()
            if job := Outbox.read(self.jobs[0]):
                self._unless_refused(partial(self._send, job), _name(job))
                self.things += 1
            self.jobs.popleft().unlink(missing_ok=True)
        self._send_system()

    def _check_still_wanted(self) -> None:
        if self.gives_up:
            raise TimeoutError("the run waits no longer")

    def left(self) -> str:
        """Says what is not sent yet; "" for nothing."""
        rows: list[dict[str, Any]] = []
        if not self._adds_only:
            rows = read_rows(self._folder / METRICS, self._sent, math.inf)[0]
        figures = sum(len(row["values"]) for row in rows)
        names = [_name(job) for path in list(self.jobs) if (job := Outbox.read(path))]
        shown = names[:3] + ([f"{len(names) - 3} more"] if len(names) > 3 else [])
        return ", ".join(([f"{figures} figures"] if figures else []) + shown)

    def _send(self, job: Mapping[str, Any]) -> None:
        kind = job["kind"]
        if kind == "figures":
            self._log_rows([job["row"]], {})
        elif kind == "tags":
            self._set_tags(job["tags"])
        elif kind == "table":
            self._log_table(job["columns"], job["name"], job["folder"])
        elif kind == "model":
            log_export(self._folder / job["path"], job["name"], self.uri, str(self.run_id))
        elif kind == "status":
            self._client.set_terminated(self.run_id, job["status"], job["time"])
        else:
            path = self._folder / job["path"]
            if path.is_dir():
                place = "/".join(filter(None, [job["folder"], path.name]))
                self._client.log_artifacts(self.run_id, str(path), place)
            else:
                self._client.log_artifact(self.run_id, str(path), job["folder"] or None)

    def _unless_refused(self, act: Callable[[], Any], name: str) -> None:
        """Names and leaves out what cannot succeed by waiting (a bad name, a file that is gone)."""
        try:
            act()
        except Exception as error:
            if not (
                isinstance(error, FileNotFoundError) or _code(error) == "INVALID_PARAMETER_VALUE"
            ):
                raise
            log.warning("not in MLflow: %s (%s)", name, why(error))

    def _send_batch(self) -> bool:
        """Sends the next lines of the journal; a batch sent twice after a lost answer is stored
        once (same times).
        """
        rows, offset = read_rows(self._folder / METRICS, self._sent, MAX_METRICS)
        self._log_rows(rows, self._there)
        more = offset > self._sent
        self._sent = offset
        return more

    def _log_rows(self, rows: Sequence[Mapping[str, Any]], there: Mapping[str, int]) -> None:
        """`there`: the last step of each figure that is not to be sent again."""
        from mlflow.entities import Metric

        metrics, infinite = [], {}
        for row in rows:
            for name, value in row["values"].items():
                key = re.sub(r"[^\w\-. :/]", "_", name)[:250]
                value = float(value)
                if row["step"] <= there.get(key, -1):
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
        self.figures += len(metrics)
        if infinite:
            self._set_tags(infinite)

    def _send_system(self) -> None:
        from mlflow.entities import Metric

        if self._monitor is None or time.monotonic() < self.system_due:
            return
        self.system_due = time.monotonic() + SYSTEM_SECONDS
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

        if self.uri.startswith("sqlite"):
            database(self.uri).parent.mkdir(parents=True, exist_ok=True)
            follow_move(self.uri, self._folder)
        client = MlflowClient(self.uri)
        run = self._find_run(client) if self.run_id else None
        if run is None:
            run = self._make_run(client)
            self._adds_only = False
        elif self.monitors:
            client.update_run(run.info.run_id, status="RUNNING")
        self.run_id = run.info.run_id
        write_whole(self._folder / RUN_ID, self.run_id.encode())
        if not self._adds_only:
            self._there = {
                m.key: m.step for m in run.data._metric_objs
            }  # as mlflow's own monitor does; no public name
            self._describe(client, run)
        if self.monitors:
            self._start_monitor()
        self._client = client

    def _start_monitor(self) -> None:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        if os.environ.get("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true").lower() == "false":
            return
        # never started: only read
        self._monitor = SystemMetricsMonitor(self.run_id, tracking_uri=self.uri)
        self._read_system()  # the first reading of the CPU is always 0
        self.system_due = time.monotonic() + SYSTEM_SECONDS
        self._system_step = 1 + max(
            [s for k, s in self._there.items() if k.startswith("system/")], default=-1
        )

    def _find_run(self, client: Any) -> Any:
        try:
            run = client.get_run(self.run_id)
        except Exception as error:
            if _code(error) != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage != "active":
            log.warning("run %s is no longer in %s: a new one is begun", self.run_id, self.name)
            return None
        return run

    def _make_run(self, client: Any) -> Any:
        """Returns the run that an earlier attempt made without hearing of it, else a new one."""
        place = self._experiment(client)
        key = self._told["key"]
        if made := client.search_runs([place], f"tags.`harness.key` = '{key}'", max_results=1):
            return made[0]
        self._check_still_wanted()
        tags = {**self._told["source"], "harness.key": key}
        return client.create_run(place, self._told["time"], tags, self._told["name"])

    def _experiment(self, client: Any) -> str:
        name = self._told["experiment"]
        if found := client.get_experiment_by_name(name):
            refuse_deleted(self.uri, name, found.experiment_id, found.lifecycle_stage)
            return found.experiment_id
        place = database(self.uri).parent / ARTIFACTS if self.uri.startswith("sqlite") else None
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
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        known = run.data.params
        params = self._told["params"]
        tags = {f"resumed.{k}": v for k, v in params.items() if known.get(k, v) != v}
        tags |= self._told["tags"]
        new = [Param(k, v) for k, v in params.items() if k not in known]
        for batch in _batches(new, MAX_PARAMS):
            client.log_batch(run.info.run_id, params=batch)
        for batch in _batches([RunTag(key, str(value)) for key, value in tags.items()], MAX_PARAMS):
            client.log_batch(run.info.run_id, tags=batch)
        inputs = [
            DatasetInput(
                Dataset(**entry["dataset"]), [InputTag(k, v) for k, v in entry["tags"].items()]
            )
            for entry in self._told["inputs"]
        ]
        if inputs:
            client.log_inputs(run.info.run_id, inputs)
        client.log_text(run.info.run_id, self._told["config"], "config.yaml")

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

        if any(file.path == name for file in self._client.list_artifacts(self.run_id, folder)):
            return
        images = [Image.open(io.BytesIO(base64.b64decode(png))) for png in columns["image"]]
        table = pandas.DataFrame({**columns, "image": images}, dtype=object)
        self._client.log_table(self.run_id, table, name)


class MLflowTracker(JournalTracker):
    """A run in MLflow, fed by one thread from metrics.jsonl and the outbox."""

    def __init__(
        self,
        config: Config,
        journal: Journal,
        run_id: str | None,
        *,
        resumes: bool,
        facts: Mapping[str, str],
        datasets: Sequence[Manifest],
    ) -> None:
        """`resumes`: goes on with what was begun here; else, with a `run_id`, only adds to it."""
        super().__init__(config.out_dir, journal)
        folder = config.out_dir
        adds_only = run_id is not None and not resumes
        told = description(config, facts, datasets)
        self._outbox = Outbox(folder)
        self._sender = Sender(folder, store_uri(config), run_id, told, adds_only)
        self._sender.monitors = not adds_only
        if not adds_only:
            if not resumes:
                self._outbox.clear()
            elif (folder / TRACKED).exists():
                told["key"] = read_description(folder)["key"]
            write_whole(folder / TRACKED, json.dumps(told, indent=1).encode())
            self._sender.jobs.extend(self._outbox.waiting())
        self._folder = folder
        self._adds_only = adds_only
        self._last_wait = config.tracking.last_wait
        self._why = ""  # what the store said last; "" while it answers
        self._refusal: ConfigError | None = None  # what no waiting helps against
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._thread.start()
        if not adds_only:
            self._ready.wait(START_SECONDS[self._sender.uri.startswith("sqlite")])
        if self._refusal:
            self._stop.set()
            raise self._refusal

    @property
    def run_id(self) -> str | None:  # type: ignore[override]  # known once the store has answered
        return self._sender.run_id

    # ---- called by the loop; these only write a line or put something into the outbox

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        row = self._write(values, step)
        if row and self._adds_only:  # the run itself follows the journal
            self._put({"kind": "figures", "row": row})

    def predictions(
        self, items: Sequence[Shown], step: int, folder: str = "answers"
    ) -> Path | None:
        """Logs a page and a table with images, which the UI shows among the run's artifacts."""
        page = super().predictions(items, step, folder)
        if page is None:
            return None
        self.artifact(page, folder)
        columns: dict[str, list[Any]] = {
            "image": [_png(item) for item in items],
            "prompt": [item.prompt for item in items],
            "truth": [item.expected for item in items],
            "prediction": [item.said for item in items],
            "right": [{True: "yes", False: "no", None: ""}[item.right] for item in items],
            "note": [item.note for item in items],
        }
        name = f"{folder}/{page.stem}.json"
        self._put({"kind": "table", "name": name, "folder": folder, "columns": columns})
        return page

    def artifact(self, path: Path, folder: str = "") -> None:
        path = Path(path).absolute()
        home = self._folder.absolute()
        inside = path.relative_to(home) if path.is_relative_to(home) else path
        self._put({"kind": "artifact", "path": str(inside), "folder": folder})

    def model(self, folder: Path, name: str) -> None:
        """Registers an export, which lies in the run's folder and stays as it is."""
        inside = folder.absolute().relative_to(self._folder.absolute())
        self._put({"kind": "model", "path": str(inside), "name": name})

    def tags(self, values: Mapping[str, str]) -> None:
        self._put({"kind": "tags", "tags": masked_document(dict(values))})

    def _put(self, job: dict[str, Any]) -> None:
        try:
            self._sender.jobs.append(self._outbox.put(job))
        except OSError as error:  # a full disk must not end a run that may outlast it
            log.warning("%s does not reach MLflow: %s", _name(job), error)

    def close(self, status: str = "FINISHED") -> None:
        """Sends what is left, for at most `tracking.last_wait` seconds, and says what was not sent.
        A second call does nothing.
        """
        if self._stop.is_set():
            return
        if not self._adds_only:
            self._put({"kind": "status", "status": status, "time": _now()})
        self._stop.set()
        self._thread.join(self._last_wait)
        self._sender.gives_up = self._thread.is_alive()
        if left := self._sender.left():
            waited = f" within {self._last_wait:g} s" if self._sender.gives_up else ""
            log.warning(
                "the MLflow store %s was not sent%s %s: `harness sync %s` sends that later",
                *(self._sender.name, waited, left, self._folder),
            )
        super().close(status)

    # ---- the thread

    def _work(self) -> None:
        pause = PERIOD
        while not self._stop.is_set():
            pause = PERIOD if self._attempt() else min(2 * pause, LONGEST_PAUSE)
            self._ready.set()
            self._stop.wait(pause)
        self._sender.system_due = 0.0
        self._attempt()

    def _attempt(self) -> bool:
        """Tells whether everything so far is in the store. Whatever a store raises, training goes
        on.
        """
        try:
            self._sender.send_all()
        except Exception as error:
            if isinstance(error, ConfigError):
                self._refusal = error
            if not self._why and not self._sender.gives_up:
                self._why = why(error)
                log.warning(
                    "the MLflow store %s does not take this run's figures (%s): training goes on, "
                    "%s holds them",
                    *(self._sender.name, self._why, self._folder / METRICS),
                )
            return False
        if self._why:
            log.warning("%s answers again: everything was sent", self._sender.name)
        self._why = ""
        return True


def read_description(folder: Path) -> dict[str, Any]:
    """Returns what a run's folder says of it for MLflow. Raises ConfigError."""
    try:
        told = json.loads((folder / TRACKED).read_bytes())
        return {name: told[name] for name in PARTS}
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"{folder} holds no {TRACKED} that can be read: expected the output folder of a run "
            "with tracking.kind=mlflow"
        ) from error


def send(folder: Path, uri: str | None = None) -> str:
    """Sends what a run's folder holds and its store lacks, and says what that was.

    `uri`: in place of the stored one. Raises ConfigError, also for a store that does not answer.
    """
    told = read_description(folder)
    (folder / METRICS).touch()
    place = store_of(folder, uri or told["uri"])
    sender = Sender(folder, place, run_id_in(folder), told, adds_only=False)
    sender.jobs.extend(Outbox(folder).waiting())
    try:
        sender.send_all()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the MLflow store {sender.name} does not answer ({why(error)}); still to be sent: "
            f"{sender.left()}; run it again"
        ) from error
    return f"{sender.figures} figures and {sender.things} files, tables or tags, to {sender.name}"


def why(error: Exception) -> str:
    return clean(" ".join(str(error).split()))[:300] or type(error).__name__


def _now() -> int:
    return int(time.time() * 1000)


def _name(job: Mapping[str, Any]) -> str:
    """Says which job that is."""
    told = job.get("path") or job.get("name") or job.get("status")
    return told or ", ".join(job["tags"] if "tags" in job else job["row"]["values"])


def _png(item: Shown) -> str:
    file = io.BytesIO()
    thumbnail(item.image, 192).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _code(error: Exception) -> str:
    """MLflow's own name of an error; "" for any other."""
    return getattr(error, "error_code", "")


def _batches(entries: list[Any], size: int) -> list[list[Any]]:
    return [entries[start : start + size] for start in range(0, len(entries), size)]
