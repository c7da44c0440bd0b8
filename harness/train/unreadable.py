"""How many images could not be read in this epoch, over all ranks, and the end of a run that would
learn from the rest of its data as if it were all.
"""

from __future__ import annotations

from collections import Counter

from harness.train.saving import Saver
from harness.train.state import Run, StepResult
from harness.train.together import gathered
from shards.files import ShardError
from shards.quarantine import count_fault, summary


def check_unreadable(run: Run, saver: Saver, step: StepResult) -> None:
    """Raises ShardError, with what is wrong by set and kind, once this step took the run beyond
    `data.max_unreadable`; saves first. All ranks alike.
    """
    share = run.config.data.max_unreadable
    too_many = run.loader.too_many_unreadable(run.state.unreadable, share)
    if not too_many or not any(step.unreadable):  # a resumed run whose data was mended goes on
        return
    saver.save_once()
    faults: Counter = Counter()
    for rank in gathered(list(run.loader.faults.items()), run.engine):
        for (folder, kind), n in rank:
            count_fault(faults, (folder, kind), n)
    raise ShardError(
        f"stopped after step {run.state.step}, which is saved: {too_many}; found: {summary(faults)}"
    )
