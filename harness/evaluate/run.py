"""Scores a model on sets of shards, and says whether its answers come from the images.

A model and paths of sets -> Evaluation (in training, on the dev sets); a run's folder -> its newest
checkpoint scored on the test sets, with predictions in the official formats and scores.json in
RUN/evaluation and in MLflow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.features import CONTROLS, control_pixels, load_controls
from harness.data.images import reading
from harness.evaluate.beside import add_beside
from harness.evaluate.collected import Collected, Picture, gate_tasks, most_texts
from harness.evaluate.floor import Majority, trained_on
from harness.evaluate.judging import add_verdicts, exchange
from harness.evaluate.measures import is_right
from harness.evaluate.results import Evaluation
from harness.evaluate.scores import add_scores
from harness.model.batch import Batch
from harness.report.pictures import Shown
from shards.files import ShardError
from shards.loader import Loader
from shards.manifest import Manifest
from shards.origin import pictures_of
from shards.read import Sample

_ORDER = {"seed": 0, "window_shards": 8}  # not the run's own: all are judged on the same subset


Progress = Callable[[int, int], None]  # (images done, images in all)


@torch.no_grad()
def evaluate_model(
    model: Any,
    paths: Sequence[str],
    config: Config,
    *,
    majority: Majority | None = None,
    text_only_accuracy: float | None = None,
    floors: bool = True,
    **asked: Any,
) -> Evaluation:
    """Scores `model` on sets of one kind in `paths`, images or features; leaves it in eval mode.

    `floors`: whether the verdict rests on floors and recall too, and figures stand beside it;
    `asked`: as for `collect`. One process does it all. Raises ShardError.
    """
    collected = collect(model, paths, config, **asked)
    add_scores(collected, majority, text_only_accuracy)
    exchange(collected)
    add_verdicts(collected, floors=floors)
    if floors:
        add_beside(collected)
    return collected.evaluation


@torch.no_grad()
def collect(
    model: Any,
    paths: Sequence[str],
    config: Config,
    *,
    limit: int | None = None,
    counterfactual_texts: int | None = None,
    progress: Progress | None = None,
    quarantine: Path | None = None,
    epochs: float | None = None,
    decode: Callable[[Sample], Any] | None = None,
    collate: Callable[[Sequence[Sample]], Batch | None] | None = None,
    controls_of: Callable[[Any, Batch, Manifest], dict[str, Any]] | None = None,
) -> Collected:
    """Returns what the model says to every text, the gates' texts apart.

    `limit`: so many images of each set, the first of a seeded order that no config changes;
    `counterfactual_texts`: texts of each set and task for the gate, none: as the config says.
    `epochs`: how often the model saw its training set, none: unknown. `decode`, `collate` and
    `controls_of` read images otherwise (published.py). Raises ShardError.
    """
    if counterfactual_texts is None:
        counterfactual_texts = config.evaluation.counterfactual_texts
    decode = decode or reading(config)["decode"]
    loaders = _loaders(paths, config, quarantine, decode)
    manifests = [loader.manifests[0] for loader in loaders]
    as_trained = None if collate else Collator.of(config, model.tokenizer)
    collate = collate or Collator.of(config, model.tokenizer, training=False)
    known = trained_on(config, manifests)
    collected = Collected(model, config, counterfactual_texts, known, epochs, manifests, decode)
    evaluation = collected.evaluation
    images = sum(min(loader.samples, limit or loader.samples) for loader in loaders)
    model.eval()
    for number, samples, in_gate in _chunks(loaders, limit, counterfactual_texts):
        collected.note_places(number, samples)
        if (batch := collate(samples)) is not None:
            batch = batch.to(next(model.parameters()).device)
            if in_gate and collected.controls is None:
                collected.controls = (controls_of or control_tokens)(model, batch, manifests[0])
            collected.add(batch, in_gate, partial(as_trained, samples) if as_trained else None)
            _show(evaluation, batch, samples, config.evaluation.show_images)
        if progress:
            progress(evaluation.images, images)
    evaluation.unreadable = sum(loader.unreadable for loader in loaders)
    _show_originals(collected)
    return collected


def _loaders(
    paths: Sequence[str],
    config: Config,
    quarantine: Path | None,
    decode: Callable[[Sample], Any],
) -> list[Loader]:
    """Returns a loader for each set: so many images of each are read, however large the others.

    Raises ShardError, also for sets of two kinds.
    """
    given = reading(config) | _ORDER | {"decode": decode}
    loaders = [
        Loader(
            [path],
            global_batch=max(2, config.evaluation.batch_images),
            quarantine=quarantine,
            # a score of the rest would be another set's
            max_unreadable=config.data.max_unreadable,
            **given,
        )
        for path in paths
    ]
    kinds = {loader.manifests[0].kind: path for loader, path in zip(loaders, paths, strict=True)}
    if len(kinds) > 1:
        told = ", ".join(f"{path} holds {kind}" for kind, path in kinds.items())
        raise ShardError(f"sets of one kind can be scored together: {told}")
    return loaders


def _chunks(
    loaders: Sequence[Loader], limit: int | None, gate_texts: int
) -> Iterator[tuple[int, list[Sample], bool]]:
    """Yields (number of the set, readable samples, are they the gate's?), until `limit` images of
    each set are reached.
    """
    for number, loader in enumerate(loaders):
        left = min(loader.samples, limit or loader.samples)
        seen: Counter[str] = Counter()
        with closing(loader.iterate(epochs=1)) as batches:
            for _, samples in batches:
                readable = [s for s in samples if s.weight and s.record is not None][:left]
                left -= len(readable)
                tasks = [task for sample in readable for task in gate_tasks(sample.known)]
                in_gate = any(seen[task] < most_texts(task, gate_texts) for task in tasks)
                seen.update(tasks)
                if readable:
                    yield number, readable, in_gate
                if not left:
                    break


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


def _show_originals(collected: Collected) -> None:
    """Puts the pictures that features were made from into what is shown; what is gone stays grey,
    which the log says.
    """
    evaluation = collected.evaluation
    originals: dict[Picture, bytes | None] = {}
    for number, index_of in collected.by_set(p.picture for p in evaluation.shown).items():
        manifest = collected.manifests[number]
        if manifest.kind == "features":
            originals |= zip(index_of, pictures_of(manifest, index_of.values()), strict=True)
    evaluation.shown_images = [
        replace(item, image=originals.get(prediction.picture, item.image))
        for prediction, item in zip(evaluation.shown, evaluation.shown_images, strict=True)
    ]


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
        right = is_right(prediction.task, prediction.answer, prediction.references)
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
