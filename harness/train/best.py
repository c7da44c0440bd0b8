"""The best checkpoint by a figure of the dev sets, and when a run has stopped getting better.

Both follow from the journal alone, so that a resumed run decides as the uninterrupted one does.
"""

from __future__ import annotations

from collections.abc import Mapping

from harness import checkpoint as checkpoints
from harness.errors import ConfigError
from harness.train.state import Run

LOWER_IS_BETTER = ("loss", "empty_rate")


def is_better(metric: str, new: float, old: float) -> bool:
    """Tells whether a figure is better: losses and the rate of empty answers the lower, all others
    the higher.
    """
    if metric.rpartition("/")[2] in LOWER_IS_BETTER:
        return new < old
    return new > old


class Best:
    """What `train.keep_best` and `train.early_stop` ask for; on the main process."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.metric = run.config.train.keep_best

    def is_new(self, figures: Mapping[str, float]) -> bool:
        """Tells whether this step is the best so far. Raises ConfigError for an unknown figure."""
        if self.metric is None:
            return False
        self._check("keep_best", self.metric, figures)
        return _best(self.metric, self.run.tracker.history(self.metric)) == self.run.state.step

    def point(self) -> None:
        """Makes best.json name the best step whose checkpoint is there."""
        if self.metric is None or not self.run.engine.is_main:
            return
        out = self.run.config.out_dir
        history = self.run.tracker.history(self.metric)
        step = _best(self.metric, history)
        if step is not None and checkpoints.place(out, step).is_dir():
            checkpoints.point_to_best(out, step, self.metric, history[step])

    def has_stopped(self, figures: Mapping[str, float] | None = None) -> str:
        """Says why the run should end by `train.early_stop`; "" where it should go on.

        `figures` of the evaluation that was just made. Raises ConfigError for an unknown figure.
        """
        asked = self.run.config.train.early_stop
        if asked.metric is None:
            return ""
        if figures is not None:
            self._check("early_stop.metric", asked.metric, figures)
        history = self.run.tracker.history(asked.metric)
        best = _best(asked.metric, history)
        if best is None:
            return ""
        since = sum(step > best for step in history)
        if since < asked.patience:
            return ""
        return (
            f"train.early_stop: {asked.metric} was best after step {best} "
            f"({history[best]:.4g}) and not in the {since} evaluations since"
        )

    def _check(self, key: str, metric: str, figures: Mapping[str, float]) -> None:
        names = [f"dev/{name}" for name in figures]
        if metric not in names:
            raise ConfigError(
                f"train.{key}: found {metric!r}, the evaluation gives {', '.join(names)}"
            )


def _best(metric: str, history: Mapping[int, float]) -> int | None:
    """Returns the step of the best figure, the first of equal ones; None where there is none."""
    best: int | None = None
    for step, value in sorted(history.items()):
        if value == value and (best is None or is_better(metric, value, history[best])):
            best = step
    return best
