"""Where MLflow keeps a run, and under which names: a config, and mlflow's environment variables.

A key of the config that is given wins over the environment, the environment over defaults.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path
from urllib.parse import quote, unquote

from packaging.version import Version

from harness.config.schema import Config
from harness.errors import ConfigError
from harness.redact import MASK, clean, remember

TRAINING = "?workflowType=machine_learning"  # else the pages are those for chats with LLMs
ARTIFACTS = "mlartifacts"  # beside a database
# Where mlflow's tables say where such a file is (mlflow 3.17).
PLACES = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
QUICK_SECONDS = 5.0  # that a check before the start waits for a server


def store_uri(config: Config) -> str:
    """tracking.uri, else MLFLOW_TRACKING_URI, else a database in the output folder. Raises
    ConfigError for one that was stored without its secret.
    """
    return store_of(config.out_dir, config.tracking.uri)


def store_of(folder: Path, given: str | None) -> str:
    """Returns the URI of the store of a run in `folder`: the given one, else as `store_uri`."""
    return whole_uri(given) or default_store(folder)


def whole_uri(given: str | None) -> str | None:
    """Returns a store's URI with its secrets: `given`, else MLFLOW_TRACKING_URI; None without both.

    One that was stored masked is completed by the environment. Raises ConfigError where that
    does not say how.
    """
    environment = os.environ.get("MLFLOW_TRACKING_URI")
    uri = given or environment
    if given and MASK in given:
        bare = given.replace(f"//{MASK}@", "//")
        login = ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")  # mlflow's client reads them
        uri = environment
        if not uri and MASK not in bare and any(map(os.environ.get, login)):
            uri = bare
        if not uri:
            raise ConfigError(
                f"tracking.uri was stored without its secret ({given}): set MLFLOW_TRACKING_URI, "
                "or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or give tracking.uri=URI"
            )
    remember([uri])
    return uri


def default_store(out: Path) -> str:
    """Returns the URI of the database in an output folder, whatever characters its path has."""
    path = (out / "mlflow.db").absolute().as_posix()
    if not re.search("[?]|%[0-9A-Fa-f]{2}", path):
        return f"sqlite:///{path}"
    # The driver is named: of a plain sqlite:/// mlflow makes the folders as they stand there.
    if Version(importlib.metadata.version("sqlalchemy")) >= Version("2.1"):  # it decodes paths
        return f"sqlite+pysqlite:///{quote(path)}"
    return f"sqlite+pysqlite:///file:{quote(path)}?uri=true"  # SQLite itself decodes them


def follow_move(uri: str, folder: Path) -> None:
    """Has the database in an output folder name the files beside it, where both were moved: mlflow
    stores absolute places. Raises sqlite3.Error for a database that cannot be written.
    """
    if uri != default_store(folder) or not database(uri).is_file():
        return
    artifacts = (folder / ARTIFACTS).absolute()
    if not artifacts.is_dir():  # they were left behind
        return
    now = artifacts.as_uri()
    ours = f"SELECT artifact_location FROM experiments WHERE artifact_location LIKE '%/{ARTIFACTS}'"
    with closing(sqlite3.connect(database(uri))) as store, store:
        for (before,) in store.execute(ours).fetchall():
            for table, column in PLACES if before != now else ():
                store.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?)"
                    f" WHERE substr({column} || '/', 1, ?) = ?",
                    (now, len(before) + 1, len(before) + 1, f"{before}/"),
                )


def database(uri: str) -> Path:
    """Returns the file of an SQLite store."""
    from sqlalchemy.engine import make_url  # comes with mlflow

    path = make_url(uri).database or ""
    return Path(unquote(path[5:]) if path.startswith("file:") else path).absolute()


def experiment_name(config: Config) -> str:
    return config.tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "harness"


def run_name(config: Config) -> str:
    return config.tracking.run_name or os.environ.get("MLFLOW_RUN_NAME") or config.name


def environment_tags() -> dict[str, str]:
    """Returns the run's tags in MLFLOW_TAGS. Raises ConfigError for anything but a JSON object."""
    text = os.environ.get("MLFLOW_TAGS") or "{}"
    try:
        tags = json.loads(text)
    except (ValueError, RecursionError):
        tags = None
    if not isinstance(tags, dict):
        raise ConfigError(
            f'MLFLOW_TAGS is {text!r}, expected a JSON object such as {{"team": "vision"}}'
        )
    return {key: v if isinstance(v, str) else json.dumps(v) for key, v in tags.items()}


def check_experiment(config: Config) -> None:
    """Raises ConfigError for an experiment that was deleted, as far as its store answers quickly.

    A database file is read without mlflow. A store that is silent says it later, or never: a run
    does not need it.
    """
    uri = store_uri(config)
    name = experiment_name(config)
    if uri.startswith("sqlite"):
        file = database(uri)
        if not file.exists():
            return
        query = "SELECT experiment_id, lifecycle_stage FROM experiments WHERE name = ?"
        found = None
        with (
            suppress(sqlite3.Error),
            closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as store,
        ):
            found = store.execute(query, (name,)).fetchone()
        if found:
            refuse_deleted(uri, name, *found)
    elif os.environ.get("RANK", "0") == "0":
        answer: list[tuple[str, str]] = []
        thread = threading.Thread(target=_ask_server, args=(uri, name, answer), daemon=True)
        thread.start()
        thread.join(QUICK_SECONDS)
        for place, stage in answer:
            refuse_deleted(uri, name, place, stage)


def _ask_server(uri: str, name: str, answer: list[tuple[str, str]]) -> None:
    with suppress(Exception):  # every kind of store has exceptions of its own
        from mlflow import MlflowClient

        if found := MlflowClient(uri).get_experiment_by_name(name):
            answer.append((found.experiment_id, found.lifecycle_stage))


def refuse_deleted(uri: str, name: str, place: str | int, stage: str) -> None:
    """Raises ConfigError for an experiment, whose id is `place`, that is not active."""
    if stage != "active":
        raise ConfigError(
            f"tracking.experiment is {name!r}, which was deleted in {clean(uri)}: give another "
            "tracking.experiment=NAME, or restore it by `mlflow experiments restore "
            f"--experiment-id {place}` with MLFLOW_TRACKING_URI set to that store"
        )


def runs_page(experiment: str) -> str:
    """Returns where the server's pages show the training runs of an experiment (mlflow 3.17)."""
    return f"/#/experiments/{experiment}/runs{TRAINING}"


def run_page(experiment: str, run_id: str) -> str:
    return f"/#/experiments/{experiment}/runs/{run_id}{TRAINING}"
