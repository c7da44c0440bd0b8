"""Order + reading: shards in, this rank's samples of each global batch out, with the state to
resume from.

Workers are told a step as (epoch, start, stop) and work out the rest themselves, so what comes does
not depend on how many there are, and they live as long as the iteration: an epoch's end is only
another number in the next step.
"""

from __future__ import annotations

import hashlib
import json
import logging
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from shards.ahead import Ahead
from shards.cache import Cache
from shards.features import read_features
from shards.files import ShardError, UnreachableError, is_remote
from shards.manifest import Manifest
from shards.quarantine import (
    NAMED,
    Fault,
    Quarantine,
    count_fault,
    fault,
    most_unreadable,
    summary,
)
from shards.read import Reader, Sample
from shards.remote import Patience
from shards.stream import (
    FirstOf,
    Lanes,
    Mixture,
    Order,
    StreamState,
    deal,
    dealt_to_lanes,
    has_own_lanes,
    is_cut,
    lanes_of,
)

logger = logging.getLogger(__name__)

Made = TypeVar("Made")

# unreadable ones of a set without a good one between them: the set, or what decodes it, is broken
_IN_A_ROW = 100


class Step(NamedTuple):
    """One global batch: positions [start, stop) of an epoch."""

    epoch: int
    start: int
    stop: int


