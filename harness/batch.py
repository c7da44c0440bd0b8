"""Records -> Batch: three levels, each pointing at the one above, so that a picture's work is done once.

    images    I   pixels_IHW3 or features_IPD         encoder and plain Q-Former run once per image
    contexts  C   prompt_ids_CL, image_of_C           the T5 encoder runs once per (image, prompt)
    targets   T   labels_TL, weight_TL, context_of_T  the decoder runs once per target

Legend: I images, C contexts, T targets, P patches, D width, L tokens, H W pixels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from harness.config import Data as DataConfig
from harness.config import Prompts
from harness.prompts import prompt
from shards.read import Sample
from shards.record import Record, Text


@dataclass(frozen=True, eq=False)  # compared and hashed by identity: a record holds dictionaries
class Context:
    """Where a row of the context level comes from."""

    record: Record
    text: Text
    prompt: str  # after the template


@dataclass(frozen=True)
class Batch:
    """Tensors of one micro-batch. Exactly one of `pixels_IHW3` and `features_IPD` is there.

    `weight_TL` is 0 on padding and on everything that must not count: a filler, a sample that could not be read. Its
    other values carry the EOS weight and the annotator weight. The loss is sum(weight x cross entropy) / sum(weight).
    """

    prompt_ids_CL: torch.Tensor  # int64, padded on the right
    prompt_mask_CL: torch.Tensor  # bool
    image_of_C: torch.Tensor  # int64 in [0, I)
    labels_TL: torch.Tensor  # int64, pad id on padding
    weight_TL: torch.Tensor  # float32
    context_of_T: torch.Tensor  # int64 in [0, C)
    pixels_IHW3: torch.Tensor | None = None  # uint8; normalised on the device
    features_IPD: torch.Tensor | None = None  # float16
    contexts: tuple[Context, ...] = ()  # C of them, for evaluation
    text_ids_T: tuple[str, ...] = ()

    @property
    def images(self) -> int:
        return len(self.pixels_IHW3 if self.pixels_IHW3 is not None else self.features_IPD)

    @property
    def weight(self) -> torch.Tensor:
        return self.weight_TL.sum()

    def to(self, device: torch.device | str) -> Batch:
        moved = {
            f.name: value.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved)


def drawn(seed: int, epoch: int, *names: str) -> int:
    """A random 64-bit number that depends on nothing but its arguments: no generator's state to save or to lose."""
    key = "\x1f".join((str(seed), str(epoch), *names))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def most_common(answers: Sequence[str]) -> str:
    """The answer most annotators gave; of equals the first in their order."""
    return Counter(answer for answer in answers if answer.strip()).most_common(1)[0][0]


