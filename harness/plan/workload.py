"""How much there is to do: images an epoch, and what the collator makes of one image.

Config -> Workload, from the shards where they are there, else from the config's limits; it says
which.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from harness.config.schema import Config
from harness.data.collate import Collator, group_by_length
from harness.errors import ConfigError
from harness.loading import tokenizer_of
from harness.model.batch import Batch
from harness.model.packing import MOST_POSITIONS
from shards.files import ShardError, is_remote
from shards.loader import Loader
from shards.manifest import Manifest
from shards.read import Reader, Sample

LOOKED_AT = 256  # images whose texts are read, spread over the set
# where a text's tokens are counted without its tokenizer
ASSUMED = ", lengths assumed at four letters a token, since there is no tokenizer of {}"
TEXTS_UNKNOWN = 5  # texts of an image where neither shards nor the config say


class Rows(NamedTuple):
    """Rows of a decoder per image, and the text positions of the longest."""

    rows: float
    positions: int


@dataclass(frozen=True)
class Sizes:
    """What a collator makes of one image, on average; lengths are those of the longest row of a
    micro-batch.
    """

    contexts: float  # per image
    targets: float  # per image
    prompt_tokens: int
    target_tokens: int
    # share of the target positions that are not padding: logits are made for these alone
    kept: float
    # of all targets that were looked at, in ascending order; (): all as the longest
    lengths: tuple[int, ...] = ()
    # per image the rows of a decoder, and their longest text: contexts of an image in one row; and
    # each in its own, where that is not the same; (): as `packed` reckons
    rows: tuple[Rows, ...] = ()

    @classmethod
    def of(cls, batch: Batch) -> Sizes:
        """Returns those of one batch."""
        contexts = len(batch.prompt_ids_CL)
        targets = len(batch.labels_TL)
        records = len({id(context.record) for context in batch.contexts})  # each as an image
        counts_TL = batch.weight_TL != 0
        longest = batch.prompt_ids_CL.shape[1], batch.labels_TL.shape[1]
        lengths = tuple(sorted(counts_TL.sum(dim=1).tolist()))
        index = batch.indexed().index
        assert index is not None  # `indexed` has made it
        rows = [each.source_RW.shape for each in index.packed]
        return cls(
            contexts / records,
            targets / records,
            *longest,
            float(counts_TL.float().mean()),
            lengths,
            tuple(Rows(count / records, width) for count, width in rows),
        )

    def packed(self, by_image: bool) -> Rows:
        """Returns the rows that a decoder packs an image's targets into, and their text positions;
        `by_image`: contexts of an image share a row.
        """
        if self.rows:
            return self.rows[0 if by_image else -1]
        alone = self.prompt_tokens + math.ceil(self.targets / self.contexts) * self.target_tokens
        fit = max(1, MOST_POSITIONS // alone)
        together = min(math.ceil(self.contexts), fit) if by_image else 1
        return Rows(self.contexts / together, together * alone)

    def groups(self, targets: int, on_gpu: bool) -> tuple[tuple[list[int], int], ...]:
        """Returns how the collator groups as many targets whose lengths are spread as those that
        were looked at.
        """
        if not self.lengths:
            return ()
        spread = np.linspace(0, len(self.lengths) - 1, targets).round().astype(int)
        return group_by_length([self.lengths[place] for place in spread], on_gpu)


@dataclass(frozen=True)
class Workload:
    """`images`: an epoch's; None where the shards are not there. `encoder`: of feature sets.
    `source`: in words. `evaluated`: of the dev sets, all texts of an image; None where they are not
    there. `tasks`: theirs.
    """

    sizes: Sizes
    images: int | None
    encoder: Mapping[str, Any] | None
    source: str
    evaluated: Sizes | None = None
    tasks: frozenset[str] = frozenset()


def workload(config: Config) -> Workload:
    """Returns how much a config's run has to do. Raises ShardError for a set that is there and
    cannot be used.
    """
    sizes = Sizes(
        contexts := config.data.texts_per_image or TEXTS_UNKNOWN,
        contexts,
        config.data.max_prompt_tokens,
        config.data.max_target_tokens,
        1.0,
    )
    assumed = f"{contexts} questions an image, each text as long as the config's limits"
    try:
        sets = [Manifest.open(each.path) for each in config.data.train if not is_remote(each.path)]
    except ShardError as error:
        return Workload(sizes, None, None, f"{assumed}: {error}")
    if not sets or len(sets) < len(config.data.train):
        return Workload(sizes, None, None, f"{assumed}: the shards are not on this machine")
    data = config.data
    weights = [each.weight or 0.0 for each in data.train]
    loader = Loader(
        [each.path for each in data.train],
        weights if any(weights) else None,
        global_batch=config.train.global_batch,
        window_shards=data.window_shards,
        images=data.train_images,
        lanes=data.lanes,
    )
    made = [each.encoder for each in sets if each.kind == "features" and each.has_pictures]
    encoder = made[0] if made else None
    tokenizer = _tokenizer(config)
    lengths = "" if tokenizer else ASSUMED.format(config.model.lm.id)
    found = f"the texts of {{}} images of the shards{lengths}"
    tokenizer = tokenizer or _stand_in()
    packs = not config.model.lm.has_encoder
    seen = _seen(sets, Collator(tokenizer, data, config.prompts, config.seed, packs=packs))
    if seen is None:
        return Workload(
            sizes, loader.samples, encoder, f"{assumed}: the shards' first texts teach nothing"
        )
    work = Workload(Sizes.of(seen), loader.samples, encoder, found.format(seen.images))
    scored = _seen(_opened(config), Collator.of(config, tokenizer, training=False))
    if scored is None:
        return work
    tasks = frozenset(context.text.task for context in scored.contexts)
    return replace(work, evaluated=Sizes.of(scored), tasks=tasks)


def _opened(config: Config) -> list[Manifest]:
    """Returns those sets to evaluate on that are here and can be used."""
    found = []
    for dataset in (*config.data.dev, *config.data.test):
        if not is_remote(dataset.path):
            with suppress(ShardError):  # the run itself says what is wrong
                found.append(Manifest.open(dataset.path))
    return found


def _seen(sets: list[Manifest], collate: Collator) -> Batch | None:
    """Returns what the collator makes of some images of all sets; None of no text."""
    quiet = logging.getLogger("harness.data.collate")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    samples = [sample for each in sets for sample in _samples(each, LOOKED_AT // len(sets))]
    batch = collate(samples)
    quiet.setLevel(level)
    return batch


def _tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    with suppress(ConfigError):  # a plan can do without
        return tokenizer_of(config)
    return None


def _stand_in() -> PreTrainedTokenizerBase:
    """Returns a tokenizer for lengths alone: a token for each four letters or figures of a word and
    for each other sign, which is a little more than those of T5 and GPT-2 in English.
    """
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Split(Regex(r"\w{1,4}|[^\w\s]"), "removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def _samples(manifest: Manifest, count: int) -> list[Sample]:
    """Returns records spread evenly over a set, without their images.

    The run itself names those that cannot be read.
    """
    reader = Reader(manifest)
    places = np.unique(
        np.linspace(0, manifest.samples - 1, min(count, manifest.samples)).astype(int)
    )
    found = []
    for place in places:
        with suppress(ShardError):
            found.append(replace(reader.read(int(place)), payload=np.zeros((1, 1, 3), np.uint8)))
    return found
