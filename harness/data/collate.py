"""Records -> Batch: three levels, each pointing at the one above, so that a picture's work is done
once.

    images    I   pixels_IHW3 or features_IPD         encoder and plain Q-Former run once per image
    contexts  C   prompt_ids_CL, image_of_C           the T5 encoder runs once per (image, prompt)
    targets   T   labels_TL, weight_TL, context_of_T  the decoder runs once per target

A context of a record without a picture points at no image: -1. Legend: I images, C contexts, T
targets, P patches, D width, L tokens, H W pixels.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from harness.config.schema import Config, DataConfig, PromptsConfig
from harness.data.prompts import prompt
from harness.model.batch import Batch, Context, padding_id
from harness.model.compiled import PROMPT_MULTIPLE
from harness.model.language.wording import Wording
from shards.files import ShardError
from shards.read import Sample
from shards.record import Record, Text

logger = logging.getLogger(__name__)

# positions; to run the decoder once more costs about as much as so many of padding
MIN_PADDING_SAVED = 256
# Reckoned, not measured: forward and backward pass launch about 150 kernels of 5 us a layer, 0.75
# ms, in which a GPU at 25 to 125 TFLOP/s learns from 600 to 8,500 positions of padding (4 FLOPs a
# frozen parameter: 2.8 million of a layer of Flan-T5-small, 8.3 of base).
MIN_PADDING_SAVED_ON_GPU = 2048


def drawn(seed: int, epoch: int, *names: str) -> int:
    """Returns a 64-bit number, drawn as if at random for these arguments and always the same for
    them: there is no generator whose state a checkpoint would have to keep.

    `names` say what is drawn and for which text; the hash, blake2b, does not differ from machine to
    machine or from one version of Python to another.
    """
    key = "\x1f".join((str(seed), str(epoch), *names))
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")


def most_common(answers: Sequence[str]) -> str:
    """Returns the answer that most annotators gave, blank ones aside; among answers given equally
    often the one that was given first.
    """
    return Counter(answer for answer in answers if answer.strip()).most_common(1)[0][0]


@dataclass(frozen=True)
class Collator:
    """A function from samples (decoded: uint8 HxWx3, or float16 PxD) to a Batch; which texts and
    answers are drawn is a hash.

    In training `texts_per_image` texts are drawn of each image and epoch (of its own set: a heavy
    set of a mixture passes several times): a question is one, each caption is one. In evaluation
    every question is a context with its most common answer as target, and all captions are targets.
    `loss_weights`: what a target of each set weighs against another's; (): all weigh alike.
    `truncated` counts the "prompt" and "target" texts that were cut at `max_prompt_tokens` and
    `max_target_tokens`; the first of each is logged.
    """

    tokenizer: PreTrainedTokenizerBase
    data: DataConfig
    prompts: PromptsConfig
    seed: int = 0
    eos_weight: float = 1.0
    training: bool = True
    loss_on_padding: bool = False  # a known mistake
    bos_in_training: bool = True  # False is another
    packs: bool = False  # as a batch's
    loss_weights: tuple[float, ...] = ()
    truncated: Counter[str] = field(default_factory=Counter, compare=False)
    prompt_multiple: int = 1  # prompts are padded to a multiple of it
    on_gpu: bool = False  # where the batches go: by it `group_by_length` groups

    @classmethod
    def of(
        cls,
        config: Config,
        tokenizer: PreTrainedTokenizerBase,
        training: bool = True,
        *,
        on_gpu: bool = False,
    ) -> Collator:
        """Returns the collator that a config asks for."""
        return cls(
            tokenizer,
            config.data,
            config.prompts,
            config.seed,
            config.train.eos_loss_weight if training else 1.0,
            training,
            config.known_mistakes.loss_on_padding,
            config.known_mistakes.bos == "always",
            not config.model.lm.has_encoder,
            prompt_multiple=PROMPT_MULTIPLE if training and config.train.compile else 1,
            on_gpu=on_gpu,
        )

    def __call__(self, samples: Sequence[Sample]) -> Batch | None:
        """Returns None where no sample carries anything to learn: none could be read, or all are
        fillers.
        """
        images: list[np.ndarray] = []
        rows: list[tuple[Context, int, list[str]]] = []  # of C: where, of which image, its targets
        factors: list[float] = []  # of T
        for sample in samples:
            if sample.record is None or sample.weight == 0:
                continue
            place = len(images) if sample.record.has_picture else -1
            for text, chosen in self.drawn_texts(sample.record, sample.epoch):
                words = prompt(text.task, getattr(self.prompts, text.task), text.prompt)
                rows.append((Context(sample.record, text, words), place, chosen))
                if self.loss_weights:
                    factors += [self.loss_weights[sample.set_index]] * len(chosen)
            if sample.record.has_picture:
                images.append(sample.payload)
        if not rows:
            return None
        batch = self.assemble(
            np.stack(images) if images else None,
            [context for context, _, _ in rows],
            [image for _, image, _ in rows],
            [target for _, _, chosen in rows for target in chosen],
            [place for place, (_, _, chosen) in enumerate(rows) for _ in chosen],
        )
        if not factors:
            return batch
        return replace(batch, weight_TL=batch.weight_TL * torch.tensor(factors)[:, None])

    def asked(self, samples: Sequence[Sample]) -> Batch:
        """Returns the batch of all texts of these samples, answered or not, which were all read:
        for a model to answer. It has one target of weight 0 for each.
        """
        images = [sample.payload for sample in samples if sample.known.has_picture]
        places = iter(range(len(images)))
        rows = [
            (place, sample.known, text)
            for sample in samples
            for place in [next(places) if sample.known.has_picture else -1]
            for text in sample.known.texts
        ]
        contexts = [
            Context(record, text, prompt(text.task, getattr(self.prompts, text.task), text.prompt))
            for _, record, text in rows
        ]
        batch = self.assemble(
            np.stack(images) if images else None,
            contexts,
            [image for image, _, _ in rows],
            [""] * len(rows),
            list(range(len(rows))),
        )
        return replace(batch, weight_TL=torch.zeros_like(batch.weight_TL))

    def filler(self, payload_shape: Sequence[int], is_features: bool) -> Batch:
        """Returns a batch of weight 0 for a rank that has nothing left: it joins every collective
        and teaches nothing.
        """
        record = Record("filler", "", "", "", (Text("filler", "caption", ("",)),))
        payload = np.zeros((1, *payload_shape), np.float16 if is_features else np.uint8)
        batch = self.assemble(payload, [Context(record, record.texts[0], "")], [0], [""], [0])
        return replace(batch, weight_TL=torch.zeros_like(batch.weight_TL))

    def drawn_texts(self, record: Record, epoch: int) -> list[tuple[Text, list[str]]]:
        """Returns the texts that are drawn, in the record's order, each with its drawn targets."""
        units = [
            (place, target)
            for place, text in enumerate(record.texts)
            for target in (range(len(text.targets)) if text.task == "caption" else (-1,))
        ]
        names = [(record.dataset, record.key, text.id) for text in record.texts]
        if self.training and self.data.texts_per_image is not None:
            units.sort(key=lambda unit: drawn(self.seed, epoch, *names[unit[0]], f"text {unit[1]}"))
            units = sorted(units[: self.data.texts_per_image])
        chosen: dict[int, list[str]] = {}
        for place, target in units:
            text = record.texts[place]
            if not text.targets:
                raise ShardError(f"{record.key}: its question {text.id} has no answer to learn")
            if target >= 0:
                words = text.targets[target]
            elif self.training and self.data.answer == "drawn":
                answers = [answer for answer in text.targets if answer.strip()]
                words = answers[drawn(self.seed, epoch, *names[place], "answer") % len(answers)]
            else:
                words = most_common(text.targets)
            chosen.setdefault(place, []).append(words)
        return [(record.texts[place], targets) for place, targets in chosen.items()]

    def assemble(
        self,
        images: np.ndarray | None,
        contexts: list[Context],
        image_of_C: list[int],
        targets: list[str],
        context_of_T: list[int],
    ) -> Batch:
        """Returns the tensors of given rows: images (None: no context has one), contexts and target
        texts, with the rows that they point at.
        """
        data = self.data
        eos = self.tokenizer.eos_token_id
        pad = padding_id(self.tokenizer)
        words = [context.prompt.strip() for context in contexts]
        prompts = self.wording.prompts(words, data.max_prompt_tokens)
        behind_T = [bool(words[context]) for context in context_of_T]
        spoken = [target.strip() for target in targets]
        labels = self.wording.answers(spoken, behind_T, data.max_target_tokens)
        for kind, made in (("prompt", prompts), ("target", labels)):
            if made.cut:
                self.note_cut(kind, made.cut)
        prompt_ids_CL = _padded(prompts.ids, pad, multiple=self.prompt_multiple)
        least = data.max_target_tokens if self.loss_on_padding else 1
        labels_TL = _padded(labels.ids, pad, least)
        counts_TL = _not_padding(labels.ids, labels_TL) | self.loss_on_padding
        weight_TL = counts_TL * torch.where(labels_TL == eos, self.eos_weight, 1.0)
        tensor = None if images is None else torch.from_numpy(images)
        is_pixels = tensor is not None and tensor.dtype == torch.uint8
        return Batch(
            prompt_ids_CL=prompt_ids_CL,
            prompt_mask_CL=_not_padding(prompts.ids, prompt_ids_CL),
            image_of_C=torch.tensor(image_of_C),
            labels_TL=labels_TL,
            weight_TL=weight_TL,
            context_of_T=torch.tensor(context_of_T),
            pixels_IHW3=tensor if is_pixels else None,
            features_IPD=None if is_pixels else tensor,
            contexts=tuple(contexts),
            text_ids_T=tuple(contexts[c].text.id for c in context_of_T),
            packs=self.packs,
            begins=self.bos_in_training and self.wording.begins is not None,
            groups=group_by_length(counts_TL.sum(dim=1).tolist(), self.on_gpu),
        )

    @cached_property
    def wording(self) -> Wording:
        return Wording(self.tokenizer)

    def note_cut(self, kind: str, texts: Sequence[str]) -> None:
        """Counts texts that are cut, also those that another process has cut."""
        if not self.truncated[kind]:
            limit = getattr(self.data, f"max_{kind}_tokens")
            logger.warning(
                f"{kind}s longer than data.max_{kind}_tokens={limit} are cut (and counted), "
                f"the first is {texts[0]!r}"
            )
        self.truncated[kind] += len(texts)


