"""The order, nothing else: (seed, epoch, position) -> which sample of which set. No reading, no
torch.

Shard sizes and a seed go in; any slice of any epoch comes out, at the cost of the windows it
touches and not of what lies before it. Every rank and every worker computes its own part of the
same order, so none has to be told anything.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from shards.files import is_count

_KEPT_WINDOWS = 2  # a batch that crosses from one window into the next needs both
_WORD = 2**64


@dataclass(frozen=True, slots=True)
class StreamState:
    """Where a run is in its data: `position` images of `epoch` are used; `digest` names the order
    they belong to, which has so many `lanes`.

    (e, all images) and (e + 1, 0) are the same place.
    """

    epoch: int
    position: int
    digest: str
    lanes: int = 1  # as in every state that was written before there were lanes

    def to_json(self) -> dict[str, int | str]:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> StreamState:
        """Reads the dict of `to_json`. Raises ValueError, naming the field."""
        fields = {"lanes": 1, **fields}
        for name, kind in (("epoch", int), ("position", int), ("digest", str), ("lanes", int)):
            value = fields.get(name)
            if not (is_count(value) if kind is int else type(value) is str):
                raise ValueError(
                    f"stream state: {name} is {value!r}, expected "
                    f"{'a count' if kind is int else 'text'}"
                )
        return cls(fields["epoch"], fields["position"], fields["digest"], fields["lanes"])


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


class Pieces(NamedTuple):
    """What a lane has of one set: whole shards or, of a set with few of them, parts of shards."""

    shards: np.ndarray  # int64, their numbers in the set
    firsts: np.ndarray  # int64, the first sample of each, counted in the set
    sizes: np.ndarray  # int64, samples

    @classmethod
    def whole(cls, samples_per_shard: Sequence[int] | np.ndarray) -> Pieces:
        """Returns all shards of a set."""
        sizes = np.asarray(samples_per_shard, np.int64)
        return cls(np.arange(len(sizes)), np.cumsum(sizes) - sizes, sizes)


def dealt_to_lanes(sets: Sequence[Sequence[int]], lanes: int) -> list[list[Pieces]]:
    """Returns for each lane what it has of each set, the same in every epoch; `sets`: samples per
    shard.

    Shards are dealt whole, the largest first, each to the lane that has least of its set (of lanes
    with as much, to the one that has least of all sets): a lane has at most one shard more than
    another. A set with fewer shards than lanes is cut into ranges of equal length, so that lanes
    beside each other share a shard. Raises ValueError for a set with fewer samples than lanes.
    """
    whole = [Pieces.whole(sizes) for sizes in sets]
    if lanes == 1:
        return [whole]
    of_all = [0] * lanes
    by_set = []
    for pieces in whole:
        if int(pieces.sizes.sum()) < lanes:
            raise ValueError(f"{int(pieces.sizes.sum())} samples are too few for {lanes} lanes")
        if is_cut(pieces.sizes, lanes):
            by_set.append(_in_ranges(pieces, lanes))
        else:
            by_set.append(_in_shards(pieces, of_all))
        of_all = [n + int(p.sizes.sum()) for n, p in zip(of_all, by_set[-1], strict=True)]
    return [list(lane) for lane in zip(*by_set, strict=True)]


def is_cut(sizes: Sequence[int] | np.ndarray, lanes: int) -> bool:
    """Tells whether a set has too few shards for each lane to have some of its own."""
    return lanes > 1 and int(np.count_nonzero(sizes)) < lanes


def _in_shards(pieces: Pieces, of_all: Sequence[int]) -> list[Pieces]:
    queue = [(0, others, lane) for lane, others in enumerate(of_all)]
    heapq.heapify(queue)
    dealt: list[list[int]] = [[] for _ in of_all]
    for shard in np.argsort(-pieces.sizes, kind="stable").tolist():
        held, others, lane = queue[0]
        dealt[lane].append(shard)
        heapq.heapreplace(queue, (held + int(pieces.sizes[shard]), others, lane))
    return [Pieces(*(column[sorted(shards)] for column in pieces)) for shards in dealt]


def _in_ranges(pieces: Pieces, lanes: int) -> list[Pieces]:
    samples = int(pieces.sizes.sum())
    ends = pieces.firsts + pieces.sizes
    dealt = []
    for lane in range(lanes):
        mine = deal(samples, lane, lanes)
        firsts = np.maximum(pieces.firsts, mine.start)
        sizes = np.minimum(ends, mine.stop) - firsts
        dealt.append(Pieces(pieces.shards[sizes > 0], firsts[sizes > 0], sizes[sizes > 0]))
    return dealt


class Order:
    """The order of one set, or of what a lane has of it. Shards are permuted; samples are shuffled
    inside a window of `window_shards` of them.

    Holds two prefix sums over shards for one epoch and two windows: 10^8 samples in 10^5 shards
    take 1.7 MB.
    """

    def __init__(
        self,
        shards: Sequence[int] | np.ndarray | Pieces,
        seed: int,
        window_shards: int,
        shuffle: bool = True,
        salt: int = 0,
    ):
        """Takes samples per shard, or pieces; and a `salt`, which tells the sets of a mixture
        and their lanes apart, which would else be shuffled alike.
        """
        self.pieces = shards if isinstance(shards, Pieces) else Pieces.whole(shards)
        self.samples = int(self.pieces.sizes.sum())
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
        parts = [np.empty(0, np.int64)]
        while start < stop:
            window = self.window_at(epoch, start)
            first = int(self._window_starts[window])
            after = int(self._window_starts[window + 1])
            parts.append(self._window(epoch, window)[start - first : min(stop, after) - first])
            start = min(stop, after)
        return np.concatenate(parts)

    def window_at(self, epoch: int, position: int) -> int:
        """Returns the number of the window that holds a position of an epoch."""
        if epoch != self._epoch:
            self._permute_shards(epoch)
        return int(np.searchsorted(self._window_starts, position, side="right")) - 1

    def windows_from(self, epoch: int, position: int) -> tuple[list[int], list[int]]:
        """Returns the shards of the window that holds a position, and those of the next one, which
        may be the first of the next epoch.
        """
        window = self.window_at(epoch, position)
        first = int(self._window_starts[window + 1])
        here = self.pieces.shards[self._pieces_of(window)].tolist()
        if first < self.samples:
            window = self.window_at(epoch, first)
        else:
            window = self.window_at(epoch + 1, 0)
        return here, self.pieces.shards[self._pieces_of(window)].tolist()

    def _permute_shards(self, epoch: int) -> None:
        self._pieces = np.arange(len(self.pieces.sizes))
        if self.shuffle:
            self._pieces = permutation(len(self._pieces), self.seed, self.salt, epoch, 0)
        ends = np.concatenate([[0], np.cumsum(self.pieces.sizes[self._pieces])])
        self._window_starts = np.append(ends[: -1 : self.window_shards], ends[-1])
        self._epoch = epoch

    def _pieces_of(self, window: int) -> np.ndarray:
        return self._pieces[window * self.window_shards : (window + 1) * self.window_shards]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Returns all samples of a window in their shuffled order."""
        cached = self._windows.pop((epoch, window), None)
        if cached is None:
            firsts, sizes = self.pieces.firsts, self.pieces.sizes
            cached = np.concatenate(
                [np.arange(firsts[p], firsts[p] + sizes[p]) for p in self._pieces_of(window)]
            )
            if self.shuffle:
                order = permutation(len(cached), self.seed, self.salt, epoch, window + 1)
                cached = cached[order]
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

    def __init__(
        self,
        orders: Sequence[Order],
        weights: Sequence[float] | None = None,
        samples: int | None = None,
    ):
        """Takes as `samples` how long an epoch is where it is not as many as the sets have: of a
        lane of a weighted mixture.
        """
        self.orders = tuple(orders)
        self.samples = samples or sum(order.samples for order in self.orders)
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

    def windows_from(self, epoch: int, position: int) -> list[tuple[list[int], list[int]]]:
        """Returns what `Order.windows_from` does where each set then stands, by set."""
        begin = epoch * self.samples + position
        counts = self._interleave.picks(begin, begin)[0]
        places = [divmod(n, order.samples) for n, order in zip(counts, self.orders, strict=True)]
        return [order.windows_from(*at) for order, at in zip(self.orders, places, strict=True)]


