"""A contact sheet: records of sets of shards with their pictures and texts, as one page to look at;
with a config beside them what the model gets.

Sets -> an HTML file that needs nothing beside it.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.schema import Config
from harness.data.images import ImageError, cache_of, patience_of
from harness.own_data.as_seen import AsSeen, Seen
from harness.redact import masked
from harness.report.pages import write_page
from shards.files import ShardError, UnreachableError
from shards.images import upright
from shards.manifest import Manifest
from shards.origin import pictures_of
from shards.read import Reader
from shards.record import Text

SIDE = 320  # pixels of a picture's longer edge on the page


@dataclass(frozen=True)
class Card:
    """One record of the page; `problem` says why it cannot be shown, or not as a model sees it."""

    key: str
    picture: bytes | None
    about: str
    texts: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]  # prompt; answers and how often
    seen: Seen | None
    problem: str


@dataclass(frozen=True)
class Sheet:
    """The cards of one set."""

    title: str
    about: str
    cards: tuple[Card, ...]
    shows_pixels: bool


def write_sheets(
    places: Sequence[str],
    out: Path,
    *,
    count: int = 24,
    seed: int = 0,
    config: Config | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Sheet]:
    """Writes the page of `count` records of each set, drawn by `seed`, and returns what is on it.

    Raises ShardError for a set that cannot be opened. A record that cannot be read is shown as
    such.
    """
    cache = cache_of(config) if config else None
    patience = patience_of(config) if config else None
    manifests = [Manifest.open(place, cache, patience) for place in places]
    indices = [_drawn(manifest, count, seed) for manifest in manifests]
    total = sum(map(len, indices))
    sheets: list[Sheet] = []
    done = 0
    for manifest, chosen in zip(manifests, indices, strict=True):
        as_seen = AsSeen(config, manifest) if config else None
        # Without a config nothing is learnt of it: questions without answers are shown too.
        reader = Reader(manifest, cache, answered=config is not None)
        cards = []
        pictures = pictures_of(manifest, chosen, cache)
        for index, picture in zip(chosen, pictures, strict=True):
            cards.append(_card(reader, index, picture, as_seen))
            done += 1
            progress(done, total)
        sheets.append(_sheet(manifest, cards, as_seen))
    title = f"Records of {', '.join(sheet.title for sheet in sheets)}"
    write_page(out, "sheet.html", title=title, sheets=sheets, side=SIDE, config=config)
    return sheets


def _drawn(manifest: Manifest, count: int, seed: int) -> list[int]:
    found = random.Random(seed).sample(range(manifest.samples), min(count, manifest.samples))
    return sorted(found)


def _sheet(manifest: Manifest, cards: Sequence[Card], as_seen: AsSeen | None) -> Sheet:
    about = (
        f"{len(cards)} of {manifest.samples:,} records, drawn at random; {manifest.texts:,} texts"
    )
    if manifest.without_picture:
        about += f"; {manifest.without_picture:,} records without a picture"
    if manifest.skipped:
        about += f"; {manifest.skipped:,} samples were left out when it was indexed"
    if as_seen:
        way = "in training (epoch 0)" if as_seen.is_training else "in evaluation"
        about += f". Below each: what the model gets {way}"
    return Sheet(masked(manifest.folder), about, tuple(cards), as_seen is not None)


def _card(reader: Reader, index: int, picture: bytes | None, as_seen: AsSeen | None) -> Card:
    try:
        sample = reader.read(index)
    except UnreachableError:
        raise
    except ShardError as error:
        return Card(reader.manifest.key(index), None, "", (), None, str(error))
    problem = ""
    about = "" if sample.known.has_picture else "a record without a picture"
    if sample.known.has_picture and not picture:
        problem = "its picture is not where the features were made from"
    seen = None
    try:
        about = _about(picture) if picture else about
        seen = as_seen(sample) if as_seen else None
    except UnreachableError:
        raise
    except (ShardError, ImageError) as error:
        problem = str(error)
    except Exception as error:  # Pillow raises at least six types for damaged files
        problem = f"the picture cannot be decoded: {error}"
        picture = None
    texts = tuple(map(_answers, sample.known.texts))
    return Card(sample.known.key, picture, about, texts, seen, problem)


def _about(picture: bytes) -> str:
    found = upright(picture)
    size = f"{found[0].width} x {found[0].height}, {len(picture) / 1e3:,.0f} kB"
    return ", ".join([found[1], *found[2], size])


def _answers(text: Text) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Returns the prompt of a text, and its different targets with how often each was given."""
    return text.prompt or "", tuple(Counter(text.targets).most_common())
