"""What a run tells the world: figures by step, files, tables of predictions, facts about code,
machine and data.

In: calls of one process (rank 0) on the training thread, none of which waits. Out:
OUT/metrics.jsonl, always, and with `tracking.kind: mlflow` a run in MLflow.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from harness.config.schema import Config
from harness.errors import ConfigError, install_command
from harness.redact import clean
from harness.report.pictures import Shown
from harness.tracking.journal import Journal, JournalTracker, run_id_in
from harness.tracking.mlflow import MLflowTracker, send
from harness.tracking.store import check_experiment, environment_tags, store_uri

if TYPE_CHECKING:
    from shards.manifest import Manifest

SCHEMES = (
    "sqlite",
    "postgresql",
    "mysql",
    "mssql",
    "http",
    "https",
    "databricks",
    "databricks-uc",
    "uc",
)


class Tracker(Protocol):
    """Where the loop reports to. No method waits for a store; none raises because of one."""

    @property
    def run_id(self) -> str | None: ...  # None: there is no run (yet)

    def metrics(self, values: Mapping[str, float], step: int) -> None: ...
    def history(self, name: str) -> dict[int, float]: ...  # step -> value; {} on other ranks
    def predictions(
        self, items: Sequence[Shown], step: int, folder: str = "answers"
    ) -> Path | None: ...
    def artifact(
        self, path: Path, folder: str = ""
    ) -> None: ...  # must stay as it is until `close`
    def checkpoint(self, path: Path, digest: str, step: int) -> None: ...
    def tags(self, values: Mapping[str, str]) -> None: ...
    def model(self, folder: Path, name: str) -> None: ...  # an export, to be registered
    def describe(self, text: str) -> None: ...  # in Markdown, in place of what was said before
    def close(self, status: str = "FINISHED") -> None: ...  # FINISHED, FAILED or KILLED


def open_tracker(
    config: Config,
    *,
    run_id: str | None = None,
    resume_step: int | None = None,
    facts: Mapping[str, str] | None = None,
    datasets: Sequence[Manifest] = (),
) -> Tracker:
    """Opens the tracker of one process of a job (rank 0). Raises ConfigError where `tracking`
    cannot work; never for a silent store.

    A new run: `run_id` None. A resumed job: the checkpoint's `run_id`, and its step as
    `resume_step`. An evaluation that adds to a run: `run_id` alone; the run's status and
    description stay as they are.
    """
    check_tracking(config)
    adds_only = run_id is not None and resume_step is None
    resumes = resume_step is not None and (run_id is not None or resume_step > 0)
    journal = Journal(config.out_dir, None if adds_only else (resume_step or 0))
    if config.tracking.kind == "none":
        return JournalTracker(config.out_dir, journal)
    limit_mlflow()
    import mlflow  # noqa: F401  seconds; here, on the calling thread, so that a broken installation is seen

    return MLflowTracker(
        config, journal, run_id, resumes=resumes, facts=facts or {}, datasets=datasets
    )


def sync(folder: Path, uri: str | None = None) -> str:
    """Sends what a run's folder holds and its store lacks; says what that was. Raises ConfigError.

    `uri`: in place of the stored one.
    """
    need_mlflow("harness sync")
    return send(folder, uri)


def need_mlflow(who: str) -> None:
    """Sets what mlflow reads from the environment. Raises ConfigError where it is not installed."""
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            f"{who} needs mlflow, which is not installed: {install_command('mlflow')}"
        )
    limit_mlflow()


def limit_mlflow() -> None:
    """Sets what mlflow reads from the environment, unless the user did, and what it logs."""
    # (!) By default one call to a server that does not answer blocks for 246 s. None is repeated
    # by the client: of a run that was made without an answer there would be two.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # a training run calls nobody
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # with its password
    for name in ("alembic", "mlflow.store.db.utils", "mlflow.system_metrics"):
        logging.getLogger(name).setLevel(logging.WARNING)


def check_tracking(config: Config) -> None:
    """Raises ConfigError; to be called before anything is spawned.

    Without mlflow's import for a database, and at most a few seconds for a server.
    """
    if config.tracking.kind == "none":
        if config.tracking.log_model:
            raise ConfigError("tracking.log_model is true, which needs tracking.kind=mlflow")
        return
    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            "tracking.kind is mlflow, which is not installed: give tracking.kind=none, or "
            f"{install_command('mlflow')}"
        )
    scheme = store_uri(config).partition(":")[0].partition("+")[0]
    plugins = {
        point.name for point in importlib.metadata.entry_points(group="mlflow.tracking_store")
    } - {"file-plugin"}
    if scheme not in (*SCHEMES, *plugins):
        key = "tracking.uri" if config.tracking.uri else "MLFLOW_TRACKING_URI"
        found = clean(store_uri(config))
        raise ConfigError(
            f"{key} is {found}, expected a database or a server, such as sqlite:///mlflow.db or "
            "http://HOST"
        )
    environment_tags()
    limit_mlflow()
    check_experiment(config)


def recorded_run_id(config: Config) -> str | None:
    """Returns the run that was begun in the output folder, for a job killed before its first
    checkpoint.
    """
    return run_id_in(config.out_dir)


def ui_command(config: Config) -> str:
    """Returns what to type to see the run in MLflow."""
    program = "harness"
    beside = Path(sys.executable).with_name(program)
    if beside.exists() and not shutil.which(program):  # an environment that is not activated
        program = os.path.relpath(beside) if beside.is_relative_to(Path.cwd()) else str(beside)
    return shlex.join([program, "ui", str(config.out_dir)])