def group_by_length(
    lengths: Sequence[int], on_gpu: bool = False
) -> tuple[tuple[list[int], int], ...]:
    """Returns the rows in groups, each with the length of its longest: half of a batch of captions
    would be padding.

    Every cut saves MIN_PADDING_SAVED padded positions or more (on a GPU, where each group launches
    every kernel of the decoder anew, MIN_PADDING_SAVED_ON_GPU), the one that saves most first.
    """
    least = MIN_PADDING_SAVED_ON_GPU if on_gpu else MIN_PADDING_SAVED

    def cut(rows: list[int]) -> list[tuple[list[int], int]]:
        longest = lengths[rows[-1]]
        saved = [place * (longest - lengths[rows[place - 1]]) for place in range(1, len(rows))]
        if max(saved, default=0) < least:
            return [(rows, longest)]
        place = saved.index(max(saved)) + 1
        return cut(rows[:place]) + cut(rows[place:])

    return tuple(cut(sorted(range(len(lengths)), key=lengths.__getitem__)))


def _padded(rows: list[list[int]], pad: int, least: int = 1, multiple: int = 1) -> torch.Tensor:
    """Returns the rows as one int64 tensor, padded on the right to the longest of them."""
    # At least one column: a model with neither image tokens nor prompt still needs a position to
    # attend to.
    width = -(-max(least, *map(len, rows)) // multiple) * multiple
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows])


def _not_padding(rows: list[list[int]], padded: torch.Tensor) -> torch.Tensor:
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(padded.shape[1]) < lengths[:, None]
