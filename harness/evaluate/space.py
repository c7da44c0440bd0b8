"""Does a model read where things stand, and how much of a picture does it need?

The gate's questions again -> what they score under pictures with shuffled tiles, in a mirror, and
with a part of their patches left out. Decides nothing. Legend: I pictures, c contexts that are
asked again, P patches, D width, H W pixels, N bridge rows, Q queries.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from harness.config.schema import ModelConfig
from harness.errors import ConfigError
from harness.evaluate.bootstrap import Interval, image_rows, per_text
from harness.evaluate.collected import Collected, Picture
from harness.evaluate.image_use.gate import Gate
from harness.evaluate.measures import TASKS
from harness.evaluate.predict import ImageTokens, Prediction
from harness.model.batch import Batch
from harness.model.vision import load_vision
from shards.files import ShardError
from shards.manifest import Manifest
from shards.origin import indices_at_source, source_of
from shards.read import Reader

TILES = 4  # a side
DROPPED = (25, 50, 75)  # percent of the patches, beside none and all of them
_SIDES = re.compile(r"\b(left|right)\b", re.IGNORECASE)
_SEED = 0  # of tiles and patches: the same for every run, so that runs compare


class UnmeasuredError(Exception):
    """A figure that cannot be had; the message says why."""


@dataclass
class Source:
    """Where the judged pictures are read again."""

    collected: Collected

    @property
    def _is_features(self) -> bool:
        # Sets of one kind are scored together.
        shown = [manifest for manifest in self.collected.manifests if manifest.has_pictures]
        return shown[0].kind == "features"

    def payloads(self, pictures: Sequence[Picture]) -> dict[Picture, np.ndarray]:
        """Returns what the judged sets hold of these: pixels_HW3 or features_PD."""
        found: dict[Picture, np.ndarray] = {}
        for number, index_of in self.collected.by_set(pictures).items():
            manifest = self.collected.manifests[number]
            found |= zip(index_of, self._read(manifest, [*index_of.values()]), strict=True)
        return found

    def pixels(self, pictures: Sequence[Picture]) -> dict[Picture, np.ndarray]:
        """Returns pixels_HW3, of features those of the pictures that they were made from. Raises
        UnmeasuredError.
        """
        if not self._is_features:
            return self.payloads(pictures)
        found: dict[Picture, np.ndarray] = {}
        for number, index_of in self.collected.by_set(pictures).items():
            manifest = self.collected.manifests[number]
            source = source_of(manifest)
            if source is None:
                raise UnmeasuredError("the pictures that the features were made from are gone")
            there = indices_at_source(manifest, source, index_of.values())
            if (there < 0).any():
                raise UnmeasuredError(f"{source.folder} lacks some of the pictures")
            found |= zip(index_of, self._read(source, there.tolist()), strict=True)
        return found

    def _read(self, manifest: Manifest, indices: Sequence[int]) -> list[np.ndarray]:
        try:
            reader = Reader(manifest)
            decode = self.collected.decode
            assert decode is not None  # whoever collects pictures has read them
            return [decode(reader.read(index)) for index in indices]
        except (ShardError, ValueError) as error:
            raise UnmeasuredError(f"a picture cannot be read: {error}") from error

    def shown(self, batch: Batch, pixels: Sequence[np.ndarray]) -> Batch:
        """Returns the batch with these pictures, encoded where it is read from features."""
        if hasattr(batch, "pictures"):
            fields: dict[str, Any] = {"pictures": tuple(pixels)}
            return replace(batch, **fields)
        pixels_IHW3 = torch.from_numpy(np.stack(pixels)).to(batch.image_of_C.device)
        if not self._is_features:
            return replace(batch, pixels_IHW3=pixels_IHW3)
        model = self.collected.model
        with torch.no_grad(), model.precision.autocast("vision"):
            return replace(batch, features_IPD=self._tower(pixels_IHW3).float())

    @cached_property
    def _tower(self) -> Any:
        return encoder_of(self.collected.model)


def encoder_of(model: Any) -> Any:
    """Returns the model's encoder; of a model that was loaded without it, to read features, the
    one that these were made by. Raises UnmeasuredError.
    """
    if getattr(model, "vision", None) is not None:
        return model.vision
    if not hasattr(model, "precision"):
        raise UnmeasuredError("the model has no encoder")
    try:
        tower = load_vision(ModelConfig(**model.config.model).vision)
    except ConfigError as error:
        raise UnmeasuredError(f"the encoder cannot be loaded: {error}") from error
    if tower.identity()["hash"] != model.config.encoder["hash"]:
        raise UnmeasuredError("the features were made by another encoder than there is now")
    return tower.to(next(model.parameters()).device)


def tiles_shuffled(gate: Gate, source: Source, most: int) -> dict[str, Any]:
    """Returns what it costs in points to shuffle the tiles of a picture, 4 a side: 0 where the
    place of things is not read. Raises UnmeasuredError.
    """
    contexts = _contexts(gate.predictions, most)
    return _cost(gate, contexts, _said(gate, source, contexts, "tiles")["tiles"])


def mirrored(gate: Gate, source: Source, most: int) -> dict[str, Any] | None:
    """Returns what a mirror costs questions that hold the words left or right, in points against
    the unmirrored truth, and `changed`, the percent of answers that it changes; None for captions.
    Raises UnmeasuredError.
    """
    if not TASKS[gate.task].has_right:
        return None
    contexts = _contexts(gate.predictions, most, about_sides)
    if not contexts:
        raise UnmeasuredError("no question holds the word left or right")
    said = _said(gate, source, contexts, "mirror")["mirror"]
    changed = [
        gate.predictions[c].answer != answer for c, answer in zip(contexts, said, strict=True)
    ]
    return {**_cost(gate, contexts, said), "changed": 100 * float(np.mean(changed))}


def patches_dropped(gate: Gate, source: Source, most: int) -> dict[str, Any]:
    """Returns `scores`, in points, by the percent of patches that are left out at random, and
    `patches`, how many there are. Where all are left out the language model reads no image token:
    a bridge can make nothing of no patch, and this is what the gate calls `no_image`; None for a
    model that cannot do without. Raises UnmeasuredError.
    """
    if not hasattr(gate.model, "patch_tokens"):
        raise UnmeasuredError("the model shows no patches")
    contexts = _contexts(gate.predictions, most)
    said = _said(gate, source, contexts, "patches")
    patches = max(said.pop("patches"))
    said["0"] = [gate.predictions[c].answer for c in contexts]
    if "no_image" in gate.said:
        said["100"] = [gate.said["no_image"][c] or "" for c in contexts]
    scores = {
        str(percent): _score(gate, contexts, said[str(percent)]).to_dict()
        for percent in (0, *DROPPED, 100)
        if str(percent) in said
    }
    images = len(_pictures(gate, contexts))
    return {"scores": scores, "patches": patches, "images": images, "texts": len(contexts)}


def _said(gate: Gate, source: Source, contexts: Sequence[int], how: str) -> dict[str, list[Any]]:
    """Returns the answers of the contexts under each name that `seen_otherwise` gives."""

    def seen(gate: Gate, *item: Any) -> dict[str, list[Any]]:
        return seen_otherwise(gate, source, *item)

    said: dict[str, list[Any]] = defaultdict(list)
    items = [(how, places.tolist()) for places, _ in gate.batches(contexts)]
    for found in gate.dealt("seen_otherwise", seen, items):
        for name, answers in found.items():
            said[name] += answers
    return said


@torch.no_grad()
def seen_otherwise(
    gate: Gate, source: Source, how: str, contexts: Sequence[int]
) -> dict[str, list[Any]]:
    """Returns the answers of contexts of one part of the gate whose pictures are changed, by what
    was done to them: "tiles", "mirror", or of "patches" the percent that were left out, and beside
    these how many there are. Raises UnmeasuredError.
    """
    [(places, batch)] = gate.batches(contexts)
    pictures = _pictures(gate, contexts)
    image_c = [pictures.index(gate.pictures[c]) for c in places]
    seen = replace(batch, image_of_C=torch.tensor(image_c, device=batch.image_of_C.device))
    if how != "patches":
        pixels = source.pixels(pictures)
        changed = [_CHANGES[how](pixels[picture], picture) for picture in pictures]
        tokens = gate.model.bridge_tokens(source.shown(seen, changed))
        return {how: gate.model.generate(seen, gate.decoding, tokens).texts}
    payloads = source.payloads(pictures)
    stacked = torch.from_numpy(np.stack([payloads[picture] for picture in pictures]))
    field = "pixels_IHW3" if stacked.dtype == torch.uint8 else "features_IPD"
    given: dict[str, Any] = {field: stacked.to(batch.image_of_C.device)}
    patches_IPD = gate.model.patch_tokens(replace(seen, **given))
    said: dict[str, list[Any]] = {"patches": [patches_IPD.shape[1]]}
    for percent in DROPPED:
        kept_Ik = _kept(pictures, patches_IPD.shape[1], percent).to(patches_IPD.device)
        tokens = _tokens_of(gate.model, seen, patches_IPD, kept_Ik)
        said[str(percent)] = gate.model.generate(seen, gate.decoding, tokens).texts
    return said


def about_sides(prediction: Prediction) -> bool:
    """Tells whether a question holds the word left or right."""
    return bool(_SIDES.search(prediction.question or prediction.prompt))


def shuffle_tiles(pixels_HW3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Returns the picture with its tiles, `TILES` a side, in another order; what a side has beyond
    a multiple of `TILES` stays where it is.
    """
    high = pixels_HW3.shape[0] // TILES
    wide = pixels_HW3.shape[1] // TILES
    shuffled_HW3 = pixels_HW3.copy()
    for place, taken in enumerate(rng.permutation(TILES**2)):
        shuffled_HW3[_tile(int(place), high, wide)] = pixels_HW3[_tile(int(taken), high, wide)]
    return shuffled_HW3


