"""What a training's time went into, and what therefore limits its speed, in words.

Shares of the time, as train/clock.py measures them -> a verdict and a line, for the log, MLflow and
the report alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

DATA_BOUND = 0.2  # of the time of steps, waiting included: with readers ahead it is nearly 0
EVALUATION_BOUND = 0.5  # of all time

ADVICE = {
    "data-bound": "more data.workers, or features made once (harness shards features), would help",
    "compute-bound": "",
    "evaluation-bound": "fewer evaluation.dev_images or a larger train.evaluate_every would help",
}


@dataclass(frozen=True)
class Shares:
    """Shares of a training's time that add up to 1; saving and set-up are left out."""

    share_waiting: float  # for data: reading, decoding, collating that steps had to wait for
    share_computing: float  # in steps
    share_evaluating: float

    @classmethod
    def of(cls, spent: Mapping[Any, float]) -> Shares | None:
        """Returns those of the seconds that `Clock.spent` has; None before the first step."""
        parts = [spent[phase] for phase in ("data", "step", "evaluation")]
        return cls(*(part / sum(parts) for part in parts)) if spent["step"] else None

    @classmethod
    def among(cls, figures: Mapping[str, float]) -> Shares | None:
        """Returns those of logged figures, None where they are not all there."""
        names = cls.__dataclass_fields__
        if not names.keys() <= figures.keys():
            return None
        return cls(**{name: figures[name] for name in names})

    def figures(self) -> dict[str, float]:
        return asdict(self)

    @property
    def bound(self) -> str:
        """Returns what limits the speed: a key of ADVICE."""
        if self.share_evaluating > EVALUATION_BOUND:
            return "evaluation-bound"
        in_steps = max(self.share_waiting + self.share_computing, 1e-9)
        return "data-bound" if self.share_waiting / in_steps > DATA_BOUND else "compute-bound"

    def lines(self) -> list[str]:
        """Returns the verdict with what it stands on, and what would help where something would."""
        told = (
            f"{self.bound}: {self.share_computing:.0%} of the time in steps, "
            f"{self.share_waiting:.0%} waiting for data, {self.share_evaluating:.0%} evaluating"
        )
        return list(filter(None, (told, ADVICE[self.bound])))
