"""`tracking.log_model`: a run that has ended -> its export in OUT/export -> a model in MLflow."""

from __future__ import annotations

import sys
from pathlib import Path

from harness.config.schema import Config
from harness.errors import explain
from harness.redact import say
from harness.tracking.tracker import open_tracker, recorded_run_id

FOLDER = "export"


def log_model(config: Config, last: Path) -> None:
    """Exports the checkpoint `last` and hands it to the tracker; on the main process alone.

    What goes wrong is said and ends nothing: the run has done its work.
    """
    from harness.export.export import export

    out = config.out_dir / FOLDER
    try:
        export(last, out)
        tracker = open_tracker(config, run_id=recorded_run_id(config))
        tracker.model(out, config.name)
        tracker.close()
    except Exception as error:
        sentence = explain(error) or f"{type(error).__name__}: {error}"
        say(f"tracking.log_model: no model goes to MLflow: {sentence}", sys.stderr)