_CHANGES: Mapping[str, Callable[[np.ndarray, Picture], np.ndarray]] = {
    "tiles": lambda pixels_HW3, picture: shuffle_tiles(pixels_HW3, _rng(picture)),
    "mirror": lambda pixels_HW3, _: np.ascontiguousarray(pixels_HW3[:, ::-1]),
}


def _tile(number: int, high: int, wide: int) -> tuple[slice, slice]:
    row = number // TILES
    column = number % TILES
    return slice(row * high, (row + 1) * high), slice(column * wide, (column + 1) * wide)


def _rng(picture: Picture) -> np.random.Generator:
    """Returns a generator of the picture's own, whatever is asked of others."""
    return np.random.default_rng([_SEED, *"/".join(picture).encode()])


def _kept(pictures: Sequence[Picture], patches: int, percent: int) -> torch.Tensor:
    """kept_Ik: the patches that stay, in their order; those of a higher percent are among those of
    a lower one. One stays at least.
    """
    count = max(1, round(patches * (100 - percent) / 100))
    orders = [_rng(picture).permutation(patches) for picture in pictures]
    return torch.from_numpy(np.sort(np.stack(orders)[:, :count], axis=1))


def _tokens_of(
    model: Any, batch: Batch, patches_IPD: torch.Tensor, kept_Ik: torch.Tensor
) -> ImageTokens:
    """Returns the image tokens of the patches that are kept."""
    if getattr(model, "token_per_patch", False):
        tokens = model.bridge_tokens(replace(batch, features_IPD=patches_IPD))
        return replace(tokens, tokens_NQD=_rows(tokens.tokens_NQD, kept_Ik))
    return model.bridge_tokens(replace(batch, features_IPD=_rows(patches_IPD, kept_Ik)))


