"""What is due between two steps: save, evaluate on the dev sets, look at a few images."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict

from harness import checkpoint as checkpoints
from harness.errors import GuardError
from harness.evaluate.results import Evaluation
from harness.evaluate.run import evaluate_model
from harness.evaluate.small_gate import SmallSet, small_gate, small_gate_metrics, small_set
from harness.train.state import Run
from shards.files import ShardError


class BetweenSteps:
    """All that a config asks for after a step; all ranks alike."""

    def __init__(self, run: Run, last_step: int) -> None:
        self.run = run
        self.last_step = last_step
        self._small: SmallSet | None = None  # made when it is first needed

    def is_nothing_left(self) -> bool:
        """Tells whether the run is at its end; makes up for an evaluation that was cut off."""
        run = self.run
        step = run.state.step
        is_end = step >= self.last_step
        if step and (is_end or self._is_evaluation_due()):
            evaluate(run, again=False)  # the earlier process may have been killed inside it
        if is_end:
            run.terminal.say(
                f"nothing is left to do: {run.config.out_dir} stands at step {step} "
                f"of {self.last_step}"
            )
        return is_end

    def do_what_is_due(self) -> None:
        """Saves first: a crash in the evaluation then loses nothing."""
        run = self.run
        train = run.config.train
        is_end = run.state.step == self.last_step
        if is_end or self._is_due(train.save_every):
            save(run)
        if is_end or self._is_evaluation_due():
            evaluate(run)
        elif train.image_use_every and run.config.data.dev and self._is_due(train.image_use_every):
            self._look()

    def _is_due(self, every: int | None) -> bool:
        """Tells whether `every` steps are over; None: whether an epoch is."""
        if every is None:
            return self.run.is_end_of_epoch
        return self.run.state.step % every == 0

    def _is_evaluation_due(self) -> bool:
        return self.run.is_end_of_epoch or self._is_due(self.run.config.train.evaluate_every)

    def _look(self) -> None:
        """Asks the gate on a few dev images; the main process alone has some, the others wait."""
        run = self.run
        if run.engine.is_main and self._small is None:
            try:
                self._small = small_set(run.model, run.config)
            except ShardError as error:  # the next evaluation ends the run, on all ranks
                run.terminal.say(f"no look at dev images: {error}")
        with run.engine.gathered_weights():
            if self._small:
                uses = small_gate(run.model, self._small, run.config, run.epochs)
                run.track("gate", small_gate_metrics(uses))
            run.engine.wait()


def evaluate(run: Run, again: bool = True) -> None:
    """Scores on the dev sets, and answers for the same images as always.

    The main process alone evaluates, the others wait. `again` False: only where this step's answers
    are not there yet. Raises GuardError as `stop_if_image_ignored` says, and ShardError for a dev
    set that cannot be scored; saves before the latter.
    """
    config = run.config
    page = config.out_dir / "answers" / f"step-{run.state.step:06d}.html"
    wanted_here = run.engine.is_main and bool(config.data.dev) and (again or not page.exists())
    wanted = run.engine.sum([wanted_here])[0]
    result = None
    failure = None
    with run.engine.gathered_weights() if wanted else nullcontext():
        if wanted_here:
            try:
                result = evaluate_model(
                    run.model,
                    [dev.path for dev in config.data.dev],
                    config,
                    limit=config.evaluation.dev_images,
                    counterfactual_texts=config.evaluation.dev_counterfactual_texts,
                    epochs=run.epochs,
                )
            except ShardError as error:  # the others wait below: all end alike
                failure = error
        run.engine.wait()
    ignored = _tell(run, result) if result else ""
    run.model.train()
    is_ignored, has_failed = run.engine.sum([bool(ignored), failure is not None])
    if has_failed:
        _save_once(run)
        raise failure or ShardError("the main process cannot score the dev sets")
    if is_ignored and run.epochs >= 1 and config.train.stop_if_image_ignored:
        raise GuardError(
            f"train.stop_if_image_ignored: after step {run.state.step} the images are ignored "
            f"({ignored})"
        )


def _tell(run: Run, result: Evaluation) -> str:
    """Shows and tracks the scores. Returns why images count as ignored, "" where they do not."""
    figures = {**result.metrics(), "unreadable_samples": result.unreadable}
    run.track("dev", figures)
    run.tracker.predictions(result.shown_images, run.state.step)
    words = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    run.terminal.say(f"step {run.state.step}: {words}")
    run.terminal.answers(result.shown_images)
    ignored = ""
    for task, scored in result.tasks.items():
        if use := scored.image_use:
            run.terminal.say(f"{task}: {use.verdict}: {use.reason}")
            if use.verdict == "image ignored":
                ignored = f"{task}: {use.reason}"
    return ignored


def _save_once(run: Run) -> None:
    """Saves, unless this step is saved; all ranks alike."""
    is_saved = checkpoints.place(run.config.out_dir, run.state.step).exists()
    if not run.engine.sum([run.engine.is_main and is_saved])[0]:
        save(run)


def save(run: Run) -> None:
    """Gathers on all ranks, writes on one."""
    engine = run.engine
    weights = engine.trained_state()
    optimizer = engine.optimizer_state()
    if engine.is_main:
        document = {
            "step": run.state.step,
            "train": asdict(run.state),
            "scaler": engine.scaler_state(),
            "config": run.config.model_dump(mode="json"),
            "run_id": run.tracker.run_id,
            "world_size": engine.world_size,
        }
        written = checkpoints.write(
            run.config.out_dir,
            run.state.step,
            lambda folder: run.model.save_pretrained(folder, weights),
            optimizer,
            document,
        )
        keep = run.config.train.keep_checkpoints
        checkpoints.prune(run.config.out_dir, run.state.step, keep)
        run.tracker.checkpoint(written.path, written.digest, run.state.step)
    engine.wait()
