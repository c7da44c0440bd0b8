"""The dotted keys of a config, by which a user names and overrides them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from harness.config.schema import Config


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


def leaves(document: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Yields dotted key and value of what is no mapping, of a document that is no config."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