def _rows(values_IPD: torch.Tensor, kept_Ik: torch.Tensor) -> torch.Tensor:
    return values_IPD.gather(1, kept_Ik[:, :, None].expand(-1, -1, values_IPD.shape[2]))


def _contexts(
    predictions: Sequence[Prediction],
    most: int,
    wanted: Callable[[Prediction], bool] = lambda prediction: True,
) -> list[int]:
    """Returns the contexts that are wanted, of the first `most` pictures that have such."""
    chosen = [c for c, prediction in enumerate(predictions) if wanted(prediction)]
    image_c = image_rows(predictions[c].picture for c in chosen)
    return [c for c, image in zip(chosen, image_c, strict=True) if image < most]


def _pictures(gate: Gate, contexts: Sequence[int]) -> list[Picture]:
    return list(dict.fromkeys(gate.pictures[c] for c in contexts))


def _points(gate: Gate, contexts: Sequence[int], said: Sequence[str]) -> np.ndarray:
    truths = [gate.predictions[c].references for c in contexts]
    return 100 * np.array(TASKS[gate.task].scores(list(said), truths))


def _interval(gate: Gate, contexts: Sequence[int], points_c: np.ndarray) -> Interval:
    """Returns the mean over the contexts with its interval over pictures."""
    row_c = image_rows(gate.predictions[c].picture for c in contexts)
    return per_text(points_c, row_c, gate.config.bootstrap, gate.config.confidence)


def _score(gate: Gate, contexts: Sequence[int], said: Sequence[str]) -> Interval:
    return _interval(gate, contexts, _points(gate, contexts, said))


def _cost(gate: Gate, contexts: Sequence[int], said: Sequence[str]) -> dict[str, Any]:
    """Returns the score under other pictures, and what that is less than under the true ones."""
    true_c = _points(gate, contexts, [gate.predictions[c].answer for c in contexts])
    other_c = _points(gate, contexts, said)
    return {
        "true_score": float(true_c.mean()),
        "score": float(other_c.mean()),
        **_interval(gate, contexts, true_c - other_c).flat("cost"),
        "images": len(_pictures(gate, contexts)),
        "texts": len(contexts),
    }
