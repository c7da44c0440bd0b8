"""A run's folder -> its newest checkpoint scored on a set: what `harness evaluate` does.

In RUN/evaluation: scores.json, the predictions in the official formats, report.md with the score
beside its floors, test images with their answers, the loss curves.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import checkpoint as checkpoints
from harness.config.keys import flatten
from harness.config.load import changed_by, check_revealed, parse_override
from harness.config.schema import Config
from harness.data.features import check_encoder
from harness.data.images import cache_of, patience_of
from harness.errors import ConfigError
from harness.evaluate import DEV, FOLDER
from harness.evaluate.floor import Majority, epochs_trained, training_records
from harness.evaluate.moved import Move
from harness.evaluate.report import (
    SCORES,
    SUMMARY,
    draw_answers,
    draw_curves,
    folder,
    names,
    page,
    read_predictions,
    read_scores,
    variant,
    write_report,
)
from harness.evaluate.results import Evaluation
from harness.evaluate.run import evaluate_model
from harness.evaluate.told import described
from harness.loading import load_model, model_class, where_found
from harness.machine.dealing import Alone, Progress
from harness.model.vlm import VisionLanguageModel
from harness.redact import masked, masked_document, say
from harness.report.terminal import part_rows
from harness.tracking.tracker import open_tracker
from shards.cache import Cache
from shards.files import write_whole
from shards.manifest import Manifest
from shards.quarantine import FILE as QUARANTINE

PAGE = "report.html"  # of the run's own evaluations in its folder, of others beside their scores
# Of a run's config, when it is scored.
CHANGEABLE = ("generate.", "evaluation.", "data.", "tracking.uri=")


@dataclass(frozen=True)
class _Task:
    """What is scored, on what, and where it goes."""

    found: checkpoints.Checkpoint
    home: Path  # where the run lies now
    move: Move  # from where it was trained
    config: Config
    paths: list[str]
    manifests: list[Manifest]
    cache: Cache | None
    out: Path
    is_the_runs_own: bool  # its newest checkpoint on data.test, as its config says


def evaluate_run(
    run_dir: Path | str,
    data: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    which: str | None = None,
    limit: int | None = None,
    overrides: Sequence[str] = (),
    text_only_accuracy: float | None = None,
    pictures: str | None = None,
    lm: Path | None = None,
    vision: Path | None = None,
    progress: Progress | None = None,
    dealer: Alone | None = None,
) -> dict[str, Any]:
    """Scores a run's newest checkpoint on `data`, or on the config's `data.test`.

    `run_dir`: a run's folder or one checkpoint of it. `which`: newest, best or a step of the run.
    `out`: RUN/evaluation. `limit`: so many images, the same for every model. `overrides`:
    `key=value` of the run's generate, evaluation and data, for instance to choose the beams on the
    dev set. With either, on other data or for an older checkpoint, `out` is a folder in
    RUN/evaluation that says so, and nothing goes to the tracker. `pictures`: the set of images to
    show, where the data are features that do not know theirs any more. `lm`, `vision`: as for
    `load_model`. `dealer`: the ranks that share the work; all but the first return the "data"
    alone. Returns what scores.json holds. Raises ConfigError, ShardError.
    """
    dealer = dealer or Alone()
    task = _task(checkpoints.at(run_dir, which), data, out, limit, overrides)
    model = _model(task, lm=lm, vision=vision)
    config = where_found(task.config, model)
    if not dealer.rank:
        task.out.mkdir(parents=True, exist_ok=True)
        (task.out / QUARANTINE).unlink(missing_ok=True)
    if text_only_accuracy is None:
        text_only_accuracy = known_floor(task.out / SCORES, task.paths, task.move)
    evaluation = evaluate_model(
        model,
        task.paths,
        config,
        limit=limit,
        majority=None if dealer.rank else Majority.of(training_records(config)),
        text_only_accuracy=text_only_accuracy,
        progress=progress,
        quarantine=task.out / QUARANTINE,
        epochs=epochs_trained(config, task.found.state["train"]["stream"]),
        dealer=dealer,
    )
    if evaluation is None:
        return {"data": task.paths}
    return _leave(replace(task, config=config), evaluation, model, pictures or task.paths[0])


def report_run(
    run_dir: Path | str,
    data: Sequence[str] | None = None,
    file: Path | None = None,
    *,
    which: str | None = None,
    maps: int | None = None,
    lm: Path | None = None,
    vision: Path | None = None,
    progress: Progress | None = None,
) -> Path:
    """Makes the report page of an evaluation anew, and returns where it is.

    `data`, `which`: as for `evaluate_run`; of a run that was never evaluated on data.test the last
    evaluation in training is meant. `file`: where to, in place of the run's own. `maps`: as for
    `write_report_page`. Raises ConfigError where nothing was evaluated, ShardError.
    """
    from harness.look.page import write_report_page

    task = _evaluated_task(checkpoints.at(run_dir, which), data)
    if task.config.train.objective:
        raise ConfigError(
            f"{task.home} is a first stage, whose scores are in {task.out / SUMMARY}: a page shows "
            "answers, and it gives none"
        )
    report = read_scores(task.out / SCORES)
    if report["step"] != task.found.step:
        raise ConfigError(
            f"{task.out / SCORES} is of step {report['step']}, and {task.found.path} is meant: "
            f"harness evaluate {task.home} scores it"
        )
    model = _model(task, lm=lm, vision=vision)
    task = replace(task, config=where_found(task.config, model))
    evaluated = _evaluated(task, report, model)
    return write_report_page(file or _page_of(task), evaluated, maps=maps, progress=progress)


def _model(task: _Task, **places: Path | None) -> VisionLanguageModel:
    """Returns the model that reads the task's sets; `places`: lm and vision, as for `load_model`.
    Raises ConfigError for features that another encoder made.
    """
    shown = [manifest for manifest in task.manifests if manifest.has_pictures]
    with_vision = any(manifest.kind == "images" for manifest in shown)
    kind = model_class(task.config)
    model = load_model(task.found, task.config, kind=kind, with_vision=with_vision, **places)
    for manifest in shown:
        if manifest.kind == "features":
            check_encoder(manifest, model.config.encoder)
    return model


def _evaluated_task(found: checkpoints.Checkpoint, data: Sequence[str] | None) -> _Task:
    """Returns the evaluation that is meant. Raises ConfigError where there was none."""
    own = found.home / FOLDER
    config = Config(**Move.of(found).config(found.state["config"]))
    dev = [one.path for one in config.data.dev]
    if dev and not data and not (own / SCORES).is_file():
        for out in (None, own / DEV):  # of a run without test sets, of its training
            task = _task(found, dev, out, None, ())
            if (task.out / SCORES).is_file():
                return task
    task = _task(found, data, None, None, ())
    if not (task.out / SCORES).is_file():
        raise ConfigError(f"{task.out} holds no {SCORES}: harness evaluate {task.home} writes it")
    return task


def _page_of(task: _Task) -> Path:
    """Returns where the report page goes: for the run's own evaluations into the run's folder."""
    own = task.home / FOLDER
    places = [own, own / DEV]
    if not task.config.data.test:
        dev = [one.path for one in task.config.data.dev]
        places += [own / folder(names(task.manifests))] if task.paths == dev else []
    return (task.home if task.out in places else task.out) / PAGE


def _evaluated(task: _Task, report: Mapping[str, Any], model: VisionLanguageModel) -> Any:
    from harness.look.page import Evaluated

    rows = read_predictions(task.out)
    return Evaluated(report, rows, task.home, task.config, task.manifests, model, task.cache)


def _leave(
    task: _Task, evaluation: Evaluation, model: VisionLanguageModel, pictures: str
) -> dict[str, Any]:
    """Writes what an evaluated run leaves, and returns its report."""
    from harness.look.page import try_report_page

    checkpoint = str(task.found.path)
    report, files = write_report(
        evaluation, task.out, task.paths, checkpoint, task.found.step, model=model_facts(model)
    )
    drawn = draw_answers(evaluation, pictures, task.out, task.cache)
    drawn += draw_curves(task.home, task.out)
    summary = task.out / SUMMARY
    write_whole(summary, page(report, drawn).encode())
    made = None
    if not task.config.train.objective:
        made = try_report_page(_page_of(task), _evaluated(task, report, model))
    if task.is_the_runs_own:
        pages = [made] if made else []
        _track(task.config, task.found, evaluation, [*files, *drawn, summary, *pages])
    if made:
        say(f"report: {made}", sys.stderr)
    return report


def _task(
    found: checkpoints.Checkpoint,
    data: Sequence[str] | None,
    out: Path | None,
    limit: int | None,
    overrides: Sequence[str],
) -> _Task:
    """Returns what was asked for. Raises ConfigError, ShardError."""
    home = found.home
    for given in overrides:
        if not given.startswith(CHANGEABLE):
            raise ConfigError(
                f"{given}: a run is scored as it was trained, only {', '.join(CHANGEABLE)}... can "
                "be given"
            )
    move = Move.of(found)
    document = move.config(found.state["config"])
    config = changed_by(document, overrides, home)
    tested = [test.path for test in config.data.test]
    paths = list(data or tested) or _dev_instead(config, home)
    by_key = {f"data.test.{place}.path": path for place, path in enumerate(paths)}
    check_revealed(by_key, "give the whole one, as --override KEY=VALUE")
    cache = cache_of(config)
    manifests = [Manifest.open(path, cache, patience_of(config)) for path in paths]
    newest = checkpoints.newest(home)
    changed = []
    if newest and newest.path != found.path:
        changed.append(found.path.name)
    if paths != tested:
        changed += names(manifests)
    changed += variant(limit, [given for given in overrides if not _only_reveals(given, document)])
    out = Path(out or home / FOLDER / folder(changed))
    return _Task(found, home, move, config, paths, manifests, cache, out, not changed)


def _dev_instead(config: Config, home: Path) -> list[str]:
    """Returns the dev sets of a run that names no test sets, and says so. Raises ConfigError."""
    paths = [dev.path for dev in config.data.dev]
    if not paths:
        raise ConfigError(
            f"{home}: its config names neither data.test nor data.dev; give the shards to score "
            "with --data DIR, of pictures that it has not learnt"
        )
    say(
        f"{home}: its config names no data.test, so that data.dev is scored ({', '.join(paths)}): "
        "what was chosen on it flatters the score",
        sys.stderr,
    )
    return paths


def _only_reveals(override: str, document: dict[str, Any]) -> bool:
    """Tells whether an override changes nothing that is scored: it names the tracking store, or
    gives what was stored without its secret.
    """
    key = ".".join(parse_override(override).parts)
    value = masked(str(parse_override(override).value))
    return key == "tracking.uri" or flatten(Config(**document)).get(key) == value


def model_facts(model: VisionLanguageModel) -> dict[str, int]:
    """Returns the model's parameters, frozen ones included, and how many layers are in 4 bits.

    A model that was loaded to read features has no encoder.
    """
    rows = part_rows(model.parts)
    return {
        "quantized_modules": sum(row["4-bit layers"] for row in rows),
        "trainable_parameters": sum(row["trained"] for row in rows),
        "total_parameters": sum(row["parameters"] for row in rows),
        "with_encoder": model.vision is not None,
    }


def known_floor(scores: Path, paths: Sequence[str], move: Move) -> float | None:
    """Returns the text-only accuracy that an earlier evaluation on the same data was given.

    It does not depend on the run. The data may have been moved with it since.
    """
    if not scores.exists():
        return None
    earlier = read_scores(scores)
    now = masked_document(list(paths))
    if now not in (earlier["data"], [move.path(path) for path in earlier["data"]]):
        return None
    return earlier.get("tasks", {}).get("vqa", {}).get("text_only_accuracy")


def _track(
    config: Config, found: checkpoints.Checkpoint, evaluation: Evaluation, files: Sequence[Path]
) -> None:
    """Adds the figures to the run that trained the model."""
    run_id = found.state.get("run_id")
    if config.tracking.kind == "none" or run_id is None:
        return
    figures = {f"test/{name}": value for name, value in evaluation.metrics().items()}
    tracker = open_tracker(config, run_id=run_id)
    tracker.metrics(figures, found.step)
    tracker.describe(described(f"test, step {found.step}", evaluation.by_task()))
    for file in files:
        tracker.artifact(file, FOLDER)
    tracker.close()
