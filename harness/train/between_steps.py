"""What is due between two steps: save a checkpoint, evaluate on the dev sets, look whether images
are used.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict

from harness import checkpoint as checkpoints
from harness.errors import GuardError
from harness.evaluate.run import evaluate_model
from harness.evaluate.small_gate import SmallSet, small_gate, small_gate_metrics
from harness.train.state import Run


def look(run: Run, small: SmallSet | None) -> None:
    """The gate on a few dev images between two evaluations; the main process alone has some, others
    wait.
    """
    config, engine, state = run.config, run.engine, run.state
    with engine.whole():
        if small:
            uses = small_gate(run.model, small, config, run.epochs)
            figures = small_gate_metrics(uses)
            run.tracker.metrics(
                {f"gate/{name}": value for name, value in figures.items()}, state.step
            )
        engine.wait()


def evaluate(run: Run, again: bool = True) -> None:
    """Scores on the dev sets, and the answers to the same images as always; the main process alone,
    others wait.

    `again` False: only where this step's answers are not there yet. Raises GuardError as
    `stop_if_image_ignored` says.
    """
    config, engine, state, ignored = run.config, run.engine, run.state, ""
    page, result = config.out_dir / "answers" / f"step-{state.step:06d}.html", None
    (wanted,) = engine.sum(
        [engine.is_main and bool(config.data.dev) and (again or not page.exists())]
    )
    with engine.whole() if wanted else nullcontext():
        if wanted and engine.is_main:
            result = evaluate_model(
                run.model,
                [s.path for s in config.data.dev],
                config,
                limit=config.evaluation.dev_images,
                counterfactual_texts=config.evaluation.dev_counterfactual_texts,
                epochs=run.epochs,
            )
        engine.wait()
    if result:
        values = {**result.metrics(), "unreadable_samples": result.unreadable}
        run.tracker.metrics({f"dev/{name}": value for name, value in values.items()}, state.step)
        run.tracker.predictions(result.shown_images, state.step)
        run.terminal.say(
            f"step {state.step}: "
            + ", ".join(f"{name} {value:.4g}" for name, value in values.items())
        )
        run.terminal.answers(result.shown_images)
        for task, use in ((task, scored.image_use) for task, scored in result.tasks.items()):
            if use:
                run.terminal.say(f"{task}: {use.verdict}: {use.reason}")
                ignored = f"{task}: {use.reason}" if use.verdict == "image ignored" else ignored
    run.model.train()
    (stop,) = engine.sum([bool(ignored)])
    if stop and run.epochs >= 1 and config.train.stop_if_image_ignored:
        raise GuardError(
            f"train.stop_if_image_ignored: after step {state.step} the images are ignored ({ignored})"
        )


def save(run: Run) -> None:
    """Gathers on all ranks, writes on one."""
    engine, config, state = run.engine, run.config, run.state
    weights, optimizer = engine.trained_state(), engine.optimizer_state()
    if engine.is_main:
        document = {
            "step": state.step,
            "train": asdict(state),
            "scaler": engine.scaler_state(),
            "config": config.model_dump(mode="json"),
            "run_id": run.tracker.run_id,
            "world_size": engine.world_size,
        }
        written = checkpoints.write(
            config.out_dir,
            state.step,
            lambda folder: run.model.save_pretrained(folder, weights),
            optimizer,
            document,
        )
        checkpoints.prune(config.out_dir, state.step, config.train.keep_checkpoints)
        run.tracker.checkpoint(written.path, written.digest, state.step)
    engine.wait()