@dataclass(frozen=True)
class Collator:
    """Samples (decoded: uint8 HxWx3, or float16 PxD) -> Batch; which texts and answers are drawn is a hash.

    In training `texts_per_image` texts are drawn of each image and epoch: a question is one, each caption is one. In
    evaluation every question is a context with its most common answer as target, and all captions are targets.
    """

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    prompts: Prompts
    seed: int = 0
    eos_weight: float = 1.0
    training: bool = True

    def __call__(self, samples: Sequence[Sample], epoch: int = 0) -> Batch | None:
        """None where no sample carries anything to learn (all could not be read, or are fillers)."""
        images, contexts, image_of_C, targets, context_of_T = [], [], [], [], []
        for sample in samples:
            if sample.record is None or sample.payload is None or sample.weight == 0:
                continue
            for text, chosen in self._texts(sample.record, epoch):
                context_of_T += [len(contexts)] * len(chosen)
                contexts.append(Context(sample.record, text, prompt(text.task, self._template(text), text.prompt)))
                image_of_C.append(len(images))
                targets += chosen
            images.append(sample.payload)
        if not targets:
            return None
        pixels = np.stack(images)
        return self.assemble(pixels, contexts, image_of_C, targets, context_of_T)

    def filler(self, payload_shape: Sequence[int], is_features: bool) -> Batch:
        """A batch of weight 0 for a rank that has nothing left: it takes part in every collective and teaches nothing."""
        record = Record("filler", "", "", "", (Text("filler", "caption", ("",)),))
        payload = np.zeros((1, *payload_shape), np.float16 if is_features else np.uint8)
        batch = self.assemble(payload, [Context(record, record.texts[0], "")], [0], [""], [0])
        return replace(batch, weight_TL=torch.zeros_like(batch.weight_TL))

    def _template(self, text: Text) -> str:
        return getattr(self.prompts, text.task)

    def _texts(self, record: Record, epoch: int) -> list[tuple[Text, list[str]]]:
        units = [
            (text, index)
            for text in record.texts
            for index in (range(len(text.targets)) if text.task == "caption" else (None,))
        ]
        if self.training and self.data.texts_per_image is not None:
            units.sort(key=lambda u: drawn(self.seed, epoch, record.dataset, u[0].id, f"text {u[1]}"))
            units = units[: self.data.texts_per_image]
            order = {id(text): i for i, text in enumerate(record.texts)}
            units.sort(key=lambda u: (order[id(u[0])], u[1] or 0))
        chosen: dict[str, tuple[Text, list[str]]] = {}
        for text, index in units:
            target = text.targets[index] if index is not None else self._answer(record, text, epoch)
            chosen.setdefault(text.id, (text, []))[1].append(target)
        return list(chosen.values())

    def _answer(self, record: Record, text: Text, epoch: int) -> str:
        if self.training and self.data.answer == "drawn":
            answers = [answer for answer in text.targets if answer.strip()]
            return answers[drawn(self.seed, epoch, record.dataset, text.id, "answer") % len(answers)]
        return most_common(text.targets)

    def assemble(self, images, contexts, image_of_C, targets, context_of_T) -> Batch:
        """The tensors of given rows: arrays of images, Contexts, and texts with what they point at."""
        prompts = self._ids([c.prompt for c in contexts], self.data.max_prompt_tokens)
        prompts = [ids if c.prompt else [] for c, ids in zip(contexts, prompts, strict=True)]
        labels = self._ids(targets, self.data.max_target_tokens)
        prompt_ids_CL, lengths_C = _padded(prompts, self.tokenizer.pad_token_id)
        labels_TL, lengths_T = _padded(labels, self.tokenizer.pad_token_id)
        weight_TL = (torch.arange(labels_TL.shape[1]) < lengths_T[:, None]).float()
        if self.eos_weight != 1.0:
            weight_TL[labels_TL == self.tokenizer.eos_token_id] *= self.eos_weight
        tensor = torch.from_numpy(np.asarray(images))
        return Batch(
            prompt_ids_CL=prompt_ids_CL,
            prompt_mask_CL=torch.arange(prompt_ids_CL.shape[1]) < lengths_C[:, None],
            image_of_C=torch.tensor(image_of_C),
            labels_TL=labels_TL,
            weight_TL=weight_TL,
            context_of_T=torch.tensor(context_of_T),
            pixels_IHW3=tensor if tensor.dtype == torch.uint8 else None,
            features_IPD=tensor if tensor.dtype != torch.uint8 else None,
            contexts=tuple(contexts),
            text_ids_T=tuple(contexts[c].text.id for c in context_of_T),
        )

    def _ids(self, texts: list[str], limit: int) -> list[list[int]]:
        """Token ids that end in EOS also where a text is cut."""
        rows = self.tokenizer([text.strip() for text in texts], add_special_tokens=False)["input_ids"]
        return [[*row[: limit - 1], self.tokenizer.eos_token_id] for row in rows]


def _padded(rows: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    # At least one column: a model with neither image tokens nor prompt still needs a position to attend to.
    out = torch.full((len(rows), max(1, int(lengths.max()))), pad)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.tensor(row, dtype=torch.long)
    return out, lengths
