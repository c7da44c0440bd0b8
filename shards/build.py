"""`harness shards build`: a source's records and images, checked one by one, into one set of shards
a split.

Source -> every image decoded once, dirt set aside -> OUT/SPLIT/... and OUT/skipped.jsonl ->
Summary. Everything is written beside OUT and moved there at the end, so that a failed build leaves
nothing; one that was killed leaves its shards, from which the next one takes what it needs.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from shards.earlier import Journal
from shards.files import ShardError, write_whole
from shards.manifest import SKIPPED, Manifest
from shards.prepare import MAX_PIXELS, Fault, Outcome, preparing
from shards.sources import SOURCES, Item, Source
from shards.sources.source import (
    EMPTY_TEXT,
    FURTHER_TURN,
    IMAGE_WITHOUT_TEXT,
    NO_SPLIT,
    REJECTED_CAPTION,
    TEXT_WITHOUT_IMAGE,
    UNDECODABLE,
    UNUSABLE_TEXT,
)
from shards.write import Sample, add_to, folder_beside, settle, write_shards

_ANEW = "images encoded anew: "

Progress = Callable[[str, int, int], None]  # split, images done, images of the split


@dataclass(frozen=True)
class Summary:
    """What was built, and how much of it was left out; every thing left out is a line of
    `skipped`.
    """

    dataset: str
    out: Path
    skipped: Path
    splits: dict[str, dict[str, int]]  # records, texts, targets (captions, answers), bytes of each
    images_without_text: int
    texts_without_image: int
    undecodable_images: int
    images_in_no_split: int
    empty_texts: int
    unusable_texts: int
    rejected_captions: int  # by the makers of the set
    further_turns: int  # of conversations
    reencoded_images: int
    notes: dict[str, int]  # what is odd and was kept, or was asked to be left out

    def total(self, name: str) -> int:
        return sum(split[name] for split in self.splits.values())


def build(
    source: str,
    out: str | Path,
    *,
    short_side: int | None = None,
    workers: int | None = None,
    max_pixels: int = MAX_PIXELS,
    progress: Progress | None = None,
    **options: Any,
) -> Summary:
    """Builds OUT/SPLIT for every split of `source`, with `options` being those of its `load` (None:
    not given).

    `workers` processes decode (default: as many as there are cores; 1 or few images: this one
    alone); the result does not depend on their number. An image of more than `max_pixels` is
    skipped like one that cannot be decoded. OUT may hold other splits already. Raises ShardError
    for anything wrong with the official files or the options, and then leaves OUT as it was.
    """
    if short_side is not None and short_side < 1:
        raise ShardError(f"--short-side is {short_side}: it is a number of pixels, 1 or more")
    if workers is not None and workers < 1:
        raise ShardError(f"--workers is {workers}: it is a number of processes, 1 or more")
    out = Path(out)
    found = _load(source, options)
    settle(out)
    _check_splits(found, out)
    lines = _lines_of_other_splits(found, out / SKIPPED)
    splits = {}
    with (
        closing(found.images),
        closing(Journal(out, found.images, (short_side, max_pixels))) as journal,
        folder_beside(out) as beside,
    ):
        journal.begin(beside)
        with preparing(found, workers or os.cpu_count() or 1, short_side, max_pixels) as prepare:
            for split, items in found.splits.items():
                show = partial(progress, split) if progress else lambda done, images: None
                prepared = journal.taking(found, items, prepare)
                samples = _samples(found, split, prepared, journal, show)
                made = write_shards(samples, beside / split, dataset=found.dataset, split=split)
                splits[split] = _figures(made)
        lines += [json.dumps(asdict(skipped), ensure_ascii=False) for skipped in found.skipped]
        # A file's name may be no UTF-8.
        text = "".join(f"{line}\n" for line in lines)
        write_whole(beside / SKIPPED, text.encode("utf-8", "backslashreplace"))
        journal.end()
        add_to(beside, out)
    return _summary(found, out, splits)


def _figures(made: Manifest) -> dict[str, int]:
    return {
        "records": made.samples,
        "texts": made.texts,
        "targets": int(made.sidecar["targets"].sum()),
        "bytes": made.bytes,
    }


def _summary(source: Source, out: Path, splits: dict[str, dict[str, int]]) -> Summary:
    things: Counter[str] = Counter()
    texts: Counter[str] = Counter()
    for skipped in source.skipped:
        things[skipped.kind] += 1
        texts[skipped.kind] += skipped.texts
    return Summary(
        source.dataset,
        out,
        out / SKIPPED,
        splits,
        images_without_text=things[IMAGE_WITHOUT_TEXT],
        texts_without_image=texts[TEXT_WITHOUT_IMAGE],
        undecodable_images=things[UNDECODABLE],
        images_in_no_split=things[NO_SPLIT],
        empty_texts=texts[EMPTY_TEXT],
        unusable_texts=texts[UNUSABLE_TEXT],
        rejected_captions=texts[REJECTED_CAPTION],
        further_turns=texts[FURTHER_TURN],
        reencoded_images=sum(n for note, n in source.notes.items() if note.startswith(_ANEW)),
        notes={note: n for note, n in source.notes.items() if n},
    )


def _load(name: str, options: dict[str, Any]) -> Source:
    if name not in SOURCES:
        raise ShardError(f"there is no source {name!r}: choose one of {', '.join(SOURCES)}")
    takes = inspect.signature(SOURCES[name]).parameters
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in takes:
            known = ", ".join(map(_flag, takes)) or "none"
            raise ShardError(f"{name} has no option {_flag(option)}; its options are {known}")
    for option, parameter in takes.items():
        if parameter.default is parameter.empty and option not in given:
            raise ShardError(f"{name} needs {_flag(option)}")
    return SOURCES[name](**given)


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")


def _check_splits(source: Source, out: Path) -> None:
    if not source.splits:
        kinds = Counter(skipped.kind for skipped in source.skipped)
        why = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common()) or "the files are empty"
        first = next((f"; first: {s.name}, {s.reason}" for s in source.skipped), "")
        raise ShardError(
            f"nothing to build from {source.images.place}: no image has a text ({why}{first})"
        )
    for split in source.splits:
        if not re.fullmatch(r"[A-Za-z0-9_\-]+", split):
            raise ShardError(
                f"the split {split!r} cannot be a folder: use letters, digits, '_' and '-'"
            )
        if (out / split).exists():
            raise ShardError(f"{out / split} is there already: remove it or choose another --out")
    if out.exists() and not out.is_dir():
        raise ShardError(f"--out {out} is a file: it must be a folder, or not be there")


def _samples(
    source: Source,
    split: str,
    prepared: Iterator[tuple[Item, Outcome]],
    journal: Journal,
    progress: Callable[[int, int], None],
) -> Iterator[Sample]:
    """Yields the usable items in their order; the others go to `skipped`."""
    items = len(source.splits[split])
    usable = 0
    for done, (item, outcome) in enumerate(prepared, 1):
        if isinstance(outcome, Fault):
            kind = UNUSABLE_TEXT if outcome.is_of_text else UNDECODABLE
            source.skip(kind, item.name, outcome.reason, split, len(item.record.texts))
        else:
            usable += 1
            payload, extension, changed, row_K = outcome
            source.notes[_ANEW + changed] += bool(changed)
            journal.note(item, outcome)
            yield item.record, payload, extension, row_K
        progress(done, items)
    if not usable:
        last = source.skipped[-1]
        raise ShardError(
            f"no image of the split {split} can be used; the last: {last.name}, {last.reason}"
        )


def _lines_of_other_splits(source: Source, path: Path) -> list[str]:
    """Returns what an earlier build of other splits into OUT left out: these lines stay."""
    if not path.is_file():
        return []
    try:
        lines = [line for line in path.read_text(encoding="utf-8").split("\n") if line]
        return [line for line in lines if json.loads(line)["split"] not in (None, *source.splits)]
    except (ValueError, KeyError, TypeError) as error:
        raise ShardError(
            f"{path} is not what an earlier build wrote: move it away, or choose another --out"
        ) from error
