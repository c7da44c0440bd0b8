"""Where MLflow keeps its runs: the URI that a config means, and its database file."""

from __future__ import annotations

import os
from pathlib import Path

from harness.config.schema import Config
from harness.errors import ConfigError
from harness.redact import MASK, remember


def store_uri(config: Config) -> str:
    """tracking.uri, else MLFLOW_TRACKING_URI, else a database in the output folder. Raises
    ConfigError for one that was stored without its secret.
    """
    return whole_uri(config.tracking.uri) or f"sqlite:///{default_database(config.out_dir)}"


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


def default_database(out: Path) -> str:
    return (out / "mlflow.db").absolute().as_posix()


def database(uri: str) -> Path:
    return Path(uri.partition(":///")[2]).absolute()
