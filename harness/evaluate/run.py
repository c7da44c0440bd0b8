"""Scores a model on sets of shards, and says whether its answers come from the images.

A model and paths of sets -> Evaluation (in training, on the dev sets); a run's folder -> its newest
checkpoint scored on the test sets, with predictions in the official formats and scores.json in
RUN/evaluation and in MLflow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harness.config.schema import Config, EvaluationConfig
from harness.data.collate import Collator
from harness.data.features import CONTROLS, control_pixels, load_controls
from harness.data.images import reading
from harness.evaluate import captions, vqa
from harness.evaluate.bootstrap import Interval
from harness.evaluate.floor import Majority, trained_on
from harness.evaluate.image_use import Gate, sums_per_context
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import Prediction, answers, by_task
from harness.evaluate.results import Evaluation, TaskResult
from harness.model.batch import Batch
from harness.report.pictures import Shown
from shards.loader import Loader
from shards.manifest import Manifest
from shards.read import Sample

_ORDER = {"seed": 0, "window_shards": 8}  # not the run's own: all are judged on the same subset


Progress = Callable[[int, int], None]  # (images done, images in all)


@torch.no_grad()
def evaluate_model(
    model: Any,
    paths: Sequence[str],
    config: Config,
    *,
    limit: int | None = None,
    counterfactual_texts: int | None = None,
    majority: Majority | None = None,
    text_only_accuracy: float | None = None,
    progress: Progress | None = None,
    quarantine: Path | None = None,
    epochs: float | None = None,
    decode: Callable[[Sample], Any] | None = None,
    collate: Collator | None = None,
    controls_of: Callable[[Any, Batch, Manifest], dict[str, Any]] | None = None,
) -> Evaluation:
    """Scores `model` on sets of one kind in `paths`, images or features; leaves it in eval mode.

    `limit`: so many images, the first of a seeded order that no config changes; the gate takes
    the first `counterfactual_texts` texts of each task in it, none: as many as the config says.
    `epochs`: how often the model saw its training set, none: unknown. `decode`, `collate` and
    `controls_of` read images otherwise (published.py). One process does it all. Raises
    ShardError.
    """
    settings = config.evaluation
    if counterfactual_texts is None:
        counterfactual_texts = settings.counterfactual_texts
    loader = _loader(paths, config, quarantine, decode)
    as_trained = None if collate else Collator.of(config, model.tokenizer)
    collate = collate or Collator.of(config, model.tokenizer, training=False)
    known = trained_on(config, loader.manifests)
    collected = _Pass(model, config, counterfactual_texts, known, epochs)
    evaluation = collected.evaluation
    images = min(loader.samples, limit or loader.samples)
    model.eval()
    for samples, in_gate in _chunks(loader, images, counterfactual_texts, settings.batch_images):
        collected.note_places(samples)
        if (batch := collate(samples)) is not None:
            batch = batch.to(next(model.parameters()).device)
            if in_gate and collected.controls is None:
                make = controls_of or control_tokens
                collected.controls = make(model, batch, loader.manifests[0])
            collected.add(batch, in_gate, partial(as_trained, samples) if as_trained else None)
            _show(evaluation, batch, samples, settings.show_images)
        if progress:
            progress(evaluation.images, images)
    evaluation.unreadable = loader.unreadable
    for task in evaluation.tasks:
        collected.score(task, majority, text_only_accuracy)
    return evaluation


def _loader(
    paths: Sequence[str],
    config: Config,
    quarantine: Path | None,
    decode: Callable[[Sample], Any] | None,
) -> Loader:
    return Loader(
        list(paths),
        global_batch=config.evaluation.batch_images,
        quarantine=quarantine,
        max_unreadable=config.data.max_unreadable,  # a score of the rest would be another set's
        **reading(config) | _ORDER | ({"decode": decode} if decode else {}),
    )


@dataclass
class _Pass:
    """What one pass over the sets collects: predictions, losses, and the gate's evidence."""

    model: Any
    config: Config
    gate_texts: int
    trained_on: Container[tuple[str, str, str]]
    epochs: float | None
    controls: dict[str, Any] | None = None
    evaluation: Evaluation = field(default_factory=Evaluation)
    gates: dict[str, Gate] = field(default_factory=dict)
    place: dict[tuple[str, str, str], tuple[int, int]] = field(default_factory=dict)

    def note_places(self, samples: Sequence[Sample]) -> None:
        """Counts images, and remembers where in its set each stands: predictions are written in
        that order.
        """
        self.evaluation.images += len(samples)
        for s in samples:
            assert s.record is not None  # _chunks leaves out what could not be read
            place = (s.set_index, s.index)
            self.place[s.record.dataset, s.record.split, s.record.key] = place

    def add(
        self, batch: Batch, in_gate: bool, training_batch: Callable[[], Batch | None] | None
    ) -> None:
        """Answers and losses of a batch, by task; with `in_gate` also the counterfactuals."""
        tokens = self.model.bridge_tokens(batch)
        for task, part, rows in by_task(batch):
            decoding = getattr(self.config.generate, task)
            part_tokens = tokens.with_rows(tokens.token_row_of_C[rows.to(batch.image_of_C.device)])
            sums = sums_per_context(self.model.loss(part, part_tokens), part)
            said = answers(self.model, part, decoding, part_tokens)
            result = self.evaluation.tasks.setdefault(task, TaskResult(task))
            result.predictions += said
            result.nats += sums.nats_C.sum()
            result.weight += sums.weight_C.sum()
            if not in_gate:
                continue
            if task not in self.gates:
                self.gates[task] = Gate(
                    *(self.model, task, decoding, self.config.evaluation, self.controls or {}),
                    trained_on=self.trained_on,
                    epochs=self.epochs,
                    training_batch=training_batch,
                )
            if self.gates[task].texts < self.gate_texts:
                self.gates[task].add(part, part_tokens, *sums, said)

    def score(self, task: str, majority: Majority | None, text_only_accuracy: float | None) -> None:
        """Fills in a task's scores, floors and verdict, once all its predictions are there."""
        settings = self.config.evaluation
        result = self.evaluation.tasks[task]
        result.predictions.sort(key=lambda p: self.place[p.dataset, p.split, p.key])
        if TASKS[task].has_right:
            scored = score_vqa(result.predictions, settings)
            result.intervals = {"accuracy": scored.pop("overall")}
            result.groups = scored
            result.majority_accuracy = majority.accuracy(result.predictions) if majority else None
            result.text_only_accuracy = text_only_accuracy
        else:
            result.intervals = score_captions(result.predictions, settings)
        if task in self.gates:
            result.image_use = self.gates[task].result()


