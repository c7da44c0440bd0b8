"""Signs of life among the ranks of a run: one that is silent while the others wait for it is told
of, then the run is ended; without them, it would wait for as long as the process group does.

Every rank's thread writes what its main thread does into the store by which the ranks have met, and
reads what the others wrote. A stopped process, or one that holds the interpreter's lock, writes
nothing. One that writes is alive, however long it evaluates, saves or reads: it is told of alone.
Times are this process's own, so no clocks are compared.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

from torch import distributed

from harness.machine.signals import STOPS

HUNG = 75  # exit code of a run that was ended because a rank is silent: sysexits' "try again"
AFTER_STOP = 15.0  # seconds that a silent rank is given once the run was asked to stop
# Seconds between two beats: more where many ranks share the store, less where limits are short.
PERIOD = 1.0
SAVING = "checkpoint"  # the thread that writes one beside training, which is waited for
SAVING_SECONDS = 20.0
SLEPT = 10.0  # seconds in which this process itself cannot have run: then nobody is judged


@dataclass
class Sign:
    """The last of another rank: what it wrote, and when that was another than before."""

    heard: float
    text: bytes = b""
    host: str = "?"
    doing: str = "has not begun"
    busy: float = 0.0  # seconds since its main thread last got on
    waits: bool = False  # for the others
    alone: bool = False  # at work that needs no other rank


class Heartbeat:
    """This rank's signs, and its watch over the others'; nothing where it is the only one."""

    _made = count()

    def __init__(
        self,
        rank: int,
        world_size: int,
        tell_after: float,
        end_after: float,
        again: str = "go on with --resume auto",
    ) -> None:
        """Begins at once. `tell_after`, `end_after`: seconds of silence while others wait; `again`:
        what is to be done once all have ended.
        """
        self._again = again
        self.rank = rank
        self.tell_after = tell_after
        self.end_after = end_after
        self.period = min(PERIOD * max(1, world_size / 64), tell_after / 4)
        self.now = Sign(time.monotonic(), host=socket.gethostname(), doing="sets up")
        self._keys = []
        self._signs = {r: Sign(time.monotonic()) for r in range(world_size) if r != rank}
        self._exchanged = time.monotonic()  # when the store last answered
        self._told: set[tuple[int, str]] = set()
        self._signals: list[int] = []
        self._ended = threading.Event()
        if world_size == 1:
            return
        self._run = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(self._made)}"
        self._keys = [f"heartbeat/{self._run}/{r}" for r in range(world_size)]
        self._listen()
        for work in (self._exchange, self._watch):
            threading.Thread(target=work, name="heartbeat", daemon=True).start()

    def doing(self, what: str, alone: bool = False) -> None:
        """Notes that the main thread got on, and with what; `alone`: it needs no other rank."""
        self.now.doing = what
        self.now.alone = alone
        self.now.heard = time.monotonic()
        self._told.clear()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Surrounds a meeting of all ranks."""
        alone = self.now.alone
        self.now.alone = False
        self.now.waits = True
        try:
            yield
        finally:
            self.now.waits = False
            self.doing(self.now.doing, alone)

    def store(self, name: str) -> Any:
        """Returns a part of the store by which these ranks have met, of this name alone."""
        return distributed.PrefixStore(f"{name}/{self._run}", _store())

    def stop(self) -> None:
        """Ends the watch, before the ranks part."""
        self._ended.set()

    # ---- the two threads: one may wait for the store, the other never waits ----------------------

    def _exchange(self) -> None:
        """Writes this rank's sign and reads the others'; what goes wrong is silence."""
        store: Any = None
        for beat in count():
            try:
                store = store or _store()
                busy = time.monotonic() - self.now.heard
                mine = {
                    **{"beat": beat, "host": self.now.host, "doing": self.now.doing, "busy": busy},
                    **{"waits": self.now.waits, "alone": self.now.alone},
                }
                store.set(self._keys[self.rank], json.dumps(mine))
                if store.check(self._keys):
                    self._read(store.multi_get(self._keys))
                self._exchanged = time.monotonic()
            except RuntimeError:  # torch's errors of stores
                store = None
            if self._ended.wait(self.period):
                return

    def _read(self, texts: list[bytes]) -> None:
        for rank, sign in self._signs.items():
            if texts[rank] != sign.text:
                sign.text = texts[rank]
                sign.heard = time.monotonic()
                for name, value in json.loads(texts[rank]).items():
                    setattr(sign, name, value)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._ended.wait(self.period):
            now = time.monotonic()
            if now - last > SLEPT:  # this process was stopped or starved, so it cannot judge
                self._exchanged = now
                for sign in self._signs.values():
                    sign.heard = now
            last = now
            self._look(now)

    def _look(self, now: float) -> None:
        """Tells of ranks that keep the others waiting, and ends the run where one is silent."""
        self._hear_signals()
        waited = now - self.now.heard
        unreachable = now - self._exchanged
        silent = {rank: min(waited, now - sign.heard) for rank, sign in self._signs.items()}
        if unreachable >= self.tell_after:  # no rank can be judged, but the one that has the store
            silent = {0: min(waited, unreachable)} if self.rank and _is_store_of_rank_0() else {}
        limit = AFTER_STOP if self._signals else self.end_after
        ended = [rank for rank, seconds in silent.items() if seconds >= limit]
        suspects = {rank for rank, seconds in silent.items() if seconds >= self.tell_after}
        speaks = self.rank == min({self.rank, *self._signs} - suspects - set(ended))
        others = [self._signs[rank] for rank in silent if rank not in ended]
        if ended and not any(sign.alone for sign in (self.now, *others)):
            self._end(ended[0], silent[ended[0]], speaks)
        for rank in suspects if speaks else ():
            self._tell(rank, "silent", silent[rank], "the others wait for it")
        waiting = [rank for rank, sign in self._signs.items() if sign.waits]
        if self.now.waits and self.rank == min([self.rank, *waiting]):
            for rank, sign in self._signs.items():
                if rank not in suspects and not sign.waits and sign.busy >= self.tell_after:
                    self._tell(rank, "busy", sign.busy, "it lives, so the others wait")

    def _tell(self, rank: int, what: str, seconds: float, and_so: str) -> None:
        sign = self._signs[rank]
        if (rank, what) not in self._told:  # once, until this rank gets on
            self._told.add((rank, what))
            sentence = f"rank {rank} on {sign.host} has been {what} for {seconds:.0f} s, last: "
            _say(f"{sentence}{sign.doing}; {and_so}", self.rank)

    def _end(self, rank: int, seconds: float, speaks: bool) -> None:
        sign = self._signs[rank]
        if speaks:
            reason = "the run was asked to stop" if self._signals else "train.rank_timeout_seconds"
            _say(
                f"the run ends: rank {rank} on {sign.host} has been silent for {seconds:.0f} s "
                f"while the others wait for it ({reason}); what it did last: {sign.doing}. It is "
                f"stopped or stuck; {self._again}",
                self.rank,
            )
        else:
            time.sleep(2)  # a launcher ends all with the first
        for thread in threading.enumerate():
            if thread.name == SAVING:
                thread.join(SAVING_SECONDS)
        os._exit(128 + self._signals[0] if self._signals else HUNG)

    # ---- signals, whose handlers in Python wait until the main thread is back from its meeting ---

    def _listen(self) -> None:
        pipe = os.pipe()
        for end in pipe:
            os.set_blocking(end, False)
        self._wakeup = pipe[0]
        signal.set_wakeup_fd(pipe[1], warn_on_full_buffer=False)

    def _hear_signals(self) -> None:
        with suppress(BlockingIOError):
            self._signals += [n for n in os.read(self._wakeup, 100) if n in STOPS]
        if len(self._signals) > 2:
            os._exit(128 + self._signals[0])


def _say(sentence: str, rank: int) -> None:
    who = f", rank {rank}" if rank else ""
    os.write(2, f"harness{who}: {sentence}\n".encode())


@contextmanager
def meeting(seconds: float) -> Iterator[None]:
    """Surrounds the first meeting of the ranks; tells after so many seconds that some have not
    come.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    sentence = (
        f"waiting at {place} for the other processes, {size} in all as WORLD_SIZE says; where "
        "nobody has started them, `unset RANK WORLD_SIZE LOCAL_RANK`"
    )
    timer = threading.Timer(seconds, _say, (sentence, rank))
    timer.daemon = True
    if size > 1:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _store() -> Any:
    """Returns a connection of its own to where the ranks have met."""
    address = os.environ["MASTER_ADDR"]
    port = int(os.environ["MASTER_PORT"])
    return distributed.TCPStore(address, port, timeout=timedelta(seconds=30))


def _is_store_of_rank_0() -> bool:
    """Tells whether rank 0 itself has the store; under torchrun its launcher has."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
