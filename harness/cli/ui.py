"""`harness ui`: MLflow's pages of a run. Arguments -> a server on this machine, or a link."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer


def ui(
    run: Annotated[Path, typer.Argument(help="The folder of a run or of an ablation.")],
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Without: 5000, or one that is free.")
    ] = None,
) -> None:
    """Opens a run in MLflow: its curves, answers, config and verdict.

    Starts MLflow's server on 127.0.0.1 until Ctrl-C. Of a run whose store is a server, prints the
    link.
    """
    from harness.errors import ConfigError, install_command

    if importlib.util.find_spec("mlflow") is None:
        raise ConfigError(
            f"harness ui needs mlflow, which is not installed: {install_command('mlflow')}"
        )
    from harness.tracking.tracker import limit_mlflow
    from harness.tracking.ui import show_run

    limit_mlflow()
    show_run(run, port)