class FirstOf:
    """The first `samples` picks of a mixture's epoch 0 and no others, shuffled anew in every epoch.

    A small data set cut out of a large one: holds all its picks, so `samples` is what fits into
    memory (24 bytes each).
    """

    def __init__(self, mixture: Mixture, samples: int, seed: int, salt: int = 0):
        """Takes a `salt`, which tells lanes apart."""
        if not 0 < samples <= mixture.samples:
            raise ValueError(
                f"the first {samples} images are asked for, the sets hold {mixture.samples}"
            )
        self.samples = samples
        self.seed = seed
        self.salt = salt
        self._picks = mixture.picks(0, 0, samples)
        self._epoch: int | None = None

    def indices_of(self, s: int) -> np.ndarray:
        """Says which samples of set `s` are among them."""
        return self._picks[self._picks[:, 0] == s, 1]

    def images_of(self, s: int) -> int:
        """Returns what `Mixture.images_of` does."""
        return len(self.indices_of(s))

    def windows_from(self, epoch: int, position: int) -> list[tuple[list[int], list[int]]]:
        """Returns none: any image may come at any time."""
        return []

    def picks(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Returns what `Mixture.picks` does."""
        _check_positions(start, stop, self.samples)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = permutation(self.samples, self.seed, self.salt, epoch, 0)
        picks = self._picks[self._order[start:stop]]
        picks[:, 2] = epoch
        return picks


class Lanes:
    """One order made of several, each of shards of its own: the first image of every lane, then the
    second of every lane; one that has no more is passed over until the epoch ends.

    So any `n` images from a multiple of the lanes on have an equal share of each, as long as all
    have some left, and every image of a lane comes once.
    """

    def __init__(self, lanes: Sequence[Mixture | FirstOf]):
        self.lanes = tuple(lanes)
        self._lengths = np.array([lane.samples for lane in lanes], np.int64)
        self.samples = int(self._lengths.sum())

    def images_of(self, s: int) -> int:
        """Says how many picks of an epoch are of set `s`, give or take one a lane."""
        return sum(lane.images_of(s) for lane in self.lanes)

    def before(self, position: int) -> np.ndarray:
        """Returns how many of the first `position` images of an epoch are of each lane."""
        rounds = int(self._lengths.max())
        whole = bisect_right(range(rounds + 1), position, key=self._after_rounds) - 1
        counts = np.minimum(self._lengths, whole)
        going_on = np.flatnonzero(self._lengths > whole)
        counts[going_on[: position - int(counts.sum())]] += 1
        return counts

    def _after_rounds(self, rounds: int) -> int:
        return int(np.minimum(self._lengths, rounds).sum())

    def shares(
        self, start: int, stop: int, places: int, rank: int, world: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """Yields what `rank` of `world` reads of the batch of positions [start, stop), filled up to
        `places`: (lane, first and end of its own positions, fillers behind them).

        A batch is its lanes' shares one after another, so it is the same for every `world`. Where
        `world` divides the lanes a rank has whole lanes; where the lanes divide `world` each has as
        many ranks; else a rank has its part of the batch, of whatever lanes.
        """
        _check_positions(start, stop, self.samples)
        firsts = self.before(start)
        read = self.before(stop) - firsts
        sizes = read + self._fillers(read, places)
        for lane, mine in enumerate(_parts(sizes.tolist(), rank, world)):
            if mine.start < mine.stop:
                begin = int(firsts[lane]) + min(mine.start, int(read[lane]))
                end = int(firsts[lane]) + min(mine.stop, int(read[lane]))
                yield lane, begin, end, mine.stop - mine.start - (end - begin)

    def _fillers(self, read: np.ndarray, places: int) -> np.ndarray:
        """Returns how many each lane gets: those with the fewest images first."""
        fillers = np.zeros_like(read)
        for _ in range(places - int(read.sum())):
            fillers[np.argmin(read + fillers)] += 1
        return fillers

    def largest_share(self, start: int, stop: int, places: int, world: int) -> int:
        """Returns the places of the rank that has most of a batch."""
        sizes = self.before(stop) - self.before(start)
        sizes += self._fillers(sizes, places)
        if not has_own_lanes(len(sizes), world):
            return math.ceil(int(sizes.sum()) / world)
        of_lane = -(-sizes // max(1, world // len(sizes)))
        of_rank = of_lane.reshape(min(world, len(sizes)), -1).sum(axis=1)
        return int(of_rank.max())


def has_own_lanes(lanes: int, world: int) -> bool:
    """Tells whether each of `world` ranks reads lanes that no rank but those beside it reads."""
    return world % lanes == 0 or lanes % world == 0


def lanes_of(lanes: int, rank: int, world: int) -> range:
    """Returns the lanes that a rank may read."""
    if not has_own_lanes(lanes, world):
        return range(lanes)
    ranks = max(1, world // lanes)  # that read one lane
    return range(lanes)[deal(lanes, rank // ranks, world // ranks)]


def _parts(sizes: Sequence[int], rank: int, world: int) -> list[slice]:
    """Returns which of the places of each lane are the rank's."""
    lanes = len(sizes)
    if not has_own_lanes(lanes, world):
        mine = deal(sum(sizes), rank, world)
        ends = np.cumsum(sizes).tolist()
        return [
            slice(max(mine.start - end + size, 0), min(mine.stop - end + size, size))
            for size, end in zip(sizes, ends, strict=True)
        ]
    ranks = max(1, world // lanes)
    own = lanes_of(lanes, rank, world)
    return [
        deal(size, rank % ranks, ranks) if lane in own else slice(0, 0)
        for lane, size in enumerate(sizes)
    ]
