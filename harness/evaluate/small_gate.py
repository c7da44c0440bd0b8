"""The exchange of images on a few dev images, between the evaluations of a run: falling losses
alone do not tell.

A model in training -> ImageUse by set and task. The batches are read and made once; each look costs
two losses and two answers for every context, under the true and under another image. An exchange
alone is no proof of use, so that the best it can say is `exchange noticed`.
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
from harness.evaluate.image_use.evidence import EXCHANGE_NOTICED, ImageUse
from harness.evaluate.image_use.gate import Gate, sums_per_context
from harness.evaluate.predict import Stratum, answers, by_stratum, select
from harness.model.batch import Batch
from shards.loader import Loader
from shards.manifest import Manifest

_METRICS = ("loss_gap_nats", "loss_gap_nats_low", "empty_rate", "p_eos_first")


class SmallSet(NamedTuple):
    """What is looked at again and again: a batch for each set and task, and which images the model
    is trained on too.
    """

    batches: Sequence[tuple[Stratum, Batch]]
    trained_on: Container[tuple[str, str, str]]


def small_set(model: Any, config: Config) -> SmallSet:
    """Returns `evaluation.small_gate_images` dev images of each set, one text of each task and
    image; the same for every run.

    Raises ShardError.
    """
    collate = Collator.of(config, model.tokenizer, training=False)
    batches: list[tuple[Stratum, Batch]] = []
    manifests: list[Manifest] = []
    for dataset in config.data.dev:
        loader = Loader(
            [dataset.path],
            global_batch=config.evaluation.small_gate_images,
            seed=0,  # not the run's
            **reading(config) | {"workers": 0},  # one batch
        )
        with closing(loader.iterate(epochs=1)) as steps:
            samples = next(steps)[1]
        manifests += loader.manifests
        if (batch := collate(samples)) is not None:
            batches += [
                (stratum, _one_text_an_image(part)) for stratum, part, _ in by_stratum(batch)
            ]
    return SmallSet(batches, trained_on(config, manifests))


def _one_text_an_image(batch: Batch) -> Batch:
    first = {image: row for row, image in reversed(list(enumerate(batch.image_of_C.tolist())))}
    return select(batch, sorted(first.values()))


@torch.no_grad()
def small_gate(
    model: Any, small: SmallSet, config: Config, epochs: float | None = None
) -> dict[Stratum, ImageUse]:
    """Returns what the exchange shows; greedy answers in place of a beam. The model is left in the
    mode it was in.
    """
    was_training, found = model.training, {}
    model.eval()
    for stratum, batch in small.batches:
        batch = batch.to(next(model.parameters()).device)
        decoding = getattr(config.generate, stratum.task).model_copy(update={"beams": 1})
        gate = Gate(
            *(model, stratum.task, decoding, config.evaluation),
            set=stratum.set,
            no_image=False,
            trained_on=small.trained_on,
            epochs=epochs,
        )
        tokens = model.bridge_tokens(batch)
        sums = sums_per_context(model.loss(batch, tokens), batch)
        gate.add(batch, tokens, *sums, answers(model, batch, decoding, tokens))
        gate.measure()
        if (use := gate.result(None)) is not None:
            found[stratum] = use
    model.train(was_training)
    return found


def small_gate_metrics(uses: Mapping[Stratum, ImageUse]) -> dict[str, float]:
    """Returns the few figures to watch; with several tasks each name starts with its task, with
    several sets of a task also with the set.
    """
    values: dict[str, float] = {}
    tasks = [stratum.task for stratum in uses]
    for stratum, use in uses.items():
        noticed = float(use.verdict == EXCHANGE_NOTICED)
        known = use.to_dict() | {"exchange_noticed": noticed}
        names = (*_METRICS, f"true_{use.measure}", f"shuffled_{use.measure}", "exchange_noticed")
        prefix = f"{stratum.task}/" if len(set(tasks)) > 1 else ""
        if tasks.count(stratum.task) > 1:
            prefix += f"{stratum.set}/"
        values |= {prefix + name: known[name] for name in names if known[name] is not None}
    return values
