"""A run that lies elsewhere than where it was trained: what lay in its folder lies there still."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.checkpoint import Checkpoint
from harness.evaluate import FOLDER


@dataclass(frozen=True)
class Move:
    """The output folder of a run, as it was when it was trained and as it is now."""

    out: Path
    home: Path

    @classmethod
    def of(cls, found: Checkpoint) -> Move:
        """Returns the move of the run that a checkpoint belongs to."""
        config = found.state["config"]
        return cls(Path(config.get("out") or f"runs/{config['name']}"), found.home)

    @classmethod
    def since(cls, report: Mapping[str, Any], evaluation: Path) -> Move | None:
        """Returns the move of a run since an evaluation of it, whose folder is now `evaluation`;
        None where that lies in no run, or is of a model that was not trained here.
        """
        once = Path(report.get("checkpoint", "")).parent.parent
        above = (evaluation, *evaluation.parents)
        home = next((folder.parent for folder in above if folder.name == FOLDER), None)
        return cls(once, home) if home and report.get("step") is not None else None

    def path(self, path: str) -> str:
        """Returns where that lies now which lay at `path`: in the run's folder, if it went along
        with that.
        """
        once = Path(path)
        if once.is_relative_to(self.out):
            now = self.home / once.relative_to(self.out)
            if now.exists():
                return str(now)
        return path

    def config(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the run's config with its folder, and the sets in that, where they lie now."""
        data = {
            key: [{**one, "path": self.path(one["path"])} for one in value]
            if key in ("train", "dev", "test")
            else value
            for key, value in document.get("data", {}).items()
        }
        return {**document, "out": str(self.home), "data": data}
