"""What a wrong key or value of a config is told: the dotted key, what was found, what is
expected.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, get_args

from pydantic import ValidationError

from harness.config.keys import flatten
from harness.config.schema import Config, Section


class Mistake(NamedTuple):
    """The first problem of a document."""

    sentence: str
    key: str  # dotted


def explain_mistake(error: ValidationError, root: type[Section]) -> Mistake:
    """Returns the first problem. A wrong key goes first: it is often why another lacks."""
    errors = error.errors()
    unknown = [
        problem for problem in errors if problem["type"] in ("extra_forbidden", "invalid_key")
    ]
    first = (unknown or errors)[0]
    path = _field_path(first["loc"])
    key = ".".join(map(str, path))
    if unknown:
        return Mistake(f"no key {key}; {_closest(path, root)}", key)
    if first["type"] == "missing" and isinstance(path[-1], str):
        return Mistake(f"{key} is missing: the config needs it", key)
    if first["type"] == "value_error":
        return Mistake(f"{key or 'the config'}: {first['ctx']['error']}", key)
    here = [problem for problem in errors if _field_path(problem["loc"]) == path]
    expected = " or ".join(dict.fromkeys(_expected(problem, root) for problem in here))
    return Mistake(f"{key}: found {short(first['input'])}, expected {expected}", key)


def _expected(problem: Mapping[str, Any], root: type[Section]) -> str:
    if problem["type"] == "model_type":
        return (
            f"a section with keys such as "
            f"{', '.join(list(_section_at(problem['loc'], root).model_fields)[:3])}"
        )
    if problem["type"] == "missing":  # of a list with a fixed length
        return "one value more"
    text = problem["msg"].removeprefix("Input should be ").partition(", unable to")[0]
    return (
        text.replace("a valid integer", "an integer")
        .replace("valid tuple", "list")
        .replace("valid ", "")
    )


def _section_at(location: Sequence[str | int], root: type[Section]) -> type[Section]:
    """Returns the deepest section on the way to a location: its keys are the valid ones there."""

    def inner(annotation: Any) -> type[Section] | None:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation
        return next(filter(None, map(inner, get_args(annotation))), None)

    section = root
    for part in location:
        if part in section.model_fields:
            section = inner(section.model_fields[part].annotation) or section
    return section


def _field_path(location: Sequence[str | int]) -> list[str | int]:
    """Returns a location up to where pydantic names the member of a union, such as
    `literal['all_linear']`.
    """
    return list(itertools.takewhile(lambda part: "[" not in str(part), location))


def _closest(location: Sequence[str | int], root: type[Section]) -> str:
    section = _section_at(location[:-1], root)
    *above, wrong = location
    here = {key: ".".join(map(str, [*above, key])) for key in section.model_fields}
    everywhere = {key.rpartition(".")[2]: key for key in flatten(Config(name="-"))}
    for known in (here, everywhere) if root is Config else (here,):
        if near := difflib.get_close_matches(str(wrong), known, n=1):
            return f"did you mean {known[near[0]]}?"
    return f"the keys there are {', '.join(here)}"


def short(value: Any) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
