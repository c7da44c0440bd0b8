"""`data.folder`: one line in place of data.train, data.dev and data.test.

A document that names the folder -> the same with its splits named, so that a resolved config says
which sets a run reads. Read from the disk, when the config is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harness.errors import ConfigError

INDEX = "index.json"  # of a set of shards
# What others call the split that is scored during training.
SPLITS = {"train": ("train",), "dev": ("dev", "val", "validation"), "test": ("test",)}


def with_splits_named(document: Mapping[str, Any], replaces: bool = False) -> dict[str, Any]:
    """Returns a config's document without `data.folder`, its splits in data.train, dev and test.

    `replaces`: they take the place of sets that the document names, else both are a mistake. A
    folder that is a set itself is learnt from; of one that is not there all three are named, so
    that what looks for them says so. Raises ConfigError.
    """
    data = document.get("data")
    folder = data.get("folder") if isinstance(data, Mapping) else None
    if not isinstance(data, Mapping) or folder is None:
        return dict(document)
    if not isinstance(folder, str) or "://" in folder:
        raise ConfigError(
            f"data.folder: found {folder!r}, expected a local folder; a set elsewhere is named by "
            "data.train=[{path: URL}]"
        )
    named = [part for part in SPLITS if data.get(part)]
    if named and not replaces:
        raise ConfigError(
            f"data.folder stands for train, dev and test: give it, or data.{named[0]}, not both"
        )
    sets = {part: [{"path": path}] for part, path in _splits(Path(folder)).items()}
    empty: dict[str, Any] = {part: [] for part in SPLITS}
    return {**document, "data": {**data, "folder": None, **empty, **sets}}


def _splits(folder: Path) -> dict[str, str]:
    """Returns the path of each part that is there."""
    if (folder / INDEX).is_file():
        return {"train": str(folder)}
    if not folder.is_dir():
        return {part: str(folder / part) for part in SPLITS}
    found = {"train": str(folder / "train")}
    for part, names in SPLITS.items():
        there = [name for name in names if (folder / name / INDEX).is_file()]
        found |= {part: str(folder / there[0])} if there else {}
    return found
