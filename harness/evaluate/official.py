"""The official files of results and truths: JSON in which ids are ids and texts are texts.

A path -> its document; an entry of it -> an id or a text, or a ScoreError that names the file, the
entry (counted from 1), its id and the field. Nothing is turned into a text on the way: the text of
null would be "None", which the official rules take for the answer "0".
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.errors import ConfigError
from shards.files import ShardError, decode


class ScoreError(ConfigError):
    """Predictions that cannot be scored against these truths; the message names the ids, or the
    file, the entry and the field.
    """


def refuse(found: str, ids: Sequence[str], wrong: str) -> None:
    """Raises a ScoreError that names the first of the ids, if there are any."""
    if ids:
        raise ScoreError(f"{found} {named(ids)}, {wrong}")


def named(ids: Sequence[str]) -> str:
    """Returns the first five, and how many more there are."""
    return ", ".join(map(str, ids[:5])) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")


def read_json(path: Path) -> Any:
    """Returns a JSON document in UTF-8, with or without a byte order mark. Raises ScoreError."""
    try:
        return json.loads(decode(Path(path).read_bytes(), str(path)))
    except ShardError as error:
        raise ScoreError(str(error)) from error
    except (ValueError, RecursionError) as error:
        raise ScoreError(f"{path} is not JSON: {error}") from error


def entries(rows: Any, form: str) -> Iterator[tuple[str, Any]]:
    """Yields (where it stands, entry) of a list; `form` says what the file should be and is not."""
    if not isinstance(rows, list):
        raise ScoreError(f"{form}: found {_shown(rows)}, expected a list")
    for number, entry in enumerate(rows, 1):
        yield f"{form}: entry {number}", entry


def field(entry: Any, key: str, where: str) -> Any:
    """Returns what stands under the key. Raises ScoreError where nothing does."""
    if not isinstance(entry, dict) or key not in entry:
        raise ScoreError(f'{where} has no "{key}"')
    return entry[key]


def identifier(entry: Any, key: str, where: str) -> str:
    """Returns an id as text. Raises ScoreError unless it is a whole number or a text."""
    value = field(entry, key, where)
    if type(value) not in (int, str):  # a bool is an int to isinstance
        wrong = f'has {_shown(value)} as "{key}", expected a whole number or a text'
        raise ScoreError(f"{where} {wrong}")
    return str(value)


def text(entry: Any, key: str, where: str) -> str:
    """Returns a text. Raises ScoreError for any other value."""
    value = field(entry, key, where)
    if not isinstance(value, str):
        raise ScoreError(f'{where} has {_shown(value)} as "{key}", expected a text')
    return value


def _shown(value: object) -> str:
    """Names a value of JSON in a few words, however large it is."""
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    shown = json.dumps(value)
    return shown if len(shown) <= 40 else f"{shown[:37]}..."


def read_pairs(path: Path, key: str, value: str, found: str, one: str) -> dict[str, str]:
    """Returns a list of `{key: an id, value: a text}` as a mapping. Raises ScoreError; `found`,
    `one`: its words.
    """
    form = f'{path} is not a list of {{"{key}": ..., "{value}": ...}}'
    pairs = []
    for where, entry in entries(read_json(path), form):
        name = identifier(entry, key, where)
        pairs.append((name, text(entry, value, f"{where} ({key} {name})")))
    counts = Counter(name for name, _ in pairs)
    twice = [name for name, n in counts.items() if n > 1]
    refuse(found, twice, f"more than once; each needs one {one}")
    return dict(pairs)
