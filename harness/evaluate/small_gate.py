"""The image-use gate on a few dev images, between the evaluations of a run: falling losses alone do
not tell.

A model in training -> ImageUse by task. The batches are read and made once; each look costs two
losses and two answers for every context, under the true and under another image.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from contextlib import closing
from typing import Any, NamedTuple

import torch

from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.images import reading
from harness.evaluate.floor import trained_on
from harness.evaluate.image_use import Gate, ImageUse, sums_per_context
from harness.evaluate.predict import answers, by_task, select
from harness.model.batch import Batch
from shards.loader import Loader

_METRICS = ("loss_gap_nats", "loss_gap_nats_low", "empty_rate", "p_eos_first")


class SmallSet(NamedTuple):
    """What is looked at again and again: a batch for each task, and which images the model is
    trained on too.
    """

    batches: Sequence[tuple[str, Batch]]
    trained_on: Container[tuple[str, str, str]]


def small_set(model: Any, config: Config) -> SmallSet:
    """Returns `evaluation.small_gate_images` dev images, one text of each task and image; the same
    for every run.

    Raises ShardError.
    """
    settings, data = config.evaluation, config.data
    loader = Loader(
        [dataset.path for dataset in data.dev],
        global_batch=settings.small_gate_images,
        seed=0,  # not the run's
        **reading(config) | {"workers": 0},  # one batch
    )
    with closing(loader.iterate(epochs=1)) as steps:
        samples = next(steps)[1]
    batch = Collator.of(config, model.tokenizer, training=False)(samples)
    parts = by_task(batch) if batch is not None else ()
    return SmallSet(
        [(task, _one_text_an_image(part)) for task, part, _ in parts],
        trained_on(config, loader.manifests),
    )


def _one_text_an_image(batch: Batch) -> Batch:
    first = {image: row for row, image in reversed(list(enumerate(batch.image_of_C.tolist())))}
    return select(batch, sorted(first.values()))


@torch.no_grad()
def small_gate(
    model: Any, small: SmallSet, config: Config, epochs: float | None = None
) -> dict[str, ImageUse]:
    """Returns the verdicts; greedy answers in place of a beam. The model is left in the mode it was
    in.
    """
    was_training, found = model.training, {}
    model.eval()
    for task, batch in small.batches:
        batch = batch.to(next(model.parameters()).device)
        decoding = getattr(config.generate, task).model_copy(update={"beams": 1})
        gate = Gate(
            *(model, task, decoding, config.evaluation),
            no_image=False,
            trained_on=small.trained_on,
            epochs=epochs,
        )
        tokens = model.bridge_tokens(batch)
        sums = sums_per_context(model.loss(batch, tokens), batch)
        gate.add(batch, tokens, *sums, answers(model, batch, decoding, tokens))
        if (use := gate.result()) is not None:
            found[task] = use
    model.train(was_training)
    return found


def small_gate_metrics(uses: Mapping[str, ImageUse]) -> dict[str, float]:
    """Returns the few figures to watch; with several tasks each name starts with its task."""
    values: dict[str, float] = {}
    for task, use in uses.items():
        known = use.to_dict() | {"image_used": float(use.verdict == "image used")}
        names = (*_METRICS, f"true_{use.measure}", f"shuffled_{use.measure}", "image_used")
        prefix = f"{task}/" if len(uses) > 1 else ""
        values |= {prefix + name: known[name] for name in names if known[name] is not None}
    return values
