"""`harness ui`: MLflow's pages of a run. Arguments -> a server on this machine, or a link."""

from __future__ import annotations

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
    from harness.tracking.tracker import need_mlflow
    from harness.tracking.ui import show_run

    need_mlflow("harness ui")
    show_run(run, port)
