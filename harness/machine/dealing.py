"""Work dealt out over the ranks of a run: rank 0 leads, the others do what they are told.

A piece of work has a name and takes items, each done whole by one rank; what comes back is in the
order of the items, so that it does not depend on how many ranks there are. Orders and results pass
through the store by which the ranks have met, as JSON: no collective is open while a rank waits, so
that no watchdog of NCCL ends a long wait and no rank must make as many passes as another.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import numpy as np

CHUNK = 2**22  # bytes of a value of the store, which takes 8 MiB at most
LONGEST_NAP = 0.05  # seconds between two looks for what another rank is to write

Item = Sequence[Any]  # the arguments of a piece of work: JSON
Work = Mapping[str, Callable[..., Any]]  # by name


class Progress(Protocol):
    """Told what is done of how many, and `about` which of several parts that follow each other."""

    def __call__(self, done: int, total: int, /, about: str = ...) -> None: ...


class StoppedError(Exception):
    """Some rank was asked to stop."""


class RankError(Exception):
    """Another rank could not do its part, whose own account has the traceback."""

    is_for_user = True


class Alone:
    """One process, which does everything itself."""

    rank = 0
    world_size = 1

    def __init__(self, stop_asked: Callable[[], Any] = bool) -> None:
        """`stop_asked`: tells whether this process was asked to stop."""
        self._stop_asked = stop_asked

    def lead(
        self, main: Callable[[], Any], work: Callable[[], Work], errors: Sequence[type] = ()
    ) -> Any:
        """Returns what `main` returns on rank 0, which deals out work in it; None on the others,
        once they have done what they were told of what `work` returns. StoppedError and those of
        the `errors` that end `main` are raised on all ranks, anything else as RankError.
        """
        return main()

    def close(self) -> None:
        """Keeps all ranks until rank 0 is done, whose store it may be."""

    def everywhere(self, name: str, item: Item, do: Callable[..., Any]) -> Any:
        """Has every rank do this item, and returns what comes of it here: of `do`, which the other
        ranks know by its `name`.
        """
        return do(*item)

    def dealt(self, name: str, items: Sequence[Item], do: Callable[..., Any]) -> Iterator[Any]:
        """Yields what comes of each item, in their order: of `do` here, of the work of this `name`
        on the other ranks. Raises StoppedError after an item, and what one raises.
        """
        for item in items:
            yield do(*item)
            if self._stop_asked():
                raise StoppedError


class Among(Alone):
    """One of several ranks, which share a store."""

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        stop_asked: Callable[[], Any] = bool,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """`store`: torch's, of this dealing alone; `waiting`: surrounds a wait for another rank."""
        super().__init__(stop_asked)
        self.rank = rank
        self.world_size = world_size
        self._store = store
        self._waiting = waiting
        self._orders = 0  # so far, the same number on every rank
        self._errors: dict[str, type] = {}

    def lead(
        self, main: Callable[[], Any], work: Callable[[], Work], errors: Sequence[type] = ()
    ) -> Any:
        self._errors = {kind.__name__: kind for kind in (*errors, StoppedError)}
        if self.rank:
            return self._follow(work)
        ended: Any = None
        try:
            return main()
        except BaseException as error:
            ended = self._as_told(error)
            raise
        finally:
            self._order({"ends": True, "error": ended})

    def everywhere(self, name: str, item: Item, do: Callable[..., Any]) -> Any:
        return self._round(name, [item] * self.world_size, do)[0]

    def dealt(self, name: str, items: Sequence[Item], do: Callable[..., Any]) -> Iterator[Any]:
        for start in range(0, len(items), self.world_size):
            yield from self._round(name, items[start : start + self.world_size], do)

    def _round(self, name: str, items: Sequence[Item], do: Callable[..., Any]) -> list[Any]:
        """Has rank i do item i, and returns what came of them, once every rank has answered."""
        number = self._order({"do": name, "items": items})
        told = [self._done(do, items[0])]
        told += [self._take(f"{number}/{rank}") for rank in range(1, self.world_size)]
        self._store.delete_key(f"{number}/order")
        if "cause" in told[0]:
            raise told[0]["cause"]
        for rank, came in enumerate(told):
            self._raise(came.get("error"), rank)
        if any(came["stop"] for came in told):
            raise StoppedError
        return [came["value"] for came in told[: len(items)]]

    def close(self) -> None:
        if self.rank:
            self._take("closing", is_mine=False)
            self._put(f"closing/{self.rank}", True)
            return
        self._put("closing", True)
        for rank in range(1, self.world_size):
            self._take(f"closing/{rank}")

    def _follow(self, work: Callable[[], Work]) -> None:
        """Does what rank 0 says, until it says that this is all."""
        ready = self._done(work, ())  # what fails is told when it is asked for
        while True:
            self._orders += 1
            order = self._take(f"{self._orders}/order", is_mine=False)
            if "ends" in order:
                try:
                    self._raise(order["error"], 0)
                except Exception as error:
                    error.is_told = True  # type: ignore[attr-defined]  # by rank 0
                    raise
                return
            came = ready
            if "error" not in ready:
                came = {"value": None, "stop": False}
                if self.rank < len(order["items"]):
                    came = self._done(ready["value"][order["do"]], order["items"][self.rank])
            told = {key: value for key, value in came.items() if key != "cause"}
            self._put(f"{self._orders}/{self.rank}", told)
            if "error" in told and told["error"][0] not in self._errors:
                raise came["cause"]

    def _done(self, do: Callable[..., Any], item: Item) -> dict[str, Any]:
        """Does an item, and returns what is told of it."""
        try:
            value = do(*item)
        except Exception as error:
            return {"error": self._as_told(error), "cause": error}
        return {"value": value, "stop": bool(self._stop_asked())}

    def _as_told(self, error: BaseException) -> list[str]:
        kind = type(error).__name__
        return [kind, str(error) if kind in self._errors else f"{kind}: {error}"]

    def _raise(self, error: Sequence[str] | None, rank: int) -> None:
        """Raises again what a rank has told of, if it has."""
        if error is None:
            return
        kind, sentence = error
        if kind in self._errors:
            raise self._errors[kind](sentence)
        raise RankError(f"rank {rank} could not do its part of the work: {sentence}")

    # ---- the store -------------------------------------------------------------------------------

    def _order(self, order: dict[str, Any]) -> int:
        self._orders += 1
        self._put(f"{self._orders}/order", order)
        return self._orders

    def _put(self, key: str, value: Any) -> None:
        data = json.dumps(value, default=_array_as_json).encode()
        parts = range(CHUNK, len(data), CHUNK)
        for number, start in enumerate(parts):
            self._store.set(f"{key}/{number}", data[start : start + CHUNK])
        self._store.set(key, f"{len(parts)} ".encode() + data[:CHUNK])  # last: all is there

    def _take(self, key: str, is_mine: bool = True) -> Any:
        """Returns what is written at a key, once it is; removes it there, if nobody else reads."""
        with self._waiting():
            nap = 0.001
            while not self._store.check([key]):
                time.sleep(nap)
                nap = min(LONGEST_NAP, 1.2 * nap)
            first = self._store.get(key)
            end = first.index(b" ")
            rest = [f"{key}/{number}" for number in range(int(first[:end]))]
            data = first[end + 1 :] + b"".join(self._store.get(name) for name in rest)
        for name in (key, *rest) if is_mine else ():
            self._store.delete_key(name)
        return json.loads(data, object_hook=_array_of_json)


def _array_as_json(value: Any) -> Any:
    """Returns an array as JSON takes it, bit for bit, and a number of NumPy as one of Python."""
    if isinstance(value, np.generic):
        return value.item()
    data = base64.b64encode(np.ascontiguousarray(value).tobytes()).decode()
    return {"dtype": value.dtype.str, "shape": value.shape, "base64": data}


def _array_of_json(value: dict[str, Any]) -> Any:
    if value.keys() != {"dtype", "shape", "base64"}:
        return value
    data = bytearray(base64.b64decode(value["base64"]))
    return np.frombuffer(data, np.dtype(value["dtype"])).reshape(value["shape"])
