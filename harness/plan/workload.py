"""How much there is to do: images an epoch, and what the collator makes of one image.

Config -> Workload, from the shards where they are there, else from the config's limits; it says
which.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from harness.config.schema import Config
from harness.data.collate import Collator, group_by_length
from harness.model.batch import Batch
from harness.model.pretrained import quiet_transformers
from shards.files import ShardError, is_remote
from shards.loader import Loader
from shards.manifest import Manifest
from shards.read import Reader, Sample

LOOKED_AT = 256  # images whose texts are read, spread over the set
TEXTS_UNKNOWN = 5  # texts of an image where neither shards nor the config say


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

    @classmethod
    def of(cls, batch: Batch) -> Sizes:
        """Returns those of one batch."""
        contexts = len(batch.prompt_ids_CL)
        targets = len(batch.labels_TL)
        records = len({id(context.record) for context in batch.contexts})  # each as an image
        counts_TL = batch.weight_TL != 0
        longest = batch.prompt_ids_CL.shape[1], batch.labels_TL.shape[1]
        lengths = tuple(sorted(counts_TL.sum(dim=1).tolist()))
        return cls(
            contexts / records,
            targets / records,
            *longest,
            float(counts_TL.float().mean()),
            lengths,
        )

    def groups(self, targets: int) -> tuple[tuple[list[int], int], ...]:
        """Returns how the collator groups as many targets whose lengths are spread as those that
        were looked at.
        """
        if not self.lengths:
            return ()
        spread = np.linspace(0, len(self.lengths) - 1, targets).round().astype(int)
        return group_by_length([self.lengths[place] for place in spread])


@dataclass(frozen=True)
class Workload:
    """`images`: an epoch's; None where the shards are not there. `encoder`: of feature sets.
    `source`: in words.
    """

    sizes: Sizes
    images: int | None
    encoder: Mapping[str, Any] | None
    source: str


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
    if (tokenizer := _tokenizer(config)) is None:
        return Workload(
            sizes,
            loader.samples,
            encoder,
            f"{assumed}: there is no tokenizer of {config.model.lm.id}",
        )
    collate = Collator(tokenizer, data, config.prompts, config.seed)
    quiet = logging.getLogger("harness.data.collate")
    level = quiet.level
    quiet.setLevel(logging.ERROR)
    seen = collate([sample for each in sets for sample in _samples(each, LOOKED_AT // len(sets))])
    quiet.setLevel(level)
    if seen is None:
        return Workload(
            sizes, loader.samples, encoder, f"{assumed}: the shards' first texts teach nothing"
        )
    return Workload(
        Sizes.of(seen), loader.samples, encoder, f"the texts of {seen.images} images of the shards"
    )


def _tokenizer(config: Config) -> Any:

    with quiet_transformers(), suppress(Exception):  # half a dozen types; a plan can do without
        return AutoTokenizer.from_pretrained(config.model.lm.id, revision=config.model.lm.revision)


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
