"""What merging changed in answers and scores, measured on the contexts of the proof.

The run's answers and the merged model's to the same contexts -> both scores, and how many answers
differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from harness.config.schema import Config, EvaluationConfig
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import Prediction
from harness.evaluate.scores import score_captions, score_vqa
from harness.evaluate.told import with_bounds
from harness.export.proof import Measured, Proof


@dataclass(frozen=True)
class Effect:
    """Scores by task as {"CIDEr": ..., "CIDEr_low": ..., "CIDEr_high": ..., "texts": ...}."""

    run: Mapping[str, Mapping[str, Any]]
    export: Mapping[str, Mapping[str, Any]]
    changed: int  # answers
    contexts: int
    source: str

    @classmethod
    def of(cls, own: Measured, proof: Proof, config: Config) -> Effect:
        """Returns how the export's answers differ from the run's, and what both score."""
        settings = config.evaluation
        return cls(
            run=_scores(own.answers, settings),
            export=_scores(proof.answers, settings),
            changed=proof.contexts - proof.same_answers,
            contexts=proof.contexts,
            source=proof.source,
        )

    def lines(self) -> list[str]:
        """Returns what is told to whoever merges."""
        told = [f"merging changed {self.changed} of {self.contexts} answers"]
        for task, figures in self.export.items():
            before = _words(task, self.run[task])
            told.append(f"{task}: {_words(task, figures)} merged, {before} as trained")
        return told

    def of_the_export(self) -> list[str]:
        """Returns what is true of the merged model alone, for its card."""
        told = [f"{self.changed} of {self.contexts} answers are not those of the unmerged model"]
        for task, figures in self.export.items():
            told.append(
                f"{task}: {_words(task, figures)} on {figures['texts']} contexts of "
                f"{self.source}; no floor was measured beside it"
            )
        return told


def _words(task: str, figures: Mapping[str, Any]) -> str:
    name = TASKS[task].measure
    bounds = (figures[name], figures[f"{name}_low"], figures[f"{name}_high"])
    return f"{name} {with_bounds(*bounds, digits=1 if name == 'accuracy' else 3)}"


def _scores(
    predictions: Sequence[Prediction], settings: EvaluationConfig
) -> dict[str, dict[str, Any]]:
    """Returns the score of each task that occurs, with its interval."""
    found = {}
    for task, known in TASKS.items():
        own = [prediction for prediction in predictions if prediction.task == task]
        if not own:
            continue
        if known.has_right:
            interval = score_vqa(own, settings)["overall"]
        else:
            interval = score_captions(own, settings)[known.measure]
        found[task] = {**interval.flat(known.measure), "texts": len(own)}
    return found