def _chunks(
    loader: Loader, images: int, gate_texts: int, size: int
) -> Iterator[tuple[list[Sample], bool]]:
    """Yields (readable samples, are they the gate's?), until `images` are reached. The gate's come
    `size` at a time, two or more: those of a rare task in a mixed set wait for each other, since
    images are exchanged within a batch.
    """
    size = max(2, size)
    left = images
    waiting: list[Sample] = []
    seen: Counter[str] = Counter()
    with closing(loader.iterate(epochs=1)) as batches:
        for _, samples in batches:
            others: list[Sample] = []
            for sample in [s for s in samples if s.weight and s.record is not None][:left]:
                left -= 1
                tasks = [text.task for text in sample.known.texts]
                wanted = any(seen[task] < gate_texts for task in tasks)
                (waiting if wanted else others).append(sample)
                seen.update(tasks if wanted else ())
            while len(waiting) >= size or (waiting and not left):
                yield waiting[:size], True
                del waiting[:size]
            if others:
                yield others, False
            if not left:
                return
    if waiting:
        yield waiting, True


def control_tokens(model: Any, like: Batch, manifest: Manifest) -> dict[str, torch.Tensor]:
    """Image tokens (N, Q, D) of a blank and of noise images: from the feature set, or the same as
    pixels.

    A feature set made elsewhere, without controls, has none: its `blank` and `noise` figures are
    missing. So are those of a bridge that reads the question, whose tokens are of one context each.
    """
    if getattr(model, "question_aware", False):
        return {}
    if like.pixels_IHW3 is not None:
        name = "pixels_IHW3"
        made = control_pixels(like.pixels_IHW3.shape[1:])
    elif any(file.name == CONTROLS for file in manifest.files):
        stored = load_controls(manifest)
        name = "features_IPD"
        made = {"blank": stored["blank_PD"][None], "noise": stored["noise_KPD"]}
    else:
        return {}
    found = {}
    for condition, images in made.items():
        field: Any = {name: torch.from_numpy(images).to(like.image_of_C.device)}
        found[condition] = model.bridge_tokens(replace(like, **field)).tokens_NQD
    return found


def score_vqa(predictions: Sequence[Prediction], settings: EvaluationConfig) -> dict[str, Any]:
    """Returns the official accuracies over all sets given, as `vqa.intervals` has them."""
    said = {"/".join(p.id): p.answer for p in predictions}
    truths = [
        vqa.VQATruth(
            question_id="/".join(p.id),
            answers=p.references,
            answer_type=_group(p.meta.get("answer_type")),
            question_type=_group(p.meta.get("question_type")),
            image_id="/".join((p.dataset, p.split, p.key)),
        )
        for p in predictions
    ]
    return vqa.intervals(vqa.graded(said, truths), settings.confidence, settings.bootstrap)


def _group(name: Any) -> str | None:
    """Returns the name of a group of questions, which a set made elsewhere may give as anything."""
    return None if name is None else str(name)


def score_captions(
    predictions: Sequence[Prediction], settings: EvaluationConfig
) -> dict[str, Interval]:
    """Returns BLEU, ROUGE-L and CIDEr-D, with the document frequencies of all sets given."""
    said = {"/".join(p.id): p.answer for p in predictions}
    scores = captions.score(said, {"/".join(p.id): p.references for p in predictions})
    return scores.with_intervals(settings.confidence, settings.bootstrap)


def _show(evaluation: Evaluation, batch: Batch, samples: Iterable[Sample], wanted: int) -> None:
    pixels = {sample.known.key: sample.payload for sample in samples}
    by_id = {
        p.id: p
        for result in evaluation.tasks.values()
        for p in result.predictions[-len(batch.contexts) :]
    }
    for context in batch.contexts:
        record = context.record
        if len(evaluation.shown) >= wanted or any(p.key == record.key for p in evaluation.shown):
            continue
        prediction = by_id[record.dataset, record.split, context.text.id]
        picture = pixels[record.key] if batch.pixels_IHW3 is not None else None
        right = (
            vqa.accuracy(prediction.answer, prediction.references) >= 0.5
            if TASKS[prediction.task].has_right
            else None
        )
        evaluation.shown.append(prediction)
        evaluation.shown_images.append(
            Shown(
                image=None if picture is None else Image.fromarray(np.asarray(picture)),
                prompt=prediction.prompt,
                references=prediction.references,
                prediction=prediction.answer,
                right=right,
            )
        )
