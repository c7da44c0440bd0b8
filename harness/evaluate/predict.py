"""What the model says to each context, for scores and the image-use gate; batches cut by task and
by context.

A batch of one task -> one Prediction per context, in its order. The image tokens of a batch are
made once, by whoever calls, and handed on. Legend: I images, C contexts, T targets, N bridge rows,
Q queries, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch

from harness.config.schema import DecodingConfig
from harness.evaluate.measures import TASKS
from harness.model.batch import Batch


class ImageTokens(Protocol):
    """What a bridge returns (BridgeOutput)."""

    tokens_NQD: torch.Tensor
    token_row_of_C: torch.Tensor

    def with_rows(self, row_of_C: torch.Tensor) -> ImageTokens: ...
    def without_tokens(self) -> ImageTokens: ...


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the model says to one context, and what the annotators said."""

    dataset: str
    split: str
    key: str
    image_id: str
    text_id: str
    task: str
    prompt: str  # after the template
    question: str | None  # before it
    references: tuple[str, ...]
    answer: str
    p_eos_first: float  # probability of ending before the first word
    meta: dict[str, Any] = field(default_factory=dict)
    ended: bool = True  # false: cut at max_new_tokens
    loss: float = math.nan  # of its truth, nats a target token
    has_picture: bool = True  # false: it is scored, and the image-use gate leaves it out

    def row(self) -> list[Any]:
        """Returns it as JSON takes it."""
        return [getattr(self, name) for name in self.__slots__]

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> Prediction:
        """Returns the prediction that gave this row."""
        said = cls(*row)
        return replace(said, references=tuple(said.references))

    @property
    def picture(self) -> tuple[str, str, str]:
        """Names its image over several sets."""
        return self.dataset, self.split, self.key

    @property
    def set(self) -> str:
        return set_name(self)

    @property
    def id(self) -> tuple[str, str, str]:
        """Unique over several sets: question ids of two data sets may coincide."""
        return self.dataset, self.split, self.text_id


def set_name(of: Any) -> str:
    """Returns DATASET_SPLIT of a record, a prediction or a manifest."""
    return f"{of.dataset}_{of.split}"


def answers(
    model: Any, batch: Batch, decoding: DecodingConfig, tokens: ImageTokens
) -> list[Prediction]:
    """Returns the predictions for a batch of one task."""
    said = model.generate(batch, decoding, tokens)
    eos = getattr(getattr(model, "tokenizer", None), "eos_token_id", None)
    return [
        Prediction(
            dataset=context.record.dataset,
            split=context.record.split,
            key=context.record.key,
            image_id=context.record.image_id,
            text_id=context.text.id,
            task=context.text.task,
            prompt=context.prompt,
            question=context.text.prompt,
            references=context.text.targets,
            answer=text,
            p_eos_first=p_eos,
            meta=context.text.meta,
            ended=len(ids) < decoding.max_new_tokens or eos in ids,
            has_picture=context.record.has_picture,
        )
        for context, text, ids, p_eos in zip(
            batch.contexts, said.texts, said.token_ids, said.p_eos_first_C.tolist(), strict=True
        )
    ]


class Stratum(NamedTuple):
    """Contexts of one set and task: tasks are decoded and scored differently, and images of
    different sets are not exchanged.
    """

    set: str  # DATASET_SPLIT
    task: str


def by_stratum(batch: Batch) -> Iterator[tuple[Stratum, Batch, torch.Tensor]]:
    """Yields (stratum, the batch's contexts of it, their rows in the batch)."""
    strata = [Stratum(set_name(context.record), context.text.task) for context in batch.contexts]
    for stratum in sorted(set(strata)):
        rows = [row for row, found in enumerate(strata) if found == stratum]
        yield stratum, select(batch, rows), torch.tensor(rows)


def select(batch: Batch, rows: Sequence[int]) -> Batch:
    """Returns the batch with these contexts alone, in this order, and their targets; the images
    stay as they are.
    """
    if list(rows) == list(range(len(batch.contexts))):
        return batch
    device = batch.image_of_C.device
    rows_C = torch.tensor(rows, device=device)
    new_row_of_old = torch.full((len(batch.contexts),), -1, device=device)
    new_row_of_old[rows_C] = torch.arange(len(rows), device=device)
    kept_T = (new_row_of_old[batch.context_of_T] >= 0).nonzero()[:, 0]
    kept = {old: new for new, old in enumerate(kept_T.tolist())}
    groups = [
        ([kept[row] for row in group if row in kept], longest) for group, longest in batch.groups
    ]
    chosen = replace(
        batch,
        prompt_ids_CL=batch.prompt_ids_CL[rows_C],
        prompt_mask_CL=batch.prompt_mask_CL[rows_C],
        image_of_C=batch.image_of_C[rows_C],
        labels_TL=batch.labels_TL[kept_T],
        weight_TL=batch.weight_TL[kept_T],
        context_of_T=new_row_of_old[batch.context_of_T[kept_T]],
        contexts=tuple(batch.contexts[row] for row in rows),
        text_ids_T=tuple(batch.text_ids_T[t] for t in kept) if batch.text_ids_T else (),
        groups=tuple(group for group in groups if group[0]),
    )
    return chosen.indexed()  # here, once: whoever asks for its loss does so again and again


def results(predictions: Iterable[Prediction]) -> dict[str, list[dict[str, Any]]]:
    """File name -> its entries in the official results format of VQA or COCO captions, one file a
    set and task.
    """
    by_file: dict[str, list[dict[str, Any]]] = {}
    for p in predictions:
        task = TASKS[p.task]
        entries = task.results([(p.image_id if task.of_images else p.text_id, p.answer)])
        by_file.setdefault(f"{set_name(p)}_{task.files}.json", []).extend(entries)
    return by_file
