"""The dotted keys of a config: their values, and what `harness config` says of each.

The reference is the source of schema.py itself, so that it can't differ from what is accepted.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from harness.config.schema import Config

TYPES = {  # as schema.py names them -> in words
    "Positive": "whole number above 0",
    "NonNegative": "whole number from 0",
    "Number": "number",
    "Above0": "number above 0",
    "From0": "number from 0",
    "Fraction": "number from 0 to 1",
    "Below1": "number from 0, below 1",
    "Between0And1": "number between 0 and 1",
    "bool": "true or false",
    "int": "whole number",
    "str": "text",
    "None": "null",
    "DataSetConfig": "{path, weight}",
}
FIELD = re.compile(r"    (\w+): ([^=#]+?)(?: = [^#]*)?(?:\s+# (.*))?")


@dataclass(frozen=True)
class Key:
    """One key of a config."""

    name: str  # dotted
    type: str  # in words
    default: str  # as YAML; "" where the key has to be given
    comment: str  # with its unit


def flatten(config: Config) -> dict[str, Any]:
    """Returns dotted key -> value, in the order of the fields; each can be used as an override."""
    return dict(_walk("", config.model_dump(mode="json")))


def _walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    inner = value
    if isinstance(value, list) and value and isinstance(value[0], dict):
        inner = dict(enumerate(value))
    if not isinstance(inner, dict):
        yield prefix, value
        return
    for key, part in inner.items():
        yield from _walk(f"{prefix}.{key}" if prefix else str(key), part)


def reference(section: type[BaseModel] = Config, above: str = "") -> Iterator[Key]:
    """Yields every key below a section, in the order of schema.py."""
    written = _written(section)
    for name, field in section.model_fields.items():
        dotted = f"{above}{name}"
        if isinstance(field.default, BaseModel):
            for key in reference(type(field.default), f"{dotted}."):
                yield _with_default(key, field.default, dotted)
        else:
            annotation, comment = written[name]
            yield Key(dotted, _in_words(annotation), _default(field), comment)


def _with_default(key: Key, defaults: BaseModel, above: str) -> Key:
    """Returns a key with the default that its section has where it stands."""
    value: Any = defaults
    for part in key.name.removeprefix(f"{above}.").split("."):
        value = getattr(value, part)
    return Key(key.name, key.type, _yaml(value), key.comment)


def _default(field: FieldInfo) -> str:
    return "" if field.default is PydanticUndefined else _yaml(field.default)


def _yaml(value: Any) -> str:
    """Returns a default as one would write it in a config."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def _written(section: type[BaseModel]) -> dict[str, tuple[str, str]]:
    """Returns name -> (annotation, comment) of a section's fields, from its source."""
    found: dict[str, tuple[str, str]] = {}
    above: list[str] = []
    for line in inspect.getsource(section).splitlines():
        if line.startswith("    # "):
            above.append(line.removeprefix("    # "))
        elif field := FIELD.fullmatch(line):
            name, annotation, beside = field.groups()
            found[name] = (annotation, " ".join([*above, beside or ""]).strip())
            above = []
        else:
            above = []
    return found


def _in_words(annotation: str) -> str:
    """Returns `Positive | None` as "whole number above 0, or null"."""
    options = []
    for option in annotation.split(" | "):
        literal = re.fullmatch(r"Literal\[(.*)\]", option)
        several = re.fullmatch(r"tuple\[(.*)\]", option)
        if literal:
            options.append(", ".join(word.strip().strip('"') for word in literal[1].split(",")))
        elif several:
            options.append(f"list of {TYPES[several[1].partition(',')[0]]}")
        else:
            options.append(TYPES[option])
    return ", or ".join(options)
