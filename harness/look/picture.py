"""One picture and a question to a trained model: what it says, and where it looked."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from harness.evaluate.ask import answered
from harness.evaluate.space import encoder_of
from harness.loading import opened
from harness.look.occlusion import Asked, Likelihood, Pixels, area, look
from harness.look.overlay import write_overlay
from harness.report.pictures import Shown


class Looked(NamedTuple):
    """An answer, and the PNG that shows where the model looked for it."""

    answer: str
    overlay: Path


def look_at(
    source: Path | str,
    image: Path,
    prompt: str | None = None,
    out: Path | None = None,
    *,
    lm: Path | None = None,
    vision: Path | None = None,
) -> Looked:
    """Asks a model about a picture and writes the map of where it looked.

    `source`, `lm`, `vision`: as for `ask`. `out`: a PNG; without it IMAGE-look.png here. Raises
    ConfigError, OSError.
    """
    found = opened(source, lm=lm, vision=vision)
    model = found.model
    said = answered(found, image, prompt)
    batch = said.batch
    assert batch.pixels_IHW3 is not None  # of a picture
    pixels_HW3 = batch.pixels_IHW3[0].cpu().numpy()
    asked = Asked(pixels_HW3, batch.contexts[0], said.text)
    hiding = Pixels(model, encoder_of(model), pixels_HW3)
    seen = look(Likelihood(model, found.config, asked, hiding))
    note = (
        f"a patch of a sixteenth of the picture costs the answer up to {seen.patch_NN.max():.2f} "
        "nats a token, though what it rests on may be larger; area under its deletion curve "
        f"{area(seen.deleted):.2f}, in random order {area(seen.deleted_at_random):.2f}"
    )
    shown = Shown(None, prompt or "", (), said.text)
    place = out or Path(f"{image.stem}-look.png")
    return Looked(said.text, write_overlay(place, shown, pixels_HW3, seen, note))
