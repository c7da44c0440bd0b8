"""Whether two runs are one to the bit, and a run in a process of its own that may be killed."""

from __future__ import annotations

import os

from safetensors.torch import load_file

from harness import checkpoint as checkpoints
from harness.train.state import Observer
from toy_runs import losses


class AtStep(Observer):
    """A call of `act` when optimizer step `number` (1, 2, ... of the run) was taken.

    Before the step is checked, logged and saved.
    """

    def __init__(self, number, act):
        self.number = number
        self.act = act

    def step_taken(self, run, step):
        if run.state.step == self.number:
            self.act()


def final(out, step=8):
    place = checkpoints.place(out, step)
    return {
        **load_file(place / "model" / "model.safetensors"),
        **load_file(place / checkpoints.OPTIMIZER),
    }


def same_bits(one, other):
    assert one.keys() == other.keys()
    assert len(one) > 100
    for name, value in one.items():
        assert value.equal(other[name]), name


def same_run(out, whole):
    same_bits(final(out), final(whole))
    assert losses(out) == losses(whole)


def forked(act):
    """Runs `act` in a process of its own and returns how that ended: its exit code, or minus the
    signal.
    """
    child = os.fork()
    if not child:
        try:
            act()
        except SystemExit as left:
            os._exit(left.code)
        finally:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
