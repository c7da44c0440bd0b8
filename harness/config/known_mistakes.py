"""Keys that reproduce a known mistake on purpose: docs/why-is-my-caption-empty.md.

Until version 0.1.0 they stood as data.loss_on_padding and model.lm.bos; configs, checkpoints and
saved models of that time are read by `at_their_new_place`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class KnownMistakesConfig(BaseModel):
    """Mistakes to make on purpose, to see what they do."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    loss_on_padding: bool = False  # targets padded to data.max_target_tokens, and that is learnt
    # Decoders: generation begins with a BOS token that training never shows.
    bos: Literal["always", "generation_only"] = "always"
    # twentyfold: image tokens start twenty times as large as the word embeddings around them.
    image_token_scale: Literal["right", "twentyfold"] = "right"


OLD_PLACES = {"loss_on_padding": ("data",), "bos": ("model", "lm")}


def at_their_new_place(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config's document with the keys of an older version in `known_mistakes`.

    An old key decides where the new one stands too: load.py moves a file's own keys before it puts
    overrides in place, so that it comes from an override.
    """
    changed = dict(document)
    for key, sections in OLD_PLACES.items():
        old = _taken(changed, sections, key)
        new = changed.get("known_mistakes") or {}
        if old and isinstance(new, Mapping):
            changed["known_mistakes"] = {**new, **old}
    return changed


def _taken(document: dict[str, Any], sections: tuple[str, ...], key: str) -> dict[str, Any]:
    """Takes a key out of a section, which is copied first; {} where it is not there."""
    here = document
    for name in sections:
        section = here.get(name)
        if not isinstance(section, Mapping):
            return {}
        here[name] = dict(section)
        here = here[name]
    return {key: here.pop(key)} if key in here else {}
