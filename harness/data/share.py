"""One rank's share of a global batch, collated where its samples are read: by the data workers, or
in the process itself.

samples -> micro-batches with their index lists -> Share. What a worker hands over holds each
picture once, in memory that both processes see: a view of the batches' own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch.utils.data import get_worker_info

from harness.data.collate import Collator
from harness.model.batch import Batch
from shards.read import Sample


@dataclass(frozen=True)
class Share:
    """Samples and the micro-batches made of them; [] where they teach nothing.

    `cut`: the texts that were cut, by kind, for the main process to count. `shown`: the samples
    whose pictures are those of the batches, in their order; () where it is not asked.
    """

    samples: Sequence[Sample] = ()
    batches: Sequence[Batch] = ()
    cut: Sequence[tuple[str, Sequence[str]]] = ()
    shown: Sequence[Sample] = ()

    def pin_memory(self) -> Share:
        """Returns it in memory that a GPU copies from by itself; torch's loader asks for this."""
        return replace(self, batches=[b.mapped(torch.Tensor.pin_memory) for b in self.batches])

    def __reduce__(self) -> Any:
        """Pickles its many small tensors as bytes, and all pictures as one tensor, which torch
        shares between the processes.
        """
        pictures = [images for b in self.batches if (images := _pictures(b)) is not None]
        bare = [replace(b, pixels_IHW3=None, features_IPD=None) for b in self.batches]
        small = [batch.mapped(torch.Tensor.numpy) for batch in bare]
        whole = torch.cat(pictures) if pictures else None
        counts = [batch.images for batch in self.batches]
        return _received, (self.samples, small, self.cut, self.shown, whole, counts)


def _pictures(batch: Batch) -> torch.Tensor | None:
    return batch.features_IPD if batch.pixels_IHW3 is None else batch.pixels_IHW3


def _received(
    samples: Sequence[Sample],
    small: Sequence[Batch],
    cut: Sequence[tuple[str, Sequence[str]]],
    shown: Sequence[Sample],
    whole: torch.Tensor | None,
    counts: Sequence[int],
) -> Share:
    """Returns the share that was pickled; its samples see their pictures again."""
    batches = [batch.mapped(torch.from_numpy) for batch in small]
    if whole is None:  # texts alone
        return Share(samples, batches, cut)
    field_of_images = "pixels_IHW3" if whole.dtype == torch.uint8 else "features_IPD"
    for place, images in enumerate(whole.split(list(counts))):
        if counts[place]:
            fields: dict[str, Any] = {field_of_images: images}
            batches[place] = replace(batches[place], **fields)
    for sample, image in zip(shown, whole.numpy(), strict=True):
        sample.payload = image
    return Share(samples, batches, cut, shown)


@dataclass(frozen=True)
class ShareMaker:
    """A function from this rank's samples to its Share, `micro_batch` images at a time."""

    collate: Collator
    micro_batch: int

    def __call__(self, samples: Sequence[Sample]) -> Share:
        collate = _Noting(**{f.name: getattr(self.collate, f.name) for f in fields(self.collate)})
        batches: list[Batch] = []
        shown: list[Sample] = []
        for start in range(0, len(samples), self.micro_batch):
            part = samples[start : start + self.micro_batch]
            if batch := collate(part):
                batches.append(batch.indexed())
                shown += [s for s in part if s.payload is not None and s.weight]
        if get_worker_info() is None or len(shown) != sum(batch.images for batch in batches):
            return Share(samples, batches, collate.cut)
        for sample in shown:
            sample.payload = None  # it travels in its batch
        return Share(samples, batches, collate.cut, shown)


@dataclass(frozen=True)
class _Noting(Collator):
    """A collator that leaves it to others to count and to tell what was cut."""

    cut: list[tuple[str, Sequence[str]]] = field(default_factory=list, compare=False)

    def note_cut(self, kind: str, texts: Sequence[str]) -> None:
        self.cut.append((kind, texts))
