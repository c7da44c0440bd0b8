"""What the last evaluation of a training leaves: scores, predictions, and the run's page."""

from __future__ import annotations

from harness import checkpoint as checkpoints
from harness.data.images import cache_of, patience_of
from harness.evaluate import DEV, FOLDER
from harness.evaluate.report import SUMMARY, read_predictions, write_report
from harness.evaluate.report import page as write_summary
from harness.evaluate.results import Evaluation
from harness.evaluate.run_on_disk import PAGE, model_facts
from harness.train.state import Run
from shards.files import ShardError, write_whole
from shards.manifest import Manifest


def leave_report(run: Run, result: Evaluation) -> None:
    """Writes the last evaluation's scores and predictions, and the run's page; what cannot be
    written is told, since the run itself is done and saved.
    """
    from harness.look.page import Evaluated, try_report_page

    config = run.config
    out = config.out_dir / FOLDER / DEV
    paths = [dev.path for dev in config.data.dev]
    step = run.state.step
    last = str(checkpoints.place(config.out_dir, step))

    def go_on(done: int, pictures: int) -> None:
        run.engine.heart.doing(f"makes its report, {done} of {pictures} maps done", alone=True)

    go_on(0, config.evaluation.look_images)
    try:
        report = write_report(result, out, paths, last, step, model=model_facts(run.model))[0]
        cache = cache_of(config)
        manifests = [Manifest.open(path, cache, patience_of(config)) for path in paths]
        evaluated = Evaluated(
            report, read_predictions(out), config.out_dir, config, manifests, run.model, cache
        )
    except (OSError, ShardError) as error:
        run.terminal.say(f"no report: {error}")
        return
    if config.train.objective:  # a page shows answers
        write_whole(out / SUMMARY, write_summary(report, []).encode())
        run.tracker.artifact(out / SUMMARY)
        run.terminal.say(f"report: {out / SUMMARY}")
        return
    page = try_report_page(config.out_dir / PAGE, evaluated, progress=go_on)
    run.model.train()
    if page:
        run.tracker.artifact(page)
        run.terminal.say(f"report: {page}")
