"""Models whose config.json ships with us, so that a plan for them needs no network.

Config -> the same config whose models are named by a folder that is here, and what to tell of it.
The files lie in facts/ID/config.json and hold what a model's shape depends on, with source and
date.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from harness.config.keys import leaves
from harness.config.schema import Config
from harness.errors import ConfigError
from harness.machine.network import hub_answers
from harness.model.pretrained import needed_file

FOLDER = Path(__file__).parent / "facts"


@dataclass(frozen=True)
class Located:
    """A config to plan from. `names`: the ids that folders of ours stand for. `notes`: for the
    plan.
    """

    config: Config
    names: Mapping[str, str]
    notes: tuple[str, ...]

    def by_id(self, error: ConfigError) -> ConfigError:
        """Returns the error with the ids that the user wrote in place of our folders."""
        sentence = str(error)
        for folder, name in self.names.items():
            sentence = sentence.replace(folder, name)
        return ConfigError(sentence)


def located(config: Config, with_vision: bool) -> Located:
    """Returns where the models of a config are described: by their own config.json where it is in a
    folder, in the local cache or on a hub that answers, else by ours.
    """
    model: dict[str, Any] = {}
    names: dict[str, str] = {}
    notes: list[str] = []
    for key in ("vision", "lm") if with_vision else ("lm",):
        part = getattr(config.model, key)
        shipped = FOLDER / part.id / "config.json"
        if Path(part.id).expanduser().is_dir() or not shipped.is_file():
            continue
        if (own := _own_config(part.id, part.revision)) is not None:
            notes += _differences(part.id, own, shipped)
            continue
        names[str(shipped.parent)] = part.id
        model[key] = part.model_copy(update={"id": str(shipped.parent), "revision": None})
        date = json.loads(shipped.read_text())["facts_date"]
        notes.append(
            f"{part.id}: planned from the facts of its config.json that ship with harness ({date}),"
            " since the hub is out of reach"
        )
    found = config.model_copy(update={"model": config.model.model_copy(update=model)})
    return Located(found, names, tuple(notes))


def _own_config(name: str, revision: str | None) -> dict[str, Any] | None:
    """Returns the leaves of the model's own config.json, {} where the plan itself will tell what is
    wrong with it; None where it is out of reach.
    """
    cached = try_to_load_from_cache(name, "config.json", revision=revision)
    if not isinstance(cached, str) and not hub_answers():
        return None
    with suppress(ValueError):
        try:
            return dict(leaves(json.loads(needed_file(name, "config.json", revision).read_text())))
        except OSError:
            # Whoever names a revision is told that it is not there, or not given.
            return None if revision is None else {}
    return {}


def _differences(name: str, own: Mapping[str, Any], shipped: Path) -> Iterator[str]:
    """Yields one line where the model's own config.json says otherwise than ours."""
    ours = json.loads(shipped.read_text())
    date = ours["facts_date"]
    differing = [
        f"{key} {own[key]} in place of {value}"
        for key, value in leaves(ours)
        if own.get(key, value) != value
    ]
    if differing:
        yield (
            f"{name}: its config.json differs from the facts that ship with harness ({date}): "
            f"{', '.join(differing)}; planned from its own"
        )
