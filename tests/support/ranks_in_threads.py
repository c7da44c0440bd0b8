"""Several ranks in one process, each in a thread of its own, to deal work out cheaply."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import distributed

from harness.machine.dealing import Among


def on_ranks(world_size: int, do: Callable[[Among], Any], **given: Any) -> list[Any]:
    """Returns what `do` gives or raises on each rank; `given`: further arguments of `Among`."""
    store = distributed.HashStore()

    def done(rank: int) -> Any:
        try:
            return do(Among(store, rank, world_size, **given))
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(done, range(world_size)))
