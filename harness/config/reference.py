"""What `harness config` and docs/configuration.md say of every key.

Read from the source of schema.py itself, so that it can't differ from what is accepted.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.config.schema import Config
from harness.errors import ConfigError

TYPES = {  # as schema.py names them -> in words
    "Positive": "whole number above 0",
    "NonNegative": "whole number from 0",
    "Number": "number",
    "Above0": "number above 0",
    "From0": "number from 0",
    "Fraction": "number from 0 to 1",
    "Below1": "number from 0, below 1",
    "Between0And1": "number between 0 and 1",
    "Objective": "itc, lm",
    "bool": "true or false",
    "int": "whole number",
    "str": "text",
    "None": "null",
    "Lite": "efficientnet_lite0, efficientnet_lite1, efficientnet_lite2",
    "DataSetConfig": "{path, weight, loss_weight}",
}
FIELD = re.compile(r"    (\w+): ([^=#]+?)(?: = [^#]*)?(?:\s+# (.*))?")


@dataclass(frozen=True)
class Key:
    """One key of a config."""

    name: str  # dotted
    type: str  # in words
    default: str  # as YAML; "" where the key has to be given
    comment: str  # with its unit


def chosen(key: str | None) -> list[Key]:
    """Returns a key, those of a section, or all for None. Raises ConfigError with the closest."""
    found = list(keys_below())
    if key is None:
        return found
    here = [each for each in found if each.name == key or each.name.startswith(f"{key}.")]
    if not here:
        names = {each.name.rpartition(".")[2]: each.name for each in found}
        names |= {each.name: each.name for each in found}
        names |= {section: section for each in found if (section := each.name.partition(".")[0])}
        near = difflib.get_close_matches(key, names, n=1)
        hint = f"did you mean {names[near[0]]}?" if near else "`harness config` lists all"
        raise ConfigError(f"there is no key {key}; {hint}")
    return here


def show(keys: Sequence[Key]) -> None:
    """Prints keys as a table."""
    table = Table("key", "type", "default", "meaning")
    for key in keys:
        table.add_row(*(Text(cell) for cell in (key.name, key.type, key.default, key.comment)))
    Console().print(table)


def defaults() -> str:
    """Returns a whole config as YAML with every default, each key's comment behind it."""
    lines: list[str] = []
    above: list[str] = []
    for key in keys_below():
        sections = key.name.split(".")
        name = sections.pop()
        for depth, section in enumerate(sections):
            if sections[: depth + 1] != above[: depth + 1]:
                lines.append(f"{'  ' * depth}{section}:")
        above = sections
        value = key.default or "mine"
        lines.append(f"{'  ' * len(sections)}{name}: {value}  # {key.comment}")
    return "\n".join(lines) + "\n"


def page() -> str:
    """Returns docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "Every key of a config. A YAML file says what differs from these defaults; on the command",
        "line any key can be given as `train.epochs=2`. Made by `harness config --markdown`.",
    ]
    section = ""
    for key in keys_below():
        first = key.name.partition(".")[0] if "." in key.name else "the experiment"
        if first != section:
            section = first
            lines += ["", f"## {section}", "", "| key | type | default | meaning |"]
            lines.append("|---|---|---|---|")
        default = f"`{key.default}`" if key.default else "has to be given"
        comment = key.comment.replace("|", "\\|")
        lines.append(f"| `{key.name}` | {key.type} | {default} | {comment} |")
    return "\n".join(lines) + "\n"


def keys_below(section: type[BaseModel] = Config, above: str = "") -> Iterator[Key]:
    """Yields every key below a section, in the order of schema.py."""
    written = _written(section)
    for name, field in section.model_fields.items():
        dotted = f"{above}{name}"
        if isinstance(field.default, BaseModel):
            for key in keys_below(type(field.default), f"{dotted}."):
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
            found[field[1]] = (field[2], " ".join([*above, field[3] or ""]).strip())
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
