"""A run's folder -> its newest checkpoint scored on a set: what `harness evaluate` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from harness import checkpoint as checkpoints
from harness.config.load import apply_overrides, validated
from harness.config.schema import Config
from harness.data.features import check_encoder
from harness.errors import ConfigError
from harness.evaluate import FOLDER
from harness.evaluate.floor import Majority, epochs_trained, training_records
from harness.evaluate.report import folder, names, variant, write_report
from harness.evaluate.results import Evaluation
from harness.evaluate.run import Progress, evaluate_model
from harness.machine.precision import choose
from harness.model.vlm import VisionLanguageModel
from shards.cache import Cache
from shards.manifest import Manifest

CHANGEABLE = ("generate.", "evaluation.", "data.")  # of a run's config, when it is scored


def evaluate_run(
    run_dir: Path | str,
    data: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    text_only_accuracy: float | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Scores a run's newest checkpoint on `data`, or on the config's `data.test`, and writes into
    `out`.

    `run_dir` is a run's folder or one checkpoint of it; `out` is RUN/evaluation. `limit`: so many
    images, the same for every model. `overrides`: `key=value` of the run's generate, evaluation and
    data, for instance to choose the beams on the dev set. With either, on other data or for an
    older checkpoint, `out` is a folder in RUN/evaluation that says so, and nothing goes to the
    tracker. Returns what scores.json holds: {"checkpoint", "step", "data", "images", "unreadable",
    "tasks": {task: figures}}. Raises ConfigError, ShardError.
    """
    run_dir = Path(run_dir)
    found = checkpoints.at(run_dir)
    home = found.path.parent.parent  # where the run lies now; its config may name where it lay once
    document = {**found.state["config"], "out": str(home)}
    if foreign := [given for given in overrides if not given.startswith(CHANGEABLE)]:
        raise ConfigError(
            f"{foreign[0]}: a run is scored as it was trained, only {', '.join(CHANGEABLE)}... can be given"
        )
    config = validated(Config, apply_overrides(document, overrides), run_dir, overrides)
    paths = list(data or [test.path for test in config.data.test])
    if not paths:
        raise ConfigError(
            f"{run_dir}: its config names no data.test; give the shards to score with --data DIR"
        )
    cache = Cache.at(config.data.cache_dir, config.data.cache_gb * 1e9)
    manifests = [Manifest.open(path, cache) for path in paths]
    model = load_model(found, config, with_vision=manifests[0].kind == "images")
    for manifest in manifests:
        if manifest.kind == "features":
            check_encoder(manifest, model.config.encoder)
    newest, tested = checkpoints.newest(home), [test.path for test in config.data.test]
    changed = [found.path.name] * bool(newest and newest.path != found.path) + names(manifests) * (
        paths != tested
    )
    changed += variant(limit, overrides)
    out = Path(out or home / FOLDER / folder(changed))
    out.mkdir(parents=True, exist_ok=True)
    (quarantine := out / "quarantine.jsonl").unlink(missing_ok=True)
    if text_only_accuracy is None:
        text_only_accuracy = known_floor(out / "scores.json", paths)
    evaluation = evaluate_model(
        model,
        paths,
        config,
        limit=limit,
        majority=Majority.of(training_records(config)),
        text_only_accuracy=text_only_accuracy,
        progress=progress,
        quarantine=quarantine,
        epochs=epochs_trained(config, found.state["train"]["stream"]),
    )
    report, files = write_report(evaluation, out, paths, str(found.path), found.step)
    if not changed:
        _track(config, found, evaluation, files)
    return report


def known_floor(scores: Path, paths: Sequence[str]) -> float | None:
    """The text-only accuracy that an earlier evaluation on the same data was given: it does not
    depend on the run.
    """
    if not scores.exists():
        return None
    earlier = json.loads(scores.read_text())
    return (
        earlier["tasks"].get("vqa", {}).get("text_only_accuracy")
        if earlier["data"] == list(paths)
        else None
    )


def load_model(
    found: checkpoints.Checkpoint, config: Config, *, with_vision: bool
) -> VisionLanguageModel:
    """The checkpoint's model in eval mode, on the GPU where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose(config.train.precision, device)
    return VisionLanguageModel.from_pretrained(
        found.model, with_vision=with_vision, precision=precision, device=device
    )


def _track(
    config: Config, found: checkpoints.Checkpoint, evaluation: Evaluation, files: Sequence[Path]
) -> None:
    """Adds the figures to the run that trained the model."""
    run_id = found.state.get("run_id")
    if config.tracking.kind == "none" or run_id is None:
        return
    from harness.tracking.tracker import open_tracker

    tracker = open_tracker(config, run_id=run_id)
    tracker.metrics(
        {f"test/{name}": value for name, value in evaluation.metrics().items()}, found.step
    )
    for file in files:
        tracker.artifact(file, FOLDER)
    tracker.close()
