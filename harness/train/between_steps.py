"""What is due between two steps: save, evaluate on the dev sets, look at a few images."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from harness.config.schema import Config
from harness.data.images import cache_of, patience_of
from harness.errors import GuardError
from harness.evaluate.image_use.evidence import IMAGE_IGNORED
from harness.evaluate.image_use.verdict import SAME_TOKENS_ADVICE, told_same_tokens
from harness.evaluate.results import Evaluation
from harness.evaluate.run import evaluate_model
from harness.evaluate.small_gate import Look, SmallSet, small_gate_metrics, small_set
from harness.evaluate.told import described, left_out, score_line, verdict_lines
from harness.machine.dealing import Alone, StoppedError
from harness.train.last_report import leave_report
from harness.train.saving import Saver
from harness.train.state import Run, StepResult
from harness.train.step import StepLog
from shards.files import ShardError, UnreachableError
from shards.manifest import Manifest


class Due(NamedTuple):
    """What came of the work between two steps."""

    stops: bool = False  # a signal has cut it off
    ends: bool = False  # train.early_stop


class BetweenSteps:
    """All that a config asks for after a step; all ranks alike."""

    def __init__(
        self,
        run: Run,
        saver: Saver,
        log: StepLog,
        last_step: int,
        stop_asked: Callable[[], int],
    ) -> None:
        self.run = run
        self.saver = saver
        self.log = log
        self.stop_asked = stop_asked
        self.dealer = run.engine.dealer(stop_asked)
        self.last_step = last_step
        self._small: SmallSet | None = None  # made when it is first needed

    def is_nothing_left(self) -> bool:
        """Tells whether the run is at its end; makes up for an evaluation that was cut off."""
        run = self.run
        step = run.state.step
        is_end = step >= self.last_step
        if step and (is_end or self._is_evaluation_due()):
            # the earlier process may have been killed inside it
            self._evaluate(is_saved=True, again=False, is_last=is_end)
        why = self.saver.best.has_stopped()
        has_stopped = run.engine.sum([why != ""])[0] > 0
        if is_end or has_stopped:
            run.terminal.say(
                f"nothing is left to do: {run.config.out_dir} stands at step {step} "
                f"of {self.last_step}{'; ' if why else ''}{why}"
            )
        return is_end or has_stopped

    def do_what_is_due(self, step: StepResult) -> Due:
        """Saves first: a crash in the evaluation then loses nothing."""
        run = self.run
        train = run.config.train
        self.saver.check()
        is_end = run.state.step == self.last_step
        saves = is_end or step.saves or self._is_due(train.save_every)
        if saves:
            self.saver.save(at_once=is_end)
        if is_end or self._is_evaluation_due():
            due = self._evaluate(saves, is_last=is_end)
            if due.stops or due.ends:
                self.saver.save_once()
            return due
        looks = train.image_use_every and run.config.data.dev and not train.objective
        if looks and self._is_due(train.image_use_every):
            self._look()
        return Due()

    def _evaluate(self, is_saved: bool, again: bool = True, is_last: bool = False) -> Due:
        """Evaluates, keeps the best checkpoint, and tells whether the run has got no better. The
        last evaluation leaves the run's report.
        """
        run = self.run
        best = self.saver.best
        try:
            with run.clock.during("evaluation"):
                evaluated = evaluate(run, self.dealer, self.stop_asked, again)
        except ShardError:
            self.saver.save_once()
            raise
        self.log.tell_speed()
        result = evaluated[1]
        figures = _figures(result) if result else None
        is_best = figures is not None and best.is_new(figures)
        why = best.has_stopped(figures) if figures is not None else ""
        told = run.engine.sum([is_best, why != ""])
        if told[0]:
            self.saver.keep_as_best(is_saved)
        if why:
            run.terminal.say(why)
        due = Due(evaluated[0], told[1] > 0)
        if (is_last or due.ends) and not due.stops:
            with run.clock.during("evaluation"), run.engine.gathered_weights():
                # the others wait by the store, however long it takes
                self.dealer.lead(lambda: leave_report(run, result) if result else None, dict)
        return due

    def _is_due(self, every: int | None) -> bool:
        """Tells whether `every` steps are over; None: whether an epoch is."""
        if every is None:
            return self.run.is_end_of_epoch
        return self.run.state.step % every == 0

    def _is_evaluation_due(self) -> bool:
        return self.run.is_end_of_epoch or self._is_due(self.run.config.train.evaluate_every)

    def _look(self) -> None:
        """Asks the gate on a few dev images."""
        run = self.run

        def look() -> Look:
            if self._small is None:
                self._small = small_set(run.model, run.config)
            return Look(run.model, self._small, run.config, run.epochs, self.dealer)

        with run.engine.gathered_weights(), suppress(StoppedError):
            try:
                uses = self.dealer.lead(
                    lambda: look().uses(), lambda: look().work(), (ShardError, UnreachableError)
                )
            except ShardError as error:  # the next evaluation ends the run, on all ranks
                run.terminal.say(f"no look at dev images: {error}")
            else:
                run.track("gate", small_gate_metrics(uses or {}))
                shares = [use.image_share for use in (uses or {}).values()]
                if same := next(filter(None, map(told_same_tokens, shares)), ""):
                    run.terminal.say(f"step {run.state.step}: {same}; {SAME_TOKENS_ADVICE}")
        run.model.train()


def evaluate(
    run: Run, dealer: Alone, stop_asked: Callable[[], int], again: bool = True
) -> tuple[bool, Evaluation | None]:
    """Scores on the dev sets, and answers for the same images as always, on all ranks.

    `again` False: only where this step's answers are not there yet. Returns whether a signal came,
    which ends it at the next batch, and on the main process what was found. Raises GuardError as
    `stop_if_image_ignored` says; ShardError for a dev set that cannot be scored, UnreachableError
    for one that does not answer; all on all ranks.
    """
    config = run.config
    page = config.out_dir / "answers" / f"step-{run.state.step:06d}.html"
    wanted_here = run.engine.is_main and bool(config.data.dev) and (again or not page.exists())
    result: Evaluation | None = None
    if run.engine.sum([wanted_here])[0]:
        with run.engine.gathered_weights(), suppress(StoppedError):
            result = _scored(run, dealer)
    ignored = _tell(run, result) if result else ""
    run.model.train()
    told = run.engine.sum([bool(ignored), stop_asked() > 0])
    if told[0] and run.epochs >= 1 and config.train.stop_if_image_ignored:
        raise GuardError(
            f"train.stop_if_image_ignored: after step {run.state.step} the images are ignored "
            f"({ignored})"
        )
    return told[1] > 0, result


def _scored(run: Run, dealer: Alone) -> Evaluation | None:
    """Evaluates. Returns what was found on the main process. Raises ShardError and StoppedError on
    all ranks.
    """
    config = run.config
    run.engine.heart.doing("evaluates")
    with run.terminal.evaluation(_dev_sets(config)) as show:

        def go_on(done: int, total: int, about: str = "images") -> None:
            run.engine.heart.doing(f"evaluates, {done} of {total} {about} done")
            if about == "images":
                show(done, total)

        return evaluate_model(
            run.model,
            [dev.path for dev in config.data.dev],
            config,
            limit=config.evaluation.dev_images,
            counterfactual_texts=config.evaluation.dev_counterfactual_texts,
            progress=go_on,
            epochs=run.epochs,
            floors=False,
            dealer=dealer,
        )


def _dev_sets(config: Config) -> str:
    """Says on how much is evaluated: "400 dev images with 2,000 texts"; of a set that cannot be
    opened the evaluation tells.
    """
    images = 0
    texts = 0.0
    about = ""
    for dev in config.data.dev:
        try:
            manifest = Manifest.open(dev.path, cache_of(config), patience_of(config))
        except ShardError:
            return "dev images"
        read = min(manifest.samples, config.evaluation.dev_images or manifest.samples)
        about = "about " if read < manifest.samples else about
        images += read
        texts += manifest.texts * read / max(manifest.samples, 1)
    return f"{images:,} dev images with {about}{texts:,.0f} texts"


def _figures(result: Evaluation) -> dict[str, float]:
    return {**result.metrics(), "unreadable_samples": result.unreadable}


def _tell(run: Run, result: Evaluation) -> str:
    """Shows and tracks the scores. Returns why images count as ignored, "" where they do not."""
    figures = _figures(result)
    run.track("dev", figures)
    run.tracker.predictions(result.shown_images, run.state.step)
    tasks = result.by_task()
    run.tracker.describe(described(f"dev, step {run.state.step}", tasks))
    run.terminal.say(f"after step {run.state.step}, {run.epochs:.3g} epochs:")
    for task, known in tasks.items():
        run.terminal.say(f"  {score_line(task, known)}")
        if told := left_out(known):
            run.terminal.say(f"  {told}")
    run.terminal.answers(result.shown_images)
    ignored = ""
    for task, scored in result.tasks.items():
        for name, use in scored.uses.items():
            where = f"{task}, {name}" if len(scored.uses) > 1 else task
            run.terminal.say("\n".join(verdict_lines(where, use.to_dict())))
            if use.verdict == IMAGE_IGNORED:
                ignored = f"{where}: {use.reason}"
    return ignored
