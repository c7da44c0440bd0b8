"""Where MLflow keeps its runs: the URI that a config means, what may be told of it, its database
file.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from harness.config.schema import Config


def store_uri(config: Config) -> str:
    """tracking.uri, else MLFLOW_TRACKING_URI, else a database in the output folder."""
    given = config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI")
    return given or f"sqlite:///{(config.out_dir / 'mlflow.db').absolute().as_posix()}"


def without_password(text: str) -> str:
    return re.sub(r"(://[^:/@\s]*):[^@/\s]+@", r"\1:***@", text)


def database(uri: str) -> Path:
    return Path(uri.partition(":///")[2]).absolute()
