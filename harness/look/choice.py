"""Which pictures a report shows: the most confident wrong answers, best, worst and random ones.

The lines of predictions.jsonl -> texts of the evaluated sets, read again with their pictures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from harness.config.schema import Config
from harness.data.collate import drawn
from harness.data.images import ImageDecoder
from harness.data.prompts import prompt
from harness.errors import ConfigError
from harness.evaluate.measures import RIGHT, TASKS
from harness.evaluate.predict import set_name
from harness.look.occlusion import Asked, nats
from harness.model.batch import Context
from harness.model.vlm import VisionLanguageModel
from harness.report.pictures import Shown
from shards.cache import Cache
from shards.manifest import Manifest
from shards.origin import indices_of, pictures_of
from shards.read import Reader

Row = Mapping[str, Any]  # a line of predictions.jsonl
SHOWN = 6  # pictures of each kind
MOST_WRONG = 300  # wrong answers whose confidence is asked for, evenly spaced
_SEED = 0


@dataclass(frozen=True)
class Chosen:
    """A text with its picture and what was said; `picture`: encoded, None where it is gone."""

    row: Row
    asked: Asked
    picture: bytes | None
    confidence: float | None = None  # probability of the answer

    @property
    def name(self) -> tuple[str, str]:
        """Names its picture."""
        return self.row["set"], self.row["key"]

    def shown(self) -> Shown:
        """Returns it as pages and pictures show it."""
        text = self.asked.context.text
        task = TASKS[text.task]
        notes = [] if self.confidence is None else [f"p {self.confidence:.2f}"]
        if not task.has_right:
            notes.append(f"{task.measure} {self.row['score']:.2f}")
        return Shown(
            image=self.picture,
            prompt=text.prompt or "",
            references=text.targets,
            prediction=self.row["answer"],
            right=self.row["score"] >= RIGHT if task.has_right else None,
            note=", ".join(notes),
        )


@dataclass
class Chooser:
    """Chooses texts of one task and reads them from the evaluated sets."""

    model: VisionLanguageModel
    config: Config
    manifests: Sequence[Manifest]
    rows: Sequence[Row]
    cache: Cache | None = None

    def confident_and_wrong(self) -> list[Chosen]:
        """Returns the wrong answers that the model held for most probable, one a picture."""
        wrong = [row for row in self.rows if row["score"] < RIGHT]
        places = np.unique(np.linspace(0, len(wrong) - 1, min(len(wrong), MOST_WRONG)).astype(int))
        found = self.with_confidence(self.read([wrong[place] for place in places]))
        found.sort(key=lambda chosen: -(chosen.confidence or 0))
        return found[:SHOWN]

    def best(self) -> list[Chosen]:
        """Returns those of the highest score, and of these those whose truth costs fewest nats."""
        return self._first(lambda row: (-row["score"], _loss(row, 1)))

    def worst(self) -> list[Chosen]:
        """Returns those of the lowest score, and of these those whose truth costs most nats."""
        return self._first(lambda row: (row["score"], _loss(row, -1)))

    def random(self) -> list[Chosen]:
        """Returns some that are drawn, the same for every run on these data."""
        return self._first(lambda row: drawn(_SEED, 0, row["set"], row["key"], row["text_id"]))

    def _first(self, key: Callable[[Row], Any]) -> list[Chosen]:
        """Returns the first of an order, one a picture."""
        taken: dict[tuple[str, str], Row] = {}
        for row in sorted(self.rows, key=key):
            taken.setdefault((row["set"], row["key"]), row)
            if len(taken) == SHOWN:
                break
        return self.with_confidence(self.read(list(taken.values())))

    def with_confidence(self, chosen: Sequence[Chosen]) -> list[Chosen]:
        """Returns them with the probability of each answer."""
        size = self.config.evaluation.batch_images
        found = []
        for start in range(0, len(chosen), size):
            part = chosen[start : start + size]
            asked = [one.asked for one in part]
            nats_I = nats(self.model, self.config, asked, whole=True)
            found += [
                replace(one, confidence=float(np.exp(-cost)))
                for one, cost in zip(part, nats_I, strict=True)
            ]
        return found

    def read(self, rows: Sequence[Row]) -> list[Chosen]:
        """Reads texts and pictures again, in the order of the rows. Raises ConfigError for a set
        that lacks one by now, ShardError.
        """
        by_set: dict[str, list[Row]] = defaultdict(list)
        for row in rows:
            by_set[row["set"]].append(row)
        found: dict[int, Chosen] = {}
        for manifest in self.manifests:
            own = by_set.pop(set_name(manifest), [])
            for row, chosen in zip(own, self._read(manifest, own), strict=True):
                found[id(row)] = chosen
        if by_set:
            raise ConfigError(
                f"none of the sets given is {next(iter(by_set))}, which was evaluated"
            )
        return [found[id(row)] for row in rows]

    def _read(self, manifest: Manifest, rows: Sequence[Row]) -> Iterable[Chosen]:
        indices = indices_of(manifest, [row["key"] for row in rows])
        reader = Reader(manifest, self.cache)
        decode = ImageDecoder.of(self.config.model.vision, self.config.data.max_image_pixels)
        pictures = pictures_of(manifest, indices, self.cache)
        for row, index, picture in zip(rows, indices.tolist(), pictures, strict=True):
            sample = reader.read(index) if index >= 0 else None
            texts = sample.known.texts if sample else ()
            text = next((text for text in texts if text.id == row["text_id"]), None)
            if sample is None or text is None:
                raise ConfigError(
                    f"{manifest.folder} has no text {row['text_id']} of {row['key']}, which was "
                    "evaluated: it is another set by now, evaluate again"
                )
            words = prompt(text.task, getattr(self.config.prompts, text.task), text.prompt)
            context = Context(sample.known, text, words)
            yield Chosen(row, Asked(decode(sample), context, row["answer"]), picture)


def _loss(row: Row, sign: int) -> float:
    return np.inf if row["loss"] is None else sign * row["loss"]
