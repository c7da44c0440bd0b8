"""The optimizer step of BLIP-2's first stage, whose contrast is over the whole global batch.

micro-batches -> embeddings without a graph, of all ranks -> their gradients -> the micro-batches
once more, with a graph: the same loss for any micro-batch and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import distributed

from harness.data.collate import drawn
from harness.data.share import Share
from harness.model.batch import Batch
from harness.model.first_stage import refuse_no_captions
from harness.train.engine import Engine
from harness.train.state import StepResult
from harness.train.step import StepTaker
from shards.files import UnreachableError
from shards.stream import StreamState


class FirstStageSteps(StepTaker):
    """The maker of a first stage's steps; the loss of each objective goes to the tracker too."""

    def take(self, stream: StreamState, share: Share | UnreachableError) -> StepResult:
        result = super().take(stream, share)
        run = self.run
        if run.state.step % run.config.train.log_every == 0:
            names = [f"{name}_loss" for name in run.config.train.objective or ()]
            values = run.engine.sum(self._parts.tolist())
            run.track("train", dict(zip(names, values, strict=True)))
        return result

    def _gradients(self, batches: Sequence[Batch], weight: torch.Tensor) -> torch.Tensor:
        run = self.run
        model: Any = run.model
        engine = run.engine
        here = list(self.transfer.arriving(batches))
        embedded = []
        for index, batch in enumerate(here):
            self._draw_dropout(index)
            embedded.append(model.embedded(batch))
        numbers = [pictures_of(batch) for batch in batches]
        portions = model.portions(
            embedded,
            [of_images.to(engine.device) for of_images, _ in numbers],
            [of_texts.to(engine.device) for _, of_texts in numbers],
            weight,
            gather=partial(gathered_rows, engine=engine),
            ranks=engine.world_size,
        )
        self._parts = torch.zeros((), device=engine.device)
        for index, (batch, portion) in enumerate(zip(here, portions, strict=True)):
            self._draw_dropout(index)
            with engine.micro_step(last=index == len(here) - 1):
                loss = run.wrapped(batch, portion)
                engine.backward(loss.sum)
            self._parts = self._parts + loss.sum_T
        return self._parts.sum()

    def _draw_dropout(self, index: int) -> None:
        """Has both passes of a micro-batch drop the same."""
        names = f"rank {self.run.engine.rank}", f"micro-batch {index}"
        torch.manual_seed(drawn(self.run.config.seed, self.run.state.step, *names) >> 1)


def pictures_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns a number for the picture of each image and of each caption, the same for one that is
    there twice and on any rank; none of a filler. Raises ConfigError for what is no caption of a
    picture.
    """
    refuse_no_captions(batch)
    number_I = torch.zeros(batch.images, dtype=torch.long)
    for context, image in zip(batch.contexts, batch.image_of_C.tolist(), strict=True):
        record = context.record
        number_I[image] = drawn(0, 0, record.dataset, record.split, record.key) >> 1
    if batch.weight == 0:
        return number_I[:0], number_I[:0]
    return number_I, number_I[batch.image_of_C[batch.context_of_T]]


def gathered_rows(rows: torch.Tensor, engine: Engine) -> torch.Tensor:
    """Returns the rows of all ranks, by rank; those of this one with their graph."""
    if engine.world_size == 1:
        return rows
    counts = torch.zeros(engine.world_size, dtype=torch.long, device=rows.device)
    counts[engine.rank] = len(rows)
    with engine.heart.waiting():
        distributed.all_reduce(counts)
        padded = rows.new_zeros(int(counts.max()), *rows.shape[1:])
        padded[: len(rows)] = rows.detach()
        received = [torch.empty_like(padded) for _ in counts]
        distributed.all_gather(received, padded)
    received = [part[:count] for part, count in zip(received, counts.tolist(), strict=True)]
    received[engine.rank] = rows
    return torch.cat(received)
