"""The order, nothing else: (seed, epoch, position) -> which sample of which set. No reading, no
torch.

Shard sizes and a seed go in; any slice of any epoch comes out, at the cost of the windows it
touches and not of what lies before it. Every rank and every worker computes its own part of the
same order, so none has to be told anything.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from shards.files import is_count

_KEPT_WINDOWS = 2  # a batch that crosses from one window into the next needs both
_WORD = 2**64


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a run is in its data: `position` images of `epoch` are used; `digest` names the order
    they belong to.

    (e, all images) and (e + 1, 0) are the same place.
    """

    epoch: int
    position: int
    digest: str

    def to_json(self) -> dict[str, int | str]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> StreamState:
        """Reads the dict of `to_json`. Raises ValueError, naming the field."""
        for name, kind in (("epoch", int), ("position", int), ("digest", str)):
            value = fields.get(name)
            if not (is_count(value) if kind is int else type(value) is str):
                raise ValueError(
                    f"stream state: {name} is {value!r}, expected "
                    f"{'a count' if kind is int else 'text'}"
                )
        return cls(fields["epoch"], fields["position"], fields["digest"])


def deal(n: int, rank: int, world: int) -> slice:
    """Returns the part of a global batch of `n` that `rank` of `world` gets; parts differ by one at
    most.
    """
    return slice(n * rank // world, n * (rank + 1) // world)


def permutation(n: int, seed: int, salt: int, epoch: int, stream: int) -> np.ndarray:
    """Returns a permutation of range(n), int64, keyed by (seed, salt) and numbered by (epoch,
    stream).

    Made of Philox's raw words alone, since numpy promises those, and not `Generator.permutation`,
    to stay the same in every version. The item's number in the low bits makes all keys different:
    no tie for a sort to break its own way.
    """
    counter = np.array([0, 0, epoch % _WORD, stream % _WORD], np.uint64)
    words = np.random.Philox(
        key=np.array([seed % _WORD, salt % _WORD], np.uint64), counter=counter
    ).random_raw(n)
    low = np.uint64((1 << max(n - 1, 0).bit_length()) - 1)
    keys = (words & ~low) | np.arange(n, dtype=np.uint64)
    keys.sort()
    return (keys & low).astype(np.int64)


def _check_positions(start: int, stop: int, samples: int) -> None:
    if not 0 <= start <= stop <= samples:
        raise ValueError(f"positions {start} to {stop} are not in an epoch of {samples} samples")


class Order:
    """The order of one set. Shards are permuted; samples are shuffled inside a window of
    `window_shards` of them.

    Holds two prefix sums over shards for one epoch and two windows: 10^8 samples in 10^5 shards
    take 1.7 MB.
    """

    def __init__(
        self,
        samples_per_shard: Sequence[int],
        seed: int,
        window_shards: int,
        shuffle: bool = True,
        salt: int = 0,
    ):
        """Takes a `salt`, which tells the sets of a mixture apart, which would else be shuffled
        alike.
        """
        self.sizes = np.asarray(samples_per_shard, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.samples = int(self.starts[-1])
        self.seed = seed
        self.salt = salt
        self.window_shards = window_shards
        self.shuffle = shuffle
        self._epoch: int | None = None
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def epoch_indices(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Returns the samples at positions [start, stop) of an epoch, as int64 indices into the set
        in shard order.
        """
        _check_positions(start, stop, self.samples)
        if not self.shuffle:
            return np.arange(start, stop)
        if epoch != self._epoch:
            self._permute_shards(epoch)
        parts = [np.empty(0, np.int64)]
        while start < stop:
            window = int(np.searchsorted(self._window_starts, start, side="right")) - 1
            first = int(self._window_starts[window])
            after = int(self._window_starts[window + 1])
            parts.append(self._window(epoch, window)[start - first : min(stop, after) - first])
            start = min(stop, after)
        return np.concatenate(parts)

    def _permute_shards(self, epoch: int) -> None:
        self._shards = permutation(len(self.sizes), self.seed, self.salt, epoch, 0)
        ends = np.concatenate([[0], np.cumsum(self.sizes[self._shards])])
        self._window_starts = np.append(ends[: -1 : self.window_shards], ends[-1])
        self._epoch = epoch

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Returns all samples of a window in their shuffled order."""
        cached = self._windows.pop((epoch, window), None)
        if cached is None:
            shards = self._shards[window * self.window_shards : (window + 1) * self.window_shards]
            samples = np.concatenate(
                [np.arange(self.starts[s], self.starts[s + 1]) for s in shards]
            )
            cached = samples[permutation(len(samples), self.seed, self.salt, epoch, window + 1)]
        self._windows[epoch, window] = cached
        while len(self._windows) > _KEPT_WINDOWS:
            self._windows.popitem(last=False)
        return cached


class Interleave:
    """Which set the n-th pick takes, so that each set has its share at every moment (Webster /
    Sainte-Laguë).

    Set s would like its j-th pick at time (2j + 1) / (2 share_s); picks are taken in the order of
    these times. Whole numbers throughout, so that no rounding can make two machines disagree. A
    seek costs O(sets).
    """

    def __init__(self, shares: Sequence[int]):
        self.shares = list(shares)
        common = math.lcm(*self.shares)
        self._spacing = [common // share for share in self.shares]

    def picks(self, start: int, stop: int) -> tuple[list[int], list[int]]:
        """Returns (how many of the first `start` picks each set has, the sets of picks start to
        stop).
        """
        # At time t the sets together have had t * total picks, give or take half a pick each: begin
        # safely before.
        total = sum(self.shares)
        early = max(0, start - len(self.shares))
        counts = [
            (2 * early * share + total) // (2 * total) if early else 0 for share in self.shares
        ]
        queue = [
            ((2 * c + 1) * space, s)
            for s, (c, space) in enumerate(zip(counts, self._spacing, strict=True))
        ]
        heapq.heapify(queue)
        taken = []
        for n in range(sum(counts), stop):
            time, s = queue[0]
            heapq.heapreplace(queue, (time + 2 * self._spacing[s], s))
            if n < start:
                counts[s] += 1
            else:
                taken.append(s)
        return counts, taken


class Mixture:
    """Several orders as one.

    An epoch is as many picks as the sets have samples together. Without weights a set's share is
    its size, so every sample of every set comes exactly once an epoch, the sets mixed evenly. With
    weights the shares are the weights: each set runs through its own epochs at its own pace,
    whatever the epoch of the mixture, so that in one epoch of the mixture samples of a heavy set
    come several times and a light set is not finished; it goes on in the next.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float] | None = None):
        self.orders = tuple(orders)
        self.samples = sum(order.samples for order in self.orders)
        if not self.orders or any(order.samples == 0 for order in self.orders):
            raise ValueError("a mixture needs at least one set, and a sample in each")
        if weights is None:
            shares = [Fraction(order.samples) for order in self.orders]
        else:
            if len(weights) != len(self.orders) or not all(0 < w < math.inf for w in weights):
                raise ValueError(
                    f"weights {list(weights)}: expected {len(self.orders)} numbers above 0, one "
                    "a set"
                )
            shares = [Fraction(repr(float(weight))) for weight in weights]  # 0.7 is meant as 7/10
        self._shares = [share / sum(shares) for share in shares]
        scale = math.lcm(*(share.denominator for share in shares))
        self._interleave = Interleave([int(share * scale) for share in shares])

    def images_of(self, s: int) -> int:
        """Says how many picks of an epoch are of set `s`, give or take one."""
        return round(self._shares[s] * self.samples)

    def picks(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Returns positions [start, stop) of an epoch: int64 [stop - start, 3] of set, index in the
        set, epoch of the set.
        """
        _check_positions(start, stop, self.samples)
        counts, taken = self._interleave.picks(
            epoch * self.samples + start, epoch * self.samples + stop
        )
        sets = np.asarray(taken, np.int64)
        picks = np.empty((stop - start, 3), np.int64)
        picks[:, 0] = sets
        for s, order in enumerate(self.orders):
            rows = np.flatnonzero(sets == s)
            epochs, places = np.divmod(counts[s] + np.arange(len(rows)), order.samples)
            for own in np.unique(epochs).tolist():
                here = rows[epochs == own]
                first = int(places[epochs == own][0])
                picks[here, 1] = order.epoch_indices(own, first, first + len(here))
                picks[here, 2] = own
        return picks


class FirstOf:
    """The first `samples` picks of a mixture's epoch 0 and no others, shuffled anew in every epoch.

    A small data set cut out of a large one: holds all its picks, so `samples` is what fits into
    memory (24 bytes each).
    """

    def __init__(self, mixture: Mixture, samples: int, seed: int):
        if not 0 < samples <= mixture.samples:
            raise ValueError(
                f"the first {samples} images are asked for, the sets hold {mixture.samples}"
            )
        self.samples = samples
        self.seed = seed
        self._picks = mixture.picks(0, 0, samples)
        self._epoch: int | None = None

    def indices_of(self, s: int) -> np.ndarray:
        """Says which samples of set `s` are among them."""
        return self._picks[self._picks[:, 0] == s, 1]

    def images_of(self, s: int) -> int:
        """Returns what `Mixture.images_of` does."""
        return len(self.indices_of(s))

    def picks(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Returns what `Mixture.picks` does."""
        _check_positions(start, stop, self.samples)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(self.samples, self.seed, 0, epoch, 0)
        picks = self._picks[self._order[start:stop]]
        picks[:, 2] = epoch
        return picks
