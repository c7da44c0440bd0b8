"""Where the frozen parts of a saved model lie now: base language model and vision encoder.

The id and the hash that a saved model names a part by -> the first place whose hash is the saved
one. So a run that was moved with what lay beside it, or a model folder that holds its parts, loads
without being told where they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from harness.errors import ConfigError, reason_of

# Folders above a model in which a part is looked for: of RUN/checkpoints/step-000100/model these
# are the checkpoint, checkpoints, RUN, the folder that RUN lies in, and the one above that.
LEVELS = 5


@dataclass(frozen=True)
class Part:
    """A frozen part as a saved model names it."""

    what: str  # in words
    option: str  # the argument that tells where it is: lm or vision
    id: str  # hub id or folder, where it was when the model was trained
    hash: str  # decides whether what is found is right


class Found(NamedTuple):
    """A part at a place."""

    place: str
    hash: str
    loaded: Any  # whatever had to be loaded to know the hash


def is_hub_id(name: str) -> bool:
    """Tells whether a name may be a model of the hub, and not a path alone. runs/NAME is where our
    own programs write.
    """
    return name.count("/") <= 1 and not name.startswith(("/", ".", "~", "runs/")) and name != ""


def find(part: Part, folder: Path, given: Any, look: Callable[[str], Found]) -> Found:
    """Returns the part of the model saved in `folder`: at the place that is `given`, or else at the
    first of `places` where it is.

    `look` says what lies at a place, by ConfigError that nothing does. Raises ConfigError that
    names all the places looked at.
    """
    looked_at = []
    for place in places(part.id, folder) if given is None else [str(given)]:
        try:
            found = look(place)
        except ConfigError as error:
            if given is not None:
                raise
            looked_at.append(f"{place} ({reason_of(error.__cause__ or error)})")
            continue
        if found.hash == part.hash:
            return found
        looked_at.append(f"{place} (has hash {found.hash[:12]})")
    raise ConfigError(
        f"{folder}: the {part.what} {part.id!r}, on which it was trained, has hash "
        f"{part.hash[:12]} and is not found; looked at: {', '.join(looked_at) or 'no folder'}"
        f"{'' if given else _beside(part.id, folder)}: give its folder with --{part.option} PATH "
        f"(in Python {part.option}=PATH)"
    )


def places(name: str, folder: Path) -> Iterator[str]:
    """Yields the places of a part that was once `name`: below the model's folder, there still,
    beside the run or above it by the same name, on the hub.

    Of folders only those that are there, each once.
    """
    once = Path(name).expanduser()
    near = _near(folder)
    inside = not once.is_absolute() and ".." not in once.parts
    candidates = [near[0] / once] if inside else []
    candidates.append(once)
    for above in near if once.name else ():
        candidates += [above / once, above / once.name] if inside else [above / once.name]
    seen = set()
    for candidate in candidates:
        if candidate.is_dir() and candidate.resolve() not in seen:
            seen.add(candidate.resolve())
            yield str(candidate)
    if not once.is_dir() and is_hub_id(name):
        yield name


def _near(folder: Path) -> list[Path]:
    whole = folder.absolute()
    return [whole, *whole.parents[:LEVELS]]


def _beside(name: str, folder: Path) -> str:
    near = _near(folder)
    return f", and for a folder {Path(name).name} in {near[0]} and up to {near[-1]}"