class Loader:
    """This rank's share of the global batches of one or several sets of shards.

    paths: folders or URLs of sets. weights: their shares; None: every record of every set exactly
    once an epoch (what an epoch of a weighted mixture is, see `stream.Mixture`). global_batch:
    images a step over all ranks. images: an epoch is the first so many of epoch 0 alone.
    last_batch: the rest of an epoch is a "short" batch, is filled up with samples of weight 0, or
    is dropped. decode: Sample -> its new payload, called where a sample that has one is read.
    workers: processes; prefetch: batches read ahead by each. cache_dir, cache_bytes: for remote
    sets.
    quarantine: a JSONL file that names what cannot be read. patience: with what does not answer.
    max_unreadable: the share of a set's images of an epoch beyond which iterating ends with
    ShardError, as `most_unreadable` has it; None: whoever iterates sees to it, as where several
    ranks read. mask: takes the secrets out of what is written: a place may be a URL with a
    password. answered: as of a Reader. lanes: into so many streams, each of shards of its own, the
    order is divided; every global batch takes its share of each, and a rank reads its own lanes'
    shards (see `stream.Lanes`); window_shards are shared by them, at least one a lane. ranks_here:
    ranks of this machine, which share the cache; None: all of them.

    Raises ShardError for sets that cannot be opened, hold no text, do not belong together, or do
    not fit through the cache.
    """

    def __init__(
        self,
        paths: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        global_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        workers: int = 0,
        prefetch: int = 2,
        window_shards: int = 8,
        shuffle: bool = True,
        images: int | None = None,
        last_batch: Literal["short", "fill", "drop"] = "short",
        decode: Callable[[Sample], Any] | None = None,
        cache_dir: str | Path | None = None,
        cache_bytes: int | None = None,
        quarantine: Path | None = None,
        patience: Patience | None = None,
        max_unreadable: float | None = None,
        mask: Callable[[str], str] = str,
        answered: bool = True,
        lanes: int = 1,
        ranks_here: int | None = None,
    ):
        cache = Cache.at(cache_dir, cache_bytes, patience)
        self.manifests = tuple(Manifest.open(str(path), cache, patience) for path in paths)
        self.global_batch = global_batch
        self.last_batch = last_batch
        self.rank = rank
        self.world_size = world_size
        self.workers = workers
        self.prefetch = prefetch
        self.lanes = lanes
        self._check_sets()
        window = max(1, window_shards // lanes)
        order = self._order(weights, seed, window, shuffle, images)
        self._check_cache(order, window, cache, self._lanes_here(ranks_here or world_size))
        self.samples = order.samples
        self.steps_per_epoch = self._count_steps()
        self.digests = self._digests([weights, seed, window_shards, shuffle], images)
        numbered = enumerate(self.manifests)
        readers = [Reader(m, cache, set_index=s, answered=answered) for s, m in numbered]
        fill_to = global_batch if last_batch == "fill" else 0
        self._reading = _Reading(order, readers, decode, rank, world_size, fill_to)
        self._reading.lag = max(1, workers * prefetch) * global_batch
        self._mask = mask
        self._max_unreadable = max_unreadable
        self._account_for_none(quarantine)

    def _account_for_none(self, quarantine: Path | None) -> None:
        """Begins the account of what could not be read, and its file."""
        self._quarantine = Quarantine(quarantine)
        self.quarantined: dict[tuple[int, int], str] = {}  # (set, index) of the unreadable -> why
        self.unreadable = 0  # how often one came
        self.faults: Counter[Fault] = Counter()  # of all of them
        self._in_epoch = (0, [0] * len(self.manifests))  # an epoch, and its unreadable ones by set
        self._in_a_row = [0] * len(self.manifests)

    @property
    def has_pictures(self) -> bool:
        """Tells whether any record of its sets has a picture."""
        return any(manifest.has_pictures for manifest in self.manifests)

    @property
    def digest(self) -> str:
        """What names this order."""
        return self.digests[0]

    def _digests(self, parts: Sequence[Any], images: int | None) -> tuple[str, str]:
        """Returns what names this order, and what a state calls it of a run that was begun when
        indexes had format 1; `images` and lanes only where they are asked for, so that older states
        fit.
        """
        parts = [*parts, *([] if images is None else [images])]
        parts += [] if self.lanes == 1 else [f"{self.lanes} lanes"]
        return (
            _order_digest([m.digest for m in self.manifests], parts),
            _order_digest([m.format_1_digest for m in self.manifests], parts),
        )

    def at(self, epoch: int, position: int) -> StreamState:
        """Returns the state of a run that has used `position` images of `epoch`."""
        return StreamState(epoch, position, self.digest, self.lanes)

    def _order(
        self,
        weights: Sequence[float] | None,
        seed: int,
        window: int,
        shuffle: bool,
        images: int | None,
    ) -> Lanes:
        sizes = [[shard.samples for shard in manifest.shards] for manifest in self.manifests]
        mixtures = []
        for lane, of_sets in enumerate(dealt_to_lanes(sizes, self.lanes)):
            orders = [
                Order(pieces, seed, window, shuffle, salt=s + (lane << 32))
                for s, pieces in enumerate(of_sets)
            ]
            # the sets of a weighted mixture last as long in every lane, whatever it has of them
            mine = deal(sum(map(sum, sizes)), lane, self.lanes)
            mixtures.append(Mixture(orders, weights, mine.stop - mine.start if weights else None))
        order = Lanes(mixtures)
        if images is None:
            return order
        if not self.lanes <= images <= order.samples:
            raise ShardError(
                f"{self._names()}: {images} images are asked for, there are {order.samples}"
                + (f", and each of {self.lanes} lanes needs one" if self.lanes > 1 else "")
            )
        shares = order.before(images).tolist()
        return Lanes(
            [
                FirstOf(mixture, share, seed, salt=lane << 32)
                for lane, (mixture, share) in enumerate(zip(mixtures, shares, strict=True))
            ]
        )

    def _lanes_here(self, ranks_here: int) -> list[int]:
        """Returns the lanes that the ranks of this machine read: they are numbered in a row."""
        first = self.rank - self.rank % ranks_here
        ranks = range(first, min(first + ranks_here, self.world_size))
        return sorted({n for r in ranks for n in lanes_of(self.lanes, r, self.world_size)})

    def largest_share(self, before: StreamState, after: StreamState) -> int:
        """Returns how many samples the rank gets that gets most of the batch between two states:
        all alike, but for the end of an epoch that some lanes reach before others.
        """
        start = before.position if before.epoch == after.epoch else 0
        stop = min(after.position, start + self.global_batch)
        return self._reading.order.largest_share(
            start, stop, self._reading.fill_to, self.world_size
        )

    def _count_steps(self) -> int:
        whole = self.samples // self.global_batch
        rest = self.samples % self.global_batch
        if self.last_batch != "drop":
            return whole + bool(rest)
        if not whole:
            raise ShardError(
                f"{self._names()}: {self.samples} images are less than a global batch of "
                f"{self.global_batch}, and last_batch 'drop' leaves none; "
                "take a smaller batch or last_batch 'short'"
            )
        if rest and self.rank == 0:
            logger.warning(
                "%s: the last %d of %d images of every epoch are dropped",
                self._names(),
                rest,
                self.samples,
            )
        return whole

    def iterate(
        self, state: StreamState | None = None, epochs: int | None = None
    ) -> Generator[tuple[StreamState, list[Sample]], None, None]:
        """Yields (state after the batch, this rank's samples of it), from `state` until `epochs`
        are complete.

        `epochs` counts from the start of the run, not from `state`; None goes on for ever.
        `state.epoch` is the epoch the batch belongs to, and after the last batch of an epoch
        `state.position` equals `samples`. All ranks get the same number of steps, some of them
        perhaps empty. A sample that cannot be read has weight 0 and no payload. Closing the
        generator (`contextlib.closing`) ends the workers. Raises ShardError for a state of another
        order, and when nothing of a set can be read any more; UnreachableError when the data do
        not answer.
        """
        return self.collated(_as_it_is, state, epochs)

    def collated(
        self,
        collate: Callable[[list[Sample]], Made],
        state: StreamState | None = None,
        epochs: int | None = None,
        pin: bool = False,
    ) -> Generator[tuple[StreamState, Made], None, None]:
        """Yields, as `iterate`, what `collate` makes of the samples: where they are read, in the
        workers, so that it and what it makes have to be picklable. `pin`: what it makes has a
        method pin_memory, whose result is yielded. Raises the ShardErrors of `collate` too.
        """
        if state is not None and state.digest not in self.digests:
            raise ShardError(
                f"the stream state belongs to order {state.digest} of {state.lanes} lanes, this is "
                f"{self.digest} of {self.lanes} ({self._names()}): resume with the same sets, "
                "weights, seed, window_shards, lanes and shuffle, or begin anew"
            )
        if state is not None and state.position > self.samples:
            raise ShardError(
                f"the stream state is at image {state.position} of an epoch of {self.samples}"
            )
        return self._iterate(partial(_collated, collate), state or self.at(0, 0), epochs, pin)

    def coming(self) -> Any:
        """Waits for the batch that comes next, while the one before it is used, and returns it; it
        is yielded all the same. None: there is none, or reading it has failed, which is raised when
        its turn comes.
        """
        return self._coming.peek()[1]

    def after(self, state: StreamState) -> StreamState:
        """Returns where a run stands after the batch that follows `state`."""
        return self._state_after(next(self._steps(state, None)))

    def _state_after(self, step: Step) -> StreamState:
        rest = self.samples - step.stop
        ended = self.last_batch == "drop" and rest < self.global_batch
        return self.at(step.epoch, self.samples if ended else step.stop)

    def whole_batches(self, numbers: Sequence[int]) -> Generator[list[Sample], None, None]:
        """Yields these global batches of epoch 0, for a loader of one rank. What could not be read
        in them counts only where `account` is told of it, as others may read the other batches.
        Raises as `iterate`.
        """
        as_read = partial(_collated, _as_it_is)
        left = list(numbers)
        failed = 0
        while left:
            steps = [self._step(0, number * self.global_batch) for number in left]
            try:
                for _, _, samples in self._read(iter(steps), as_read):
                    if isinstance(samples, ShardError):
                        raise samples
                    left.pop(0)
                    yield samples
            except _WorkerError as failure:
                failed += 1
                self._go_on_after(failure, 0, is_again=failed > 1)

    def batch(self, number: int) -> list[Sample]:
        """Returns a global batch of epoch 0, as `whole_batches` does, read in this process."""
        samples = self._reading[self._step(0, number * self.global_batch)][1]
        if isinstance(samples, UnreachableError):
            raise samples
        return samples

    def account(self, samples: list[Sample]) -> None:
        """Counts, names and logs what of a batch of epoch 0 could not be read, by whomever: sets,
        indices and errors suffice. Raises ShardError where it is too much.
        """
        self._account(samples)
        self._check_unreadable(0, samples)

    def _iterate(
        self, collate: Callable[[Any], Any], state: StreamState, epochs: int | None, pin: bool
    ) -> Generator[tuple[StreamState, Any], None, None]:
        failed_in = -1  # the epoch in which workers were started again
        while True:
            try:
                with closing(self._read(self._steps(state, epochs), collate, pin)) as batches:
                    self._coming = _Coming(batches)
                    for step, made, samples in self._coming:
                        if isinstance(samples, ShardError):
                            raise samples
                        self._account(samples)
                        self._check_unreadable(step.epoch, samples)
                        state = self._state_after(step)
                        yield state, made
                return
            except _WorkerError as failure:
                self._go_on_after(failure, state.epoch, is_again=failed_in == state.epoch)
                failed_in = state.epoch

    def _go_on_after(self, failure: _WorkerError, epoch: int, is_again: bool) -> None:
        """Tells of workers that are started again. Raises ShardError the second time."""
        if is_again:
            raise ShardError(
                f"{failure}, a second time in epoch {epoch}: take fewer workers or "
                "less prefetch where memory is short; with no workers the error itself is "
                "shown"
            ) from failure
        logger.warning("rank %d: %s; the data workers are started again", self.rank, failure)

    def _read(
        self, steps: Iterator[Step], collate: Callable[[Any], Any], pin: bool = False
    ) -> Generator[tuple[Step, Any, list[Sample]], None, None]:
        """Yields what the workers read of these. Raises _WorkerError for what ends one."""
        on_child = signal.getsignal(signal.SIGCHLD)
        # batch_size=None and our own sampler: DataLoader only runs processes. Its own generator:
        # the global random numbers are the model's.
        batches: Any = iter(
            DataLoader(
                self._reading,
                batch_size=None,
                sampler=steps,
                collate_fn=collate,
                pin_memory=pin,
                num_workers=self.workers,
                prefetch_factor=self.prefetch if self.workers else None,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),
            )
        )
        if threading.current_thread() is threading.main_thread():
            # torch's would raise in the middle of a step, of this loop or of a save
            signal.signal(signal.SIGCHLD, on_child)
        try:
            if self.workers:
                yield from _watched(batches)
            else:
                yield from batches
        finally:
            self._reading.end()
            if self.workers:
                batches._shutdown_workers()
                for worker in batches._workers:
                    worker.kill()  # one that waits for what a dead one held; the others have ended

    def _steps(self, state: StreamState, epochs: int | None) -> Iterator[Step]:
        epoch, position = state.epoch, state.position
        while epochs is None or epoch < epochs:
            while position < self.samples:
                step = self._step(epoch, position)
                if step.stop - position < self.global_batch and self.last_batch == "drop":
                    break
                yield step
                position = step.stop
            epoch, position = epoch + 1, 0

    def _step(self, epoch: int, start: int) -> Step:
        return Step(epoch, start, min(start + self.global_batch, self.samples))

    def _account(self, samples: list[Sample]) -> None:
        """Counts, names and logs what could not be read; in the main process, whoever read it."""
        for sample in samples:
            if sample.error is not None:
                self._count_unreadable(sample, sample.error)
            elif sample.index >= 0:  # no filler
                self._in_a_row[sample.set_index] = 0

    def leave_out(self, sample: Sample, reason: str) -> None:
        """Counts and names a sample that was read and still cannot be used."""
        place = _place(self.manifests[sample.set_index], sample.index)
        self._count_unreadable(sample, f"{place}: {reason}")

    def unreadable_in(self, samples: Sequence[Sample]) -> list[int]:
        """Returns how many of them could not be read, by set."""
        counts = [0] * len(self.manifests)
        for sample in samples:
            if sample.error is not None:
                counts[sample.set_index] += 1
        return counts

    def _check_unreadable(self, epoch: int, samples: list[Sample]) -> None:
        if self._max_unreadable is None:
            return
        before = self._in_epoch[1] if self._in_epoch[0] == epoch else [0] * len(self.manifests)
        now = [a + b for a, b in zip(before, self.unreadable_in(samples), strict=True)]
        self._in_epoch = (epoch, now)
        if too_many := self.too_many_unreadable(now, self._max_unreadable):
            raise ShardError(f"{too_many}; found: {summary(self.faults)}")

    def too_many_unreadable(self, counts: Sequence[float], share: float) -> str:
        """Says of which sets more images of an epoch than may be could not be read; "" if of none.
        `counts`: by set.
        """
        words = []
        for place, (manifest, count) in enumerate(zip(self.manifests, counts, strict=True)):
            images = self._reading.order.images_of(place)
            most = most_unreadable(images, share)
            if count > most:
                words.append(f"{count:.0f} of {images} in {manifest.folder}, {most} may be")
        if not words:
            return ""
        return (
            f"too many images cannot be read: {'; '.join(words)} (data.max_unreadable={share:g}; "
            "`harness shards verify` names them all, data.max_unreadable=1 goes on without them)"
        )

    def _count_unreadable(self, sample: Sample, error: str) -> None:
        self.unreadable += 1
        folder = self.manifests[sample.set_index].folder
        count_fault(self.faults, fault(folder, error))
        if self.unreadable.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...: a log that cannot flood
            logger.warning(
                "rank %d: %d unreadable so far, now %s", self.rank, self.unreadable, error
            )
        name = (sample.set_index, sample.index)
        if name not in self.quarantined and len(self.quarantined) < NAMED:
            self.quarantined[name] = error
            self.write_down(*name, error)
        self._in_a_row[sample.set_index] += 1
        if self._in_a_row[sample.set_index] >= min(_IN_A_ROW, self.samples // self.world_size or 1):
            raise ShardError(
                f"{self._in_a_row[sample.set_index]} samples in a row cannot be used, the last "
                f"is {error}; "
                "`harness shards verify` checks a whole set"
            )

    def write_down(self, set_index: int, index: int, error: str) -> None:
        """Names a sample in the quarantine file, also one that another rank could not read."""
        manifest = self.manifests[set_index]
        folder = self._mask(manifest.folder)
        self._quarantine.add(folder, index, manifest.key(index), self._mask(error))

    def _names(self) -> str:
        return ", ".join(manifest.folder for manifest in self.manifests)

    def _check_sets(self) -> None:
        if not self.manifests:
            raise ShardError("no set of shards is given: name at least one folder")
        if self.global_batch % self.lanes:
            raise ShardError(
                f"{self.lanes} lanes do not divide a global batch of {self.global_batch}: every "
                "batch takes as many images of each lane"
            )
        if self.rank == 0:
            for sentence in about_lanes(self.manifests, self.lanes, self.world_size):
                logger.warning("%s", sentence)
        for manifest in self.manifests:
            if not manifest.samples:
                raise ShardError(f"{manifest.folder}: the set holds no samples")
            manifest.check_lanes(self.lanes)
            manifest.check_texts()
        shown = [manifest for manifest in self.manifests if manifest.has_pictures]
        for manifest in shown:
            if manifest.kind != shown[0].kind:
                raise ShardError(
                    f"{manifest.folder} holds {manifest.kind} and {shown[0].folder} holds "
                    f"{shown[0].kind}: one run reads sets of one kind"
                )

    def _check_cache(
        self, order: Lanes, window: int, cache: Cache | None, here: Sequence[int]
    ) -> None:
        """Checks that two windows of each of the lanes `here` must fit, of every remote set: a
        batch may need both, and what goes early is fetched again. Of the first images of a mixture,
        in whose epochs nothing keeps to windows, all shards must.
        """
        remote = {s: m for s, m in enumerate(self.manifests) if is_remote(m.base or m.folder)}
        lanes = [order.lanes[lane] for lane in here]
        needed = sum(_bytes_held(m, s, lanes, window) for s, m in remote.items())
        cache_bytes = cache.max_bytes if cache else 0
        if cache_bytes < needed:
            what, less = f"two windows of {window * self.lanes} shards", "smaller windows"
            if isinstance(order.lanes[0], FirstOf):
                what, less = f"the first {order.samples} images", "fewer images"
            if len(here) < self.lanes:
                what = f"for {len(here)} of {self.lanes} lanes {what}"
            raise ShardError(
                f"{', '.join(m.folder for m in remote.values())}: {what} and the index are "
                f"{needed} bytes, the cache holds {cache_bytes}: give cache_dir and a larger "
                f"cache, or {less}"
            )


def about_lanes(manifests: Sequence[Manifest], lanes: int, world_size: int) -> list[str]:
    """Returns a sentence for each thing by which `world_size` processes read more than they would
    have to in so many lanes.
    """
    found: list[str] = []
    if world_size == 1:
        return found
    if not has_own_lanes(lanes, world_size):
        found.append(
            f"{lanes} lanes are no multiple or part of {world_size} processes: each of them may "
            "read every shard (the batches are the same)"
        )
    return found + [
        f"{m.folder} has {len(m.shards)} shards, fewer than the {lanes} lanes: several nodes read "
        "the same one"
        for m in manifests
        if is_cut([shard.samples for shard in m.shards], lanes)
    ]


def _bytes_held(manifest: Manifest, s: int, lanes: Sequence[Mixture | FirstOf], window: int) -> int:
    """Returns the bytes of the shards of set `s` that the cache must hold for these lanes."""
    windows = 0
    shards: set[int] = set()  # several lanes may have parts of one
    for lane in lanes:
        if isinstance(lane, FirstOf):
            indices = lane.indices_of(s)
            own = set((manifest.starts.searchsorted(indices, side="right") - 1).tolist())
        else:
            own = set(lane.orders[s].pieces.shards.tolist())
        shards |= own
        sizes = sorted(map(manifest.bytes_held, own), reverse=True)
        windows += sum(sizes if isinstance(lane, FirstOf) else sizes[: 2 * window])
    index = 0 if manifest.is_checked_by_shard else manifest.sidecar_file.bytes
    return min(windows, sum(map(manifest.bytes_held, shards))) + index


class _WorkerError(Exception):
    """A data worker that was ended, or raised what no sample accounts for."""


class _Reading(Dataset):
    """Step -> (step, this rank's samples of it); lives in the workers."""

    def __init__(
        self,
        order: Lanes,
        readers: Sequence[Reader],
        decode: Callable[[Sample], Any] | None,
        rank: int,
        world_size: int,
        fill_to: int,
    ):
        self.order = order
        self.readers = readers
        self.decode = decode
        self.rank = rank
        self.world_size = world_size
        self.fill_to = fill_to
        self.lag = 0
        self._ahead: Ahead | None = None

    def end(self) -> None:
        """Ends the thread that this process may have."""
        if self._ahead:
            self._ahead.end()
        self._ahead = None

    def _fetch_ahead(self, step: Step) -> None:
        """Has the shards of the next window fetched, by one of the processes that read."""
        worker = get_worker_info()
        if (worker and worker.id) or not any(reader.is_remote for reader in self.readers):
            return
        if self._ahead is None:
            lanes = lanes_of(len(self.order.lanes), self.rank, self.world_size)
            self._ahead = Ahead(self.order, lanes, self.readers, self.lag)
        self._ahead.move(step.epoch, step.start)

    def __getitem__(self, step: Step) -> tuple[Step, list[Sample] | UnreachableError]:
        self._fetch_ahead(step)
        samples = []
        shares = self.order.shares(step.start, step.stop, self.fill_to, self.rank, self.world_size)
        try:
            for lane, first, end, fillers in shares:
                picks = self.order.lanes[lane].picks(step.epoch, first, end).tolist()
                samples += [self._read(*pick) for pick in picks]
                samples += [_no_sample(-1, -1) for _ in range(fillers)]
        except UnreachableError as error:
            return step, error  # raised in a worker it would come with a traceback in its message
        return step, samples

    def _read(self, set_index: int, index: int, epoch: int) -> Sample:
        reader = self.readers[set_index]
        sample = None
        try:
            sample = reader.read(index)
            sample.epoch = epoch
            if not sample.known.has_picture:
                return sample
            if self.decode is not None and reader.manifest.kind == "features":
                sample.payload = read_features(sample.payload, reader.manifest.encoder)
            elif self.decode is not None:
                sample.payload = self.decode(sample)
            return sample
        except (MemoryError, UnreachableError):  # no fault of this sample
            raise
        # Whatever a damaged file makes a decoder raise (Pillow alone: six types) costs that sample,
        # not the run.
        except Exception as error:
            text = str(error)
            if sample is not None or not isinstance(error, ShardError):
                # the reader's own errors name the place themselves
                kind = "" if isinstance(error, ShardError) else f"{type(error).__name__}: "
                text = f"{_place(reader.manifest, index)}: {kind}{text}"
            return _no_sample(set_index, index, text)


class _Coming:
    """An iterator whose next item can be waited for before it is asked for."""

    def __init__(self, batches: Iterator[tuple[Step, Any, list[Sample]]]) -> None:
        self._batches = batches
        self._held: list[tuple[Any, Any, Any]] = []
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[tuple[Step, Any, list[Sample]]]:
        return self

    def __next__(self) -> tuple[Step, Any, list[Sample]]:
        self.peek()
        if self._error is not None:
            raise self._error
        return self._held.pop()

    def peek(self) -> tuple[Any, Any, Any]:
        """Returns the next item; Nones in place of an error, the end among them."""
        if not self._held and self._error is None:
            try:
                self._held.append(next(self._batches))
            except Exception as error:
                self._error = error
        return self._held[0] if self._held else (None, None, None)


def _watched(batches: Any) -> Iterator[tuple[Step, Any, list[Sample]]]:
    """Yields what comes from the workers. Raises _WorkerError saying how one of them ended."""
    while True:
        try:
            item = next(batches)
        except StopIteration:
            return
        except Exception as error:
            if getattr(error, "is_for_user", False):
                raise
            ended = [worker.exitcode for worker in batches._workers if worker.exitcode]
            if not ended:  # it lives and has sent its traceback, whose last line is the error
                raise _WorkerError(
                    f"a data worker failed: {str(error).strip().splitlines()[-1]}"
                ) from error
            how = f"exit code {ended[0]}"
            if ended[0] < 0:
                how = signal.Signals(-ended[0]).name
            if how == "SIGKILL":
                how += ", as the system does when main memory is out"
            raise _WorkerError(f"a data worker was ended by {how}") from error
        yield item


def _place(manifest: Manifest, index: int) -> str:
    return f"{manifest.folder}, sample {index}, key {manifest.key(index)}"


def _no_sample(set_index: int, index: int, error: str | None = None) -> Sample:
    return Sample(None, None, "", set_index, index, weight=0.0, error=error)


def _order_digest(sets: Sequence[str | None], parts: Sequence[Any]) -> str:
    return hashlib.sha256(json.dumps([sets, *parts]).encode()).hexdigest()


def _as_it_is(item: Any) -> Any:
    """Stands in place of DataLoader's own, which turns what it finds inside into tensors."""
    return item


def _collated(
    collate: Callable[[list[Sample]], Any], read: tuple[Step, list[Sample] | UnreachableError]
) -> tuple[Step, Any, list[Sample] | ShardError]:
    """Returns a step with what `collate` makes of its samples, and these, which it may change."""
    step, samples = read
    if isinstance(samples, UnreachableError):
        return step, None, samples
    try:
        return step, collate(samples), samples
    except ShardError as error:  # as above: raised in a worker it would bring a traceback
        return step, None, error


def _start_worker(worker: int) -> None:
    """Takes one thread each, since workers are the parallelism; stopping is the main process's to
    decide.
    """
    torch.set_num_threads(1)
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
