"""The maps of a few pictures, each beside that of a bridge with random weights.

A model and pictures with what was said of them -> a `Mapped` each, within a time that is bounded
unless more is asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from harness.config.schema import Config
from harness.data.images import ImageDecoder, ImageError
from harness.evaluate.space import UnmeasuredError, encoder_of
from harness.look.choice import Chosen
from harness.look.occlusion import (
    Likelihood,
    Look,
    agreement,
    hiding_of,
    look,
    random_bridge,
    replaced,
)
from harness.model.bridge import Bridge
from harness.model.vlm import VisionLanguageModel
from shards.read import Sample

SECONDS = 60.0  # after which no further picture is begun


@dataclass(frozen=True)
class Mapped:
    """A picture with its map, that of the random bridge, and how far their ranks agree."""

    chosen: Chosen
    pixels_HW3: np.ndarray | None  # as the model gets it; None: gone
    look: Look
    random: Look
    agreement: float | None


@dataclass
class Maps:
    """All maps of a page, and what has to be said of them."""

    mapped: list[Mapped] = field(default_factory=list)
    told: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class Mapper:
    """Makes maps; the encoder of a model that reads features is loaded once, where it is needed."""

    model: VisionLanguageModel
    config: Config
    progress: Callable[[int, int], None] | None = None

    def __post_init__(self) -> None:
        self.why = ""
        self.encoder: Any = None
        try:
            self.encoder = encoder_of(self.model)
        except UnmeasuredError as error:
            self.why = str(error)

    def maps(self, chosen: Sequence[Chosen], seconds: float = SECONDS) -> Maps:
        """Returns the maps of these, as many as are begun within `seconds`."""
        found = Maps()
        began = time.monotonic()
        pixels = [self.pixels(one) for one in chosen]
        if missing := sum(self.encoder is None or one is None for one in pixels):
            why = self.why or "the pictures that the features were made from are gone"
            found.told.append(
                f"{why}: of {missing} pictures patch tokens are left out in place of "
                "pixels; each token has seen the whole picture, so this tells less of places"
            )
        bridge = random_bridge(self.model, self.config, [one.asked for one in chosen])
        for number, (one, pixels_HW3) in enumerate(zip(chosen, pixels, strict=True)):
            if time.monotonic() - began > seconds:
                found.told.append(
                    f"{number} of {len(chosen)} pictures: the others would have taken more than "
                    f"{seconds:.0f} s (harness report --maps {len(chosen)} makes them all)"
                )
                break
            try:
                found.mapped.append(self.map(one, pixels_HW3, bridge))
            except UnmeasuredError as error:
                found.told.append(f"no maps: {error}")
                break
            if self.progress:
                self.progress(number + 1, len(chosen))
        found.seconds = time.monotonic() - began
        return found

    def map(self, one: Chosen, pixels_HW3: np.ndarray | None, random_weights: Bridge) -> Mapped:
        """Returns the map of one beside that of a bridge with random weights. Raises
        UnmeasuredError.
        """
        hiding = hiding_of(self.model, self.encoder, one.asked, pixels_HW3)
        likelihood = Likelihood(self.model, self.config, one.asked, hiding)
        own = look(likelihood)
        with replaced(self.model, random_weights):
            random = look(likelihood, curve=False)
        return Mapped(one, pixels_HW3, own, random, agreement(own, random))

    def pixels(self, one: Chosen) -> np.ndarray | None:
        """Returns the picture as the encoder takes it; None where it is gone."""
        if one.asked.payload.dtype == np.uint8:
            return one.asked.payload
        if one.picture is None:
            return None
        decode = ImageDecoder.of(self.config.model.vision, self.config.data.max_image_pixels)
        try:
            return decode(Sample(None, one.picture, "image", 0, 0))
        except ImageError:  # it was read when its features were made
            return None
