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
from harness.evaluate.predict import (
    ImageTokens,
    Prediction,
    Stratum,
    answers,
    by_stratum,
    select,
)
from harness.machine.dealing import Alone, Work
from harness.model.batch import Batch
from shards.loader import Loader
from shards.manifest import Manifest

_CONDITIONS = ("true", "shuffled")
_METRICS = ("loss_gap_nats", "loss_gap_nats_low", "empty_rate", "p_eos_first", "image_share")


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
    on_gpu = next(model.parameters()).device.type == "cuda"
    collate = Collator.of(config, model.tokenizer, training=False, on_gpu=on_gpu)
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
                (stratum, _one_text_an_image(part))
                for stratum, part, _ in by_stratum(batch)
                if (part.image_of_C >= 0).any()
            ]
    return SmallSet(batches, trained_on(config, manifests))


def _one_text_an_image(batch: Batch) -> Batch:
    first = {image: row for row, image in reversed(list(enumerate(batch.image_of_C.tolist())))}
    return select(batch, sorted(row for image, row in first.items() if image >= 0))


def small_gate(
    model: Any, small: SmallSet, config: Config, epochs: float | None = None
) -> dict[Stratum, ImageUse]:
    """Returns what the exchange shows; greedy answers in place of a beam. The model is left in the
    mode it was in.
    """
    was_training = model.training
    found = Look(model, small, config, epochs, Alone()).uses()
    model.train(was_training)
    return found


class Look:
    """The gates of a small set, kept on every rank, which asks them what it is dealt: the true
    images of a batch, or exchanged ones.
    """

    @torch.no_grad()
    def __init__(
        self, model: Any, small: SmallSet, config: Config, epochs: float | None, dealer: Alone
    ) -> None:
        """Leaves the model in eval mode."""
        model.eval()
        self._dealer = dealer
        self._gates: list[Gate] = []
        self._true: list[tuple[Batch, ImageTokens]] = []
        for stratum, given in small.batches:
            batch = given.to(next(model.parameters()).device)
            decoding = getattr(config.generate, stratum.task).model_copy(update={"beams": 1})
            gate = Gate(
                *(model, stratum.task, decoding, config.evaluation),
                set=stratum.set,
                no_image=False,
                trained_on=small.trained_on,
                epochs=epochs,
            )
            tokens = model.bridge_tokens(batch)
            gate.keep(batch, tokens)
            self._gates.append(gate)
            self._true.append((batch, tokens))

    def work(self) -> Work:
        """Returns what another rank may be dealt."""
        return {"looked": self.looked}

    def uses(self) -> dict[Stratum, ImageUse]:
        """Returns what the exchange shows by set and task; on rank 0."""
        asked = [(number, name) for number in range(len(self._gates)) for name in _CONDITIONS]
        told = dict(zip(asked, self._dealer.dealt("looked", asked, self.looked), strict=True))
        found = {}
        for number, gate in enumerate(self._gates):
            nats_C, weight_C, rows = told[number, "true"]
            gate.note(nats_C, weight_C, [Prediction.of_row(row) for row in rows])
            gate.compare(*told[number, "shuffled"])
            if (use := gate.result(None)) is not None:
                found[Stratum(gate.set, gate.task)] = use
        return found

    @torch.no_grad()
    def looked(self, number: int, condition: str) -> Any:
        """Returns losses and answers of a batch: with weights and whole predictions under its true
        images; None where there are no others.
        """
        gate = self._gates[number]
        if condition == "shuffled":
            row_C = gate.shuffled_rows()
            return (None, None) if row_C is None else gate.asked(0, row_C.tolist())
        batch, tokens = self._true[number]
        sums = sums_per_context(gate.model.loss(batch, tokens), batch)
        said = answers(gate.model, batch, gate.decoding, tokens)
        return [*sums, [prediction.row() for prediction in said]]


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
