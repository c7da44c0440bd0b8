"""The dotted keys of a config, by which a user names and overrides them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from harness.config.schema import Config


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> value, in the order of the fields; every key can be used as an override."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, inner in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else key, inner)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for position, inner in enumerate(value):
                yield from walk(f"{prefix}.{position}", inner)
        else:
            yield prefix, value

    return dict(walk("", config.model_dump(mode="json")))
