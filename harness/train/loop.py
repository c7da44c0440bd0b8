"""The training loop, to be read from top to bottom. Knows no engine by name.

    accelerate launch -m harness.train configs/demo.yaml train.epochs=2
    harness train configs/demo.yaml train.epochs=2                the same
    harness train flickr8k_offline train.max_steps=20             a first look on a laptop

One optimizer step takes one whole global batch: every rank collates its micro-batches first, the
sum of target weights over all ranks is one all-reduce, and every micro-batch's loss is divided by
it. Never an average of averages.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import closing

from harness.train.between_steps import BetweenSteps
from harness.train.guards import RunGuard
from harness.train.saving import Saver
from harness.train.state import Run
from harness.train.step import StepLog, StepTaker, fetched
from harness.train.unreadable import check_unreadable
from shards.files import UnreachableError


def loop(run: Run, saver: Saver, stop_asked: Callable[[], int]) -> int:
    """Steps until the last epoch or `max_steps`, or until a signal came; all ranks alike.

    Returns the signal's number, 0 without one. Raises GuardError, UnreachableError where data do
    not answer, and ShardError for too many images that cannot be read; saves before the latter two.
    """
    try:
        return _steps(run, saver, stop_asked)
    except UnreachableError as error:
        if not run.state.step:
            raise
        saver.save_once()
        raise UnreachableError(
            f"{error}; the run is saved after step {run.state.step}: go on with --resume auto"
        ) from error


def _steps(run: Run, saver: Saver, stop_asked: Callable[[], int]) -> int:
    kind = StepTaker
    if run.config.train.objective:
        from harness.train.first_stage import FirstStageSteps

        kind = FirstStageSteps
    taker = kind(run, stop_asked, saver.is_due)
    global_batches = taker.batches()
    guard = RunGuard(run)
    log = StepLog(run)
    clock = run.clock
    between = BetweenSteps(run, saver, log, taker.last_step, stop_asked)
    if between.is_nothing_left():
        return stop_asked()
    run.model.train()
    heart = run.engine.heart
    heart.doing(f"reads the images of step {run.state.step + 1}", alone=True)
    clock.enter("data")
    with run.terminal.progress(taker.last_step, run.state.step), closing(global_batches) as batches:
        for stream, share in fetched(batches, run):
            clock.enter("step")
            heart.doing(f"takes step {run.state.step + 1}")
            step = taker.take(stream, share)
            guard.check(step)
            is_end = step.stops or run.state.step == taker.last_step
            log.write(step, at_once=is_end)
            clock.enter("rest")
            if is_end:
                guard.check_frozen()
            if step.stops:  # who stops a run may give it seconds: the checkpoint, and no more
                saver.save(at_once=True)
                return stop_asked() or signal.SIGTERM
            check_unreadable(run, saver, step)
            due = between.do_what_is_due(step)
            if due.stops:
                return stop_asked() or signal.SIGTERM
            if is_end or due.ends:
                break
            clock.enter("data")
            heart.doing(f"reads the images of step {run.state.step + 1}", alone=True)
    return 0
