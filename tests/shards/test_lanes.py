"""Lanes: the same batches for every world size, each lane's shards read by its own ranks alone, a
seek from anywhere, every sample once; with mixtures, unreadable samples and small sets at once.
"""

import json
import logging
from contextlib import closing
from itertools import pairwise

import numpy as np
import pytest

from shards.files import ShardError
from shards.loader import Loader
from shards.record import Record, Text
from shards.stream import (
    FirstOf,
    Lanes,
    Mixture,
    Order,
    StreamState,
    dealt_to_lanes,
    lanes_of,
)
from shards.write import write_shards

UNEVEN = [7, 1, 0, 12, 5, 5, 9, 3, 11, 2, 8, 6]  # samples per shard, one of them empty
LANES, BATCH = 4, 12
# 33 samples in 11 shards; 10 in 4, of which three are no picture; 7 in 2, fewer than lanes
TEXTS = (Text("a", "caption", ("x",)),)
SETS = {"many": (33, 3), "torn": (10, 3), "few": (7, 4)}
KINDS = {
    "mixed": {},
    "weighted": {"weights": [0.5, 0.3, 0.2]},
    "first images": {"images": 26},
    "first images, weighted": {"weights": [0.5, 0.3, 0.2], "images": 26},
    "filled": {"last_batch": "fill"},
    "dropped": {"last_batch": "drop"},
    "in order": {"shuffle": False},
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for name, (count, per_shard) in SETS.items():
        write_shards(
            (
                (
                    Record(
                        f"{name}{n:02d}", name, "train", str(n), (Text("a", "caption", ("x",)),)
                    ),
                    b"none" if name == "torn" and n % 4 == 1 else bytes([n]) * 50,
                    "jpg",
                )
                for n in range(count)
            ),
            root / name,
            dataset=name,
            split="train",
            max_shard_samples=per_shard,
        )
    return [str(root / name) for name in SETS]


def decode(sample):
    if sample.payload == b"none":
        raise ValueError("no picture")
    return len(sample.payload)


def loader(sets, **other):
    given = {"global_batch": BATCH, "window_shards": 8, "seed": 5, "lanes": LANES, **other}
    return Loader(sets, decode=decode, **given)


def told(samples):
    """What stands at each place of a batch: set, sample and epoch, whether it was read, or None."""
    return [None if s.index < 0 else (s.set_index, s.index, s.error or s.epoch) for s in samples]


def batches(sets, state=None, epochs=2, **other):
    with closing(loader(sets, **other).iterate(state, epochs)) as stream:
        return [(state, told(samples)) for state, samples in stream]


def global_batches(sets, world, state=None, **other):
    ranks = [batches(sets, state, rank=rank, world_size=world, **other) for rank in range(world)]
    steps = list(zip(*ranks, strict=True))
    assert all(len({state for state, _ in step}) == 1 for step in steps)
    return [(step[0][0], [place for _, places in step for place in places]) for step in steps]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("world", [2, 3, 4, 8])
def test_the_batches_are_the_same_for_every_number_of_ranks(sets, kind, world):
    whole = batches(sets, **KINDS[kind])
    assert global_batches(sets, world, **KINDS[kind]) == whole
    if kind == "filled":
        assert {len(places) for _, places in whole} == {BATCH}
    bad = [p for _, places in whole for p in places if p and isinstance(p[2], str)]
    assert len(bad) >= 2, "samples that cannot be read keep their place"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_from_any_step_on_another_number_of_ranks(sets, kind):
    whole = batches(sets, **KINDS[kind])
    for n, (world, workers) in enumerate([(4, 0), (2, 0), (1, 2), (8, 0), (3, 0), (4, 0)]):
        cut = n * len(whole) // 6
        state = StreamState.from_json(json.loads(json.dumps(whole[cut][0].to_json())))
        assert state.lanes == LANES
        rest = global_batches(sets, world, state, workers=workers, **KINDS[kind])
        assert rest == whole[cut + 1 :]


@pytest.mark.parametrize("kind", ["mixed", "weighted", "filled"])
def test_records_without_a_picture_keep_their_places_in_lanes(sets, tmp_path, kind):
    records = [
        (Record(f"w{n}", "words", "train", str(n), TEXTS, has_picture=False), b"", "")
        for n in range(9)
    ]
    write_shards(iter(records), tmp_path, dataset="words", split="train", max_shard_samples=2)
    both = [sets[0], str(tmp_path), sets[1]]
    whole = batches(both, **KINDS[kind])
    of_words = [place for _, places in whole for place in places if place and place[0] == 1]
    assert len(of_words) >= 9
    assert not any(isinstance(told, str) for _, _, told in of_words)
    for world in (2, 3, 8):
        assert global_batches(both, world, **KINDS[kind]) == whole
    assert global_batches(both, 4, whole[2][0], **KINDS[kind]) == whole[3:]


@pytest.mark.parametrize("weights", [None, [1.0]])
def test_lanes_of_the_same_sizes_are_shuffled_each_in_its_own_way(tmp_path, weights):
    records = ((Record(f"{n}", "even", "train", str(n), TEXTS), b"x", "jpg") for n in range(64))
    write_shards(records, tmp_path, dataset="even", split="train", max_shard_samples=32)
    loaded = loader([str(tmp_path)], lanes=2, window_shards=2, weights=weights)
    first, second = loaded._reading.order.lanes
    assert first.samples == second.samples == 32
    positions = [lane.picks(0, 0, 32)[:, 1] % 32 for lane in (first, second)]
    assert not np.array_equal(*positions)


@pytest.mark.parametrize("lanes", [1, 2, 4, 6])
def test_every_sample_comes_once_an_epoch_however_unequal_the_lanes(sets, lanes):
    everything = sorted((s, n) for s, (count, _) in enumerate(SETS.values()) for n in range(count))
    for world in (1, 2):
        seen = global_batches(sets, world, lanes=lanes)
        for epoch in (0, 1):
            places = [place for state, part in seen if state.epoch == epoch for place in part]
            assert sorted((s, n) for s, n, _ in places) == everything
        assert [len(part) for _, part in seen[:4]] == [BATCH] * 4
        assert {len(part) for _, part in seen[4:5]} == {50 % BATCH}


def test_a_batch_takes_as_many_of_each_lane_until_one_has_no_more(sets):
    loaded = loader(sets)
    order = loaded._reading.order
    lengths = [lane.samples for lane in order.lanes]
    equal = min(lengths) * LANES
    assert max(lengths) > min(lengths), "or the end of the epoch would not be tested"
    for start in range(0, order.samples, BATCH):
        stop = min(start + BATCH, order.samples)
        for world in (1, 2, 3, 4, 8, 12):
            read = [
                sum(end - begin + filled for _, begin, end, filled in parts)
                for parts in (order.shares(start, stop, BATCH, r, world) for r in range(world))
            ]
            assert order.largest_share(start, stop, BATCH, world) == max(read)
        counts = order.before(stop) - order.before(start)
        assert counts.sum() == stop - start
        if stop <= equal:
            assert counts.tolist() == [BATCH // LANES] * LANES
        shares = [
            sum(end - first for _, first, end, _ in order.shares(start, stop, 0, rank, 4))
            for rank in range(4)
        ]
        assert shares == counts.tolist(), "a rank reads its own lane, at the end of the epoch too"
        before, after = loaded.at(0, start), loaded.at(0, stop)
        assert loader(sets, world_size=4).largest_share(before, after) == max(shares)


def test_positions_are_rounds_over_the_lanes_and_a_seek_gives_what_a_replay_gives():
    dealt = dealt_to_lanes([UNEVEN, [4] * 4], 4)
    order = Lanes([Mixture([Order(p, 0, 2, salt=s) for s, p in enumerate(lane)]) for lane in dealt])
    lengths = [lane.samples for lane in order.lanes]
    rounds = [n for j in range(max(lengths)) for n, length in enumerate(lengths) if j < length]
    for position in range(order.samples + 1):
        expected = np.bincount(rounds[:position], minlength=4).tolist()
        assert order.before(position).tolist() == expected


def test_shards_are_dealt_whole_and_evenly_and_a_small_set_in_ranges():
    for lanes in (2, 3, 5, 11):
        (dealt,) = zip(*dealt_to_lanes([UNEVEN], lanes), strict=True)
        assert sorted(n for piece in dealt for n in piece.shards.tolist()) == list(range(12))
        assert all(
            piece.sizes.tolist() == [UNEVEN[n] for n in piece.shards.tolist()] for piece in dealt
        )
        held = [int(piece.sizes.sum()) for piece in dealt]
        assert max(held) - min(held) <= max(UNEVEN)
        assert min(held) > 0
    (cut,) = zip(*dealt_to_lanes([[10, 3, 10]], 8), strict=True)
    assert [int(piece.sizes.sum()) for piece in cut] == [2, 3, 3, 3, 3, 3, 3, 3]
    ranges = [range(f, f + n) for p in cut for f, n in zip(p.firsts, p.sizes, strict=True)]
    seen = [n for part in ranges for n in part]
    assert seen == list(range(23))
    assert all(len(piece.shards) <= 3 for piece in cut)
    assert [p.shards.tolist() for p in dealt_to_lanes([UNEVEN, [3, 4]], 1)[0]] == [
        list(range(12)),
        [0, 1],
    ]


def test_the_rest_of_one_set_goes_to_the_lanes_with_least_of_the_others():
    dealt = dealt_to_lanes([[5] * 6, [5] * 6], 4)
    assert sorted(sum(int(p.sizes.sum()) for p in lane) for lane in dealt) == [15] * 4


def test_a_weighted_mixture_has_its_shares_in_every_lane_and_no_lane_ends_early():
    sizes = [[30] * 8, [5] * 4, [9]]
    weights = [0.2, 0.5, 0.3]
    mixtures = [
        Mixture([Order(p, 0, 2, salt=s) for s, p in enumerate(lane)], weights, samples=67)
        for lane in dealt_to_lanes(sizes, 4)
    ]
    order = Lanes(mixtures)
    assert order.before(order.samples).tolist() == [67] * 4
    for lane in order.lanes:
        picks = np.concatenate([lane.picks(epoch, 0, 67) for epoch in range(8)])
        for s, weight in enumerate(weights):
            so_far = np.cumsum(picks[:, 0] == s) - weight * np.arange(1, len(picks) + 1)
            assert np.abs(so_far).max() <= 1.5


def test_the_first_images_are_dealt_to_the_lanes_that_have_them():
    dealt = dealt_to_lanes([UNEVEN], 4)
    mixtures = [Mixture([Order(lane[0], 0, 2)]) for lane in dealt]
    first = [FirstOf(m, n, 0, salt=n) for n, m in enumerate(mixtures, start=1)]
    for lane, (few, (pieces,)) in enumerate(zip(first, dealt, strict=True), start=1):
        shards = np.searchsorted(np.cumsum(UNEVEN), few.indices_of(0), side="right")
        assert len(shards) == lane
        assert set(shards.tolist()) <= set(pieces.shards.tolist())


@pytest.mark.parametrize("weights", [None, [0.5, 0.3, 0.2]])
def test_the_first_images_are_those_of_the_whole_order(sets, weights):
    whole = batches(sets, weights=weights, epochs=1)
    first = [place[:2] for _, part in whole for place in part]
    order = loader(sets, weights=weights)._reading.order
    for epoch in (0, 1):
        few = batches(sets, weights=weights, images=24, epochs=2)
        seen = [p[:2] for state, part in few if state.epoch == epoch for p in part]
        assert sorted(seen) == sorted(first[:24])
    assert order.before(26).tolist() == [7, 7, 6, 6]
    assert loader(sets, weights=weights, images=26).samples == 26


def test_ranks_have_whole_lanes_or_share_one():
    assert [list(lanes_of(4, rank, 2)) for rank in range(2)] == [[0, 1], [2, 3]]
    assert [list(lanes_of(2, rank, 4)) for rank in range(4)] == [[0], [0], [1], [1]]
    assert list(lanes_of(4, 1, 3)) == [0, 1, 2, 3]


def test_one_lane_is_the_plain_order_and_its_state_the_one_of_runs_before_there_were_lanes(sets):
    state = loader(sets, lanes=1).at(0, 24)
    older = {name: value for name, value in state.to_json().items() if name != "lanes"}
    assert StreamState.from_json(older) == state
    plain = Mixture([Order(n, 5, 8, salt=s) for s, n in enumerate(_sizes(sets))])
    picks = [tuple(pick[:2]) for pick in plain.picks(0, 0, 50).tolist()]
    assert [p[:2] for _, part in batches(sets, lanes=1, epochs=1) for p in part] == picks


def _sizes(sets):
    return [[shard.samples for shard in m.shards] for m in loader(sets).manifests]


def test_another_number_of_lanes_is_another_order_and_says_so(sets):
    state = loader(sets, lanes=1).at(0, 24)
    with pytest.raises(ShardError, match=r"order \w+ of 1 lanes, this is \w+ of 4 .*lanes"):
        loader(sets).iterate(state)
    assert len({loader(sets, lanes=n).digest for n in (1, 2, 4)}) == 3


def test_lanes_that_cannot_be_are_refused_in_a_sentence(sets):
    with pytest.raises(ShardError, match="5 lanes do not divide a global batch of 12"):
        loader(sets, lanes=5)
    with pytest.raises(ShardError, match=r"torn: the set has 10 samples, too few for 12 lanes"):
        loader(sets, lanes=12)
    with pytest.raises(ShardError, match=r"3 images are asked for.*each of 4 lanes needs one"):
        loader(sets, images=3)


def test_the_log_says_which_nodes_read_more_than_their_share(sets, caplog):
    with caplog.at_level(logging.WARNING):
        loader(sets, world_size=2)
    assert "few has 2 shards, fewer than the 4 lanes: several nodes read the same" in caplog.text
    assert "may read every shard" not in caplog.text
    loader(sets, world_size=3)
    assert "4 lanes are no multiple or part of 3 processes: each of them may read" in caplog.text
    caplog.clear()
    for quiet in ({"world_size": 2, "rank": 1}, {"lanes": 1, "world_size": 2}, {}):
        loader(sets, **quiet)
    assert not caplog.text


def test_windows_are_shared_by_the_lanes_and_hold_a_shard_of_each():
    sizes = [4] * 32
    for window, lanes, expected in ((8, 4, 2), (8, 16, 1), (2, 4, 1)):
        for lane in dealt_to_lanes([sizes], lanes):
            order = Order(lane[0], 0, max(1, window // lanes))
            seen = order.epoch_indices(0, 0, order.samples) // 4
            spans = [
                set(seen[at : at + 4 * expected].tolist())
                for at in range(0, order.samples, 4 * expected)
            ]
            assert {len(span) for span in spans} == {expected}
            assert not any(a & b for a, b in pairwise(spans))
