"""The processes that a launcher has started to share one evaluation, whichever launcher it is.

They meet at torch's store alone: there is no process group, and so no backend, no collective and no
watchdog. Each takes the GPU of its place on the machine.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from datetime import timedelta

import torch
from torch import distributed
from torch.distributed.rendezvous import rendezvous

from harness.machine.dealing import Alone, Among
from harness.machine.heartbeat import Heartbeat, meeting
from harness.machine.ranks import settle

FIRST_MEETING = timedelta(minutes=10)


@contextmanager
def joined(tell_after: float, end_after: float) -> Iterator[Alone]:
    """Yields what deals work out among the launcher's processes; what those but the first say on
    stderr meanwhile is not shown.

    `tell_after`, `end_after`: seconds of silence of one that the others wait for, after which it is
    told of, and all end. Raises ConfigError where the launcher has said a half.
    """
    settle(os.environ)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Alone()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    with meeting(tell_after):
        met = next(rendezvous("env://", timeout=FIRST_MEETING))
    store, rank, size = met
    heart = Heartbeat(rank, size, tell_after, end_after, again="evaluate again")
    heart.doing("evaluates")
    dealer = Among(distributed.PrefixStore("dealt", store), rank, size, waiting=heart.waiting)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere) if rank else nullcontext():
        yield dealer
    dealer.close()
    heart.stop()
