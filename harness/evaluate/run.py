"""Scores a model on sets of shards, and says whether its answers come from the images.

A model and paths of sets -> Evaluation (in training, on the dev sets); a run's folder -> its newest
checkpoint scored on the test sets, with predictions in the official formats and scores.json in
RUN/evaluation and in MLflow.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
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
from harness.data.images import ImageDecoder, reading
from harness.evaluate.beside import add_beside
from harness.evaluate.collected import Collected, Picture, most_texts
from harness.evaluate.floor import Majority, trained_on
from harness.evaluate.judging import add_verdicts, exchange
from harness.evaluate.measures import is_right
from harness.evaluate.passes import Passes
from harness.evaluate.predict import Prediction
from harness.evaluate.results import Evaluation
from harness.evaluate.scores import add_scores
from harness.evaluate.space import UnmeasuredError
from harness.machine.dealing import Alone, Item, Progress
from harness.model.batch import Batch
from harness.report.pictures import Shown
from shards.files import ShardError, UnreachableError
from shards.loader import Loader
from shards.manifest import Manifest
from shards.origin import pictures_of
from shards.read import Sample

_ORDER = {"seed": 0, "window_shards": 8}  # not the run's own: all are judged on the same subset


@torch.no_grad()
def evaluate_model(
    model: Any,
    paths: Sequence[str],
    config: Config,
    *,
    majority: Majority | None = None,
    text_only_accuracy: float | None = None,
    floors: bool = True,
    dealer: Alone | None = None,
    **asked: Any,
) -> Evaluation | None:
    """Scores `model` on sets of one kind in `paths`, images or features; leaves it in eval mode.

    `floors`: whether the verdict rests on floors and recall too, and figures stand beside it;
    `dealer`: the ranks that share the work, all of which call this, with the same model: rank 0
    gets the evaluation, the others None; a first stage is scored by rank 0 alone, by retrieval.
    `asked`: as for `passes_of` and `collect`. Raises ShardError, and StoppedError where a rank was
    asked to stop, on all ranks.
    """
    limit = asked.pop("limit", None)
    progress = asked.pop("progress", None)
    dealer = dealer or Alone()

    if config.train.objective:
        quarantine = asked.get("quarantine")
        retrieved = partial(_retrieved, model, paths, config, limit, progress, quarantine)
        return dealer.lead(retrieved, dict, (ShardError, UnreachableError))

    def scored() -> Evaluation:
        collected = collect(ready(), limit, progress)
        add_scores(collected, majority, text_only_accuracy)
        exchange(collected)
        add_verdicts(collected, floors=floors)
        if floors:
            add_beside(collected)
        return collected.evaluation

    def ready() -> Passes:
        passes = passes_of(model, paths, config, dealer=dealer, floors=floors, **asked)
        return closes.enter_context(closing(passes))

    with ExitStack() as closes:
        errors = (ShardError, UnreachableError, UnmeasuredError)
        return dealer.lead(scored, lambda: ready().work(), errors)


def _retrieved(
    model: Any,
    paths: Sequence[str],
    config: Config,
    limit: int | None,
    progress: Progress | None,
    quarantine: Path | None,
) -> Evaluation:
    from harness.evaluate.retrieval import retrieval

    decode = reading(config)["decode"]
    loaders = _loaders(paths, config, quarantine, decode)
    collate = Collator.of(config, model.tokenizer, training=False)
    found = retrieval(model, loaders, collate, config.evaluation, limit, progress)
    found.pixels = _pixels_of([loader.manifests[0] for loader in loaders], decode)
    return found


def passes_of(
    model: Any,
    paths: Sequence[str],
    config: Config,
    *,
    counterfactual_texts: int | None = None,
    quarantine: Path | None = None,
    epochs: float | None = None,
    floors: bool = True,
    dealer: Alone | None = None,
    decode: Callable[[Sample], Any] | None = None,
    collate: Callable[[Sequence[Sample]], Batch | None] | None = None,
    controls_of: Callable[[Any, Batch, Manifest], dict[str, Any]] | None = None,
) -> Passes:
    """Returns what this rank needs to do its part, with nothing collected yet.

    `counterfactual_texts`: texts of each set and task for the gate, none: as the config says.
    `epochs`: how often the model saw its training set, none: unknown. `decode`, `collate` and
    `controls_of` read images otherwise (published.py). Raises ShardError.
    """
    if counterfactual_texts is None:
        counterfactual_texts = config.evaluation.counterfactual_texts
    dealer = dealer or Alone()
    decode = decode or reading(config)["decode"]
    loaders = _loaders(paths, config, None if dealer.rank else quarantine, decode)
    manifests = [loader.manifests[0] for loader in loaders]
    as_trained = None
    if collate is None:
        on_gpu = model.device.type == "cuda"
        as_trained = Collator.of(config, model.tokenizer, on_gpu=on_gpu)
        collate = Collator.of(config, model.tokenizer, training=False, on_gpu=on_gpu)
    known = () if dealer.rank else trained_on(config, manifests)
    collected = Collected(
        *(model, config, counterfactual_texts, known, epochs, manifests, decode),
        pools=floors,
        dealer=dealer,
    )
    collected.evaluation.pixels = _pixels_of(manifests, decode)
    model.eval()
    return Passes(collected, loaders, collate, as_trained, controls_of or control_tokens)


def _pixels_of(manifests: Sequence[Manifest], decode: Callable[[Sample], Any]) -> str | None:
    """Returns how the pixels were made: the decoder's word, of features their encoder's own words;
    None where there is no picture or none is decoded.
    """
    shown = [manifest for manifest in manifests if manifest.has_pictures]
    if not shown or not isinstance(decode, ImageDecoder):
        return None
    if shown[0].kind == "features":
        return (shown[0].encoder or {}).get("preprocessing")
    return decode.pixels


@torch.no_grad()
def collect(passes: Passes, limit: int | None, progress: Progress | None) -> Collected:
    """Returns what the model says to every text, the gates' texts apart; on rank 0, which has the
    others do their part.

    `limit`: so many images of each set, the first of a seeded order that no config changes. Raises
    ShardError.
    """
    collected = passes.collected
    collected.progress = progress
    loaders = passes.loaders
    evaluation = collected.evaluation
    images = sum(min(loader.samples, limit or loader.samples) for loader in loaders)
    for told in _rounds(passes, limit):
        items = [item for item, _ in told]
        answers = collected.dealer.dealt("answered", items, passes.answered)
        for (item, in_gate), answered in zip(told, answers, strict=True):
            if answered is not None:
                _note(passes, item, in_gate, answered)
        if progress:
            progress(evaluation.images + evaluation.without_picture, images)
    evaluation.unreadable = sum(loader.unreadable for loader in loaders)
    _show_originals(collected)
    return collected


def _note(passes: Passes, item: Item, in_gate: bool, answered: Mapping[str, Any]) -> None:
    """Notes what was answered to a batch, which every rank keeps for the gate if it is the
    gate's.
    """
    collected = passes.collected
    taken = collected.dealer.everywhere("keep", item, passes.keep) if in_gate else {}
    is_shown = len(collected.evaluation.shown) < collected.config.evaluation.show_images
    samples = passes.samples(*item) if in_gate or is_shown else []
    said = collected.note(answered, taken, passes.training_batch(samples))
    _show(collected, said, samples)


def _rounds(passes: Passes, limit: int | None) -> Iterator[list[tuple[Item, bool]]]:
    """Has each rank read a batch, and yields what is to be answered of them: the number of the set,
    of the batch, and how many of its images; and whether it is the gates'. Ends where `limit`
    images of each set are reached.
    """
    collected = passes.collected
    dealer = collected.dealer
    for number, loader in enumerate(passes.loaders):
        left = min(loader.samples, limit or loader.samples)
        seen: Counter[str] = Counter()
        places = range(loader.steps_per_epoch)
        for start in places[:: dealer.world_size]:
            if not left:
                break
            items = [(number, place) for place in places[start : start + dealer.world_size]]
            told: list[tuple[Item, bool]] = []
            for item, notes in zip(items, dealer.dealt("read", items, passes.read), strict=True):
                if not left:
                    continue  # it was read in vain
                loader.account([Sample(None, None, "", 0, n, error=why) for _, n, why, _ in notes])
                readable = [note for note in notes if note[0] is not None][:left]
                left -= len(readable)
                alone = sum(not note[3] for note in readable)
                collected.note_places(number, {tuple(note[0]): note[1] for note in readable}, alone)
                tasks = [task for note in readable for task in note[3]]
                texts = collected.gate_texts
                in_gate = any(seen[task] < most_texts(task, texts) for task in tasks)
                seen.update(tasks)
                told.append(((*item, len(readable)), in_gate))
            yield told


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
    kinds = {
        loader.manifests[0].kind: path
        for loader, path in zip(loaders, paths, strict=True)
        if loader.has_pictures
    }
    if len(kinds) > 1:
        told = ", ".join(f"{path} holds {kind}" for kind, path in kinds.items())
        raise ShardError(f"sets of one kind can be scored together: {told}")
    return loaders


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


def _show(collected: Collected, said: Sequence[Prediction], samples: Sequence[Sample]) -> None:
    """Shows the first text of each picture, until there are enough."""
    evaluation = collected.evaluation
    shown = [manifest for manifest in collected.manifests if manifest.has_pictures]
    has_pixels = any(manifest.kind == "images" for manifest in shown)
    by_id = {prediction.id: prediction for prediction in said}
    for sample in samples:
        record = sample.known
        if len(evaluation.shown) >= collected.config.evaluation.show_images:
            return
        ids = [(record.dataset, record.split, text.id) for text in record.texts]
        prediction = next((by_id[known] for known in ids if known in by_id), None)
        if prediction is None or any(p.key == record.key for p in evaluation.shown):
            continue
        picture = sample.payload if has_pixels else None
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
