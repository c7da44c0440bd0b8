"""YAML file + overrides -> Config, and back: find, read, change by `key=value`, validate, dump."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import yaml
from pydantic import ValidationError

from harness.config.known_mistakes import at_their_new_place
from harness.config.mistakes import explain_mistake, short
from harness.config.schema import Config, Section
from harness.config.splits import with_splits_named
from harness.errors import ConfigError
from harness.redact import MASK, masked_document, remember, revealed

S = TypeVar("S", bound="Section")


def shipped(kind: Literal["configs", "launch"]) -> Path:
    """Returns the folder of the experiments or launchers that come with harness, in a wheel or in a
    source checkout.
    """
    here = Path(__file__).resolve().parent.parent
    inside = here / kind  # where the wheel puts it
    return inside if inside.is_dir() else here.parent / kind


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Returns the config in a YAML file, changed by overrides such as `train.epochs=2`.

    `path` may also be the bare name of a shipped experiment (`demo`, or `configs/demo.yaml` where
    that is not a file). Raises ConfigError naming the file, the dotted key, the value found and
    what is expected.
    """
    file = find(path)
    return changed_by(read_yaml(file), overrides, file)


def changed_by(document: Mapping[str, Any], overrides: Sequence[str], file: Path) -> Config:
    """Returns the config of a document with overrides in place. Raises ConfigError.

    Keys of an older version are moved first, so that overrides decide by either name.
    """
    try:
        changed = with_splits_named(revealed(at_their_new_place(document)))
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error
    for override in overrides:  # one by one: data.folder is what a later one reaches into
        changed = with_splits_named(apply_overrides(changed, [override]), replaces=True)
    remember(changed)
    return validated(Config, changed, file, overrides)


def read_yaml(file: Path) -> dict[str, Any]:
    """Returns the mapping that a YAML file holds. Raises ConfigError naming the file."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from error
    return parse_yaml(text, str(file))


def parse_yaml(text: str, file: str) -> dict[str, Any]:
    """Returns the mapping that the text of a YAML file holds. Raises ConfigError naming the
    file.
    """
    document = _parsed(text, f"{file}: is not YAML")
    if not isinstance(document, dict):
        raise ConfigError(
            f"{file}: found {short(document)}, expected a mapping of keys such as name, data, model"
        )
    return document


def validated(
    kind: type[S], document: Mapping[str, Any], file: Path, overrides: Sequence[str] = ()
) -> S:
    """Returns the document as a section of that kind. Raises ConfigError naming the file or the
    override.
    """
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        mistake = explain_mistake(error, kind)
        where = str(file)
        for override in overrides:
            if f"{mistake.key}.".startswith(override.partition("=")[0] + "."):
                where = f"override {override!r}"
                break
        raise ConfigError(f"{where}: {mistake.sentence}") from error


class Override(NamedTuple):
    """`train.epochs=2` as (["train", "epochs"], 2)."""

    parts: list[str]
    value: Any


def parse_override(override: str) -> Override:
    """Returns the key's parts, and the value as YAML reads it. Raises ConfigError."""
    given = override.split("=", maxsplit=1)
    parts = given[0].strip().split(".")
    if len(given) < 2 or not all(parts):
        raise ConfigError(f"override {override!r}: expected key=value, for instance train.epochs=2")
    return Override(parts, _parsed(given[1], f"override {override!r}: the value is not YAML"))


def apply_overrides(document: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Returns a copy of the document with each `key=value` put in place.

    `data.train.0.path=DIR` reaches into a list. Raises ConfigError.
    """
    changed = copy.deepcopy(dict(document))
    for override in overrides:
        parsed = parse_override(override)
        at: Any = changed
        for depth, part in enumerate(parsed.parts):
            place = _place(at, part, override, ".".join(parsed.parts[:depth]))
            if depth == len(parsed.parts) - 1:
                at[place] = parsed.value
            elif isinstance(at, dict) and at.get(part) is None:
                at[part] = {}
            at = at[place]
    return changed


def _place(at: Any, part: str, override: str, where: str) -> str | int:
    """Returns the key or the position that a part of a dotted key names. Raises ConfigError."""
    if isinstance(at, dict):
        return part
    if not isinstance(at, list):
        raise ConfigError(f"override {override!r}: {where} is {short(at)}, it holds no keys")
    if not part.isdecimal() or int(part) >= len(at):
        expected = f"a list of {len(at)}, found {part!r}, expected a position in it"
        raise ConfigError(f"override {override!r}: {where} is {expected}")
    return int(part)


def dump(config: Config) -> str:
    """Returns the whole config, defaults included, as YAML that `load` reads back to an
    equal one, its secrets masked.
    """
    return yaml.safe_dump(for_disk(config), sort_keys=False, allow_unicode=True, width=120)


def check_revealed(texts: Mapping[str, Any], way: str) -> None:
    """Raises ConfigError for the first text, by key, that was stored without its secret."""
    for key, value in texts.items():
        if isinstance(value, str) and MASK in value:
            raise ConfigError(f"{key} was stored without its secret ({value}): {way}")


def for_disk(config: Config) -> dict[str, Any]:
    """Returns the config as a JSON document, its secrets masked: what may be written."""
    return masked_document(config.model_dump(mode="json"))


def _parsed(text: str, wrong: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)
    # yaml's own, and what it lets through: of dates and tagged values that are none, of depth.
    except (
        yaml.YAMLError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        RecursionError,
    ) as e:
        why = " ".join(str(e).replace(' in "<unicode string>",', ",").split())
        raise ConfigError(f"{wrong}: {why}") from e


class _StrictLoader(yaml.SafeLoader):
    """yaml.safe_load, but a key written twice in one section is an error: YAML keeps the last in
    silence.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"the key {key.value!r} occurs twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def find(path: str | Path, folder: str = "configs") -> Path:
    """Returns a YAML file by its path, or a shipped one of `folder` by its bare name. Raises
    ConfigError.
    """
    file = Path(path)
    if file.is_file():
        return file
    if file.is_dir():
        raise ConfigError(f"{file}: is a folder, expected a YAML file")
    ours = {
        f.stem: f for f in sorted((shipped("configs") / folder.partition("/")[2]).glob("*.yaml"))
    }
    if str(file.parent) in (".", folder) and file.suffix in ("", ".yaml") and file.stem in ours:
        return ours[file.stem]
    of_ablations = [other.stem for other in (shipped("configs") / "ablations").glob("*.yaml")]
    for name in of_ablations:
        if file.stem == name or file.stem.startswith(f"{name}_"):
            raise ConfigError(
                f"{file}: no such config file; {name} is an ablation, whose variants are run by "
                f"`harness ablate {name}`"
            )
    near = difflib.get_close_matches(file.stem, ours, n=1)
    hint = (
        f"did you mean {folder}/{near[0]}.yaml?"
        if near
        else f"the shipped ones are {', '.join(ours)}"
    )
    raise ConfigError(f"{file}: no such config file; {hint}")
