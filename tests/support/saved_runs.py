"""Runs on disk without training: a model whose trained weights are drawn, in a checkpoint."""

from __future__ import annotations

from pathlib import Path

from harness import checkpoint
from harness.config.load import changed_by
from harness.config.schema import Config
from harness.model.vlm import VisionLanguageModel
from toy_batch import moved
from toy_runs import make_config, make_shards


def saved_run(root: Path, name: str, *overrides: str, clip: Path, lm: Path) -> Path:
    """Returns the folder of a run of tiny models, its config changed by `overrides`; its sets of
    images are in `root`.
    """
    if not (root / "test").exists():
        make_shards(root / "test", 6, "test", 200)
    document = make_config(root, clip, lm, name).model_dump(mode="json")
    document["data"]["test"] = [{"path": str(root / "test")}]
    config = changed_by(document, ["model.lm.tuning=lora", *overrides], root)
    save(config, moved(VisionLanguageModel.build(config)))
    return Path(config.out)


def save(config: Config, model: VisionLanguageModel) -> None:
    state = {
        "step": 8,
        "config": config.model_dump(mode="json"),
        "train": {"stream": {"epoch": 1, "position": 14}},
        "data": [],
        "run_id": None,
        "world_size": 1,
    }
    checkpoint.write(Path(config.out), 8, model.save_pretrained, {}, state)
