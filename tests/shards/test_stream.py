"""The order alone: once an epoch, shuffled, and the same from wherever one begins."""

import json
import time
import tracemalloc

import numpy as np
import pytest

from shards.stream import FirstOf, Mixture, Order, StreamState, deal, permutation

SHARDS = [7, 1, 0, 12, 5, 5, 9, 3, 11, 2, 8]  # uneven, one of them empty
SAMPLES = sum(SHARDS)


def test_every_sample_comes_exactly_once_an_epoch_whatever_the_window():
    for window in (1, 2, 4, 100):
        order = Order(SHARDS, seed=3, window_shards=window)
        for epoch in range(4):
            assert sorted(order.epoch_indices(epoch, 0, SAMPLES)) == list(range(SAMPLES))


def test_a_seek_gives_what_a_replay_gives():
    replayed = {e: Order(SHARDS, 3, 3).epoch_indices(e, 0, SAMPLES).tolist() for e in range(3)}
    jumping = Order(SHARDS, 3, 3)
    for draw in np.random.default_rng(0).integers(0, SAMPLES + 1, (300, 2)):
        start, stop = sorted(draw.tolist())
        epoch = int(draw.sum()) % 3
        assert jumping.epoch_indices(epoch, start, stop).tolist() == replayed[epoch][start:stop]


def test_epochs_seeds_and_sets_are_shuffled_differently_and_within_their_windows():
    def whole(**other):
        return (
            Order(SHARDS, **{"seed": 3, "window_shards": 3, **other})
            .epoch_indices(0, 0, SAMPLES)
            .tolist()
        )

    order = Order(SHARDS, 3, 3)
    orders = [
        whole(),
        whole(seed=4),
        whole(salt=1),
        order.epoch_indices(1, 0, SAMPLES).tolist(),
        list(range(SAMPLES)),
    ]
    assert len({tuple(o) for o in orders}) == len(orders)
    shards = np.repeat(np.arange(len(SHARDS)), SHARDS)[whole()]
    for first in range(
        0, len(SHARDS), 3
    ):  # shards come in groups of three, one group wholly before the next
        group = permutation(len(SHARDS), 3, 0, 0, 0)[first : first + 3]
        places = np.flatnonzero(np.isin(shards, group))
        assert places[-1] - places[0] + 1 == len(places) == sum(SHARDS[s] for s in group)
    assert whole() == whole(), "the same seed gives the same order"


def test_the_permutation_is_pinned_since_a_resumed_run_relies_on_it():
    assert permutation(10, seed=0, salt=0, epoch=0, stream=0).tolist() == [
        0,
        2,
        9,
        1,
        8,
        5,
        4,
        3,
        6,
        7,
    ]
    counts = np.zeros((6, 6))
    for seed in range(3000):
        counts[np.arange(6), permutation(6, seed, 0, 0, 1)] += 1
    assert np.abs(counts / 3000 - 1 / 6).max() < 0.03, (
        "every item comes to every place equally often"
    )
    assert permutation(1, 0, 0, 0, 0).tolist() == [0]
    assert permutation(0, 0, 0, 0, 0).tolist() == []


def test_without_shuffle_samples_come_in_shard_order():
    assert Order(SHARDS, 3, 2, shuffle=False).epoch_indices(5, 4, 30).tolist() == list(range(4, 30))


def test_a_position_outside_the_epoch_is_refused():
    with pytest.raises(ValueError, match=f"epoch of {SAMPLES} samples"):
        Order(SHARDS, 3, 2).epoch_indices(0, 0, SAMPLES + 1)


def test_ranks_share_a_batch_whole_and_as_evenly_as_it_goes():
    for world in (1, 2, 3, 8):
        for n in (0, 1, 5, 32):
            parts = [list(range(n))[deal(n, rank, world)] for rank in range(world)]
            assert [item for part in parts for item in part] == list(range(n))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_mixture_without_weights_gives_every_sample_of_every_set_once_and_mixes_evenly():
    mixture = Mixture(
        [Order(SHARDS, 0, 2), Order([40] * 4, 0, 2, salt=1), Order([9], 0, 2, salt=2)]
    )
    sizes = np.array([SAMPLES, 160, 9])
    for epoch in (0, 1, 7):
        picks = mixture.picks(epoch, 0, mixture.samples)
        assert set(picks[:, 2].tolist()) == {epoch}
        for s, size in enumerate(sizes):
            assert sorted(picks[picks[:, 0] == s, 1]) == list(range(size))
        so_far = np.cumsum(picks[:, :1] == np.arange(3), axis=0)
        ideal = np.arange(1, len(picks) + 1)[:, None] * sizes / sizes.sum()
        assert np.abs(so_far - ideal).max() <= 1.5, "at every moment each set has its share"


def test_a_weighted_mixture_has_its_shares_and_each_set_goes_through_epochs_of_its_own():
    orders = [Order(SHARDS, 0, 2), Order([40] * 4, 0, 2, salt=1)]
    mixture = Mixture(orders, [0.7, 0.3])
    picks = np.concatenate([mixture.picks(epoch, 0, mixture.samples) for epoch in range(10)])
    share = np.cumsum(picks[:, 0] == 0) - 0.7 * np.arange(1, len(picks) + 1)
    assert np.abs(share).max() <= 1
    for s, order in enumerate(orders):
        own = picks[picks[:, 0] == s]
        for epoch in range(own[-1, 2]):  # all complete ones
            expected = order.epoch_indices(epoch, 0, order.samples).tolist()
            assert own[own[:, 2] == epoch, 1].tolist() == expected
        assert (np.diff(own[:, 2]) >= 0).all()


@pytest.mark.parametrize("weights", [None, [3, 1, 0.1], [1, 1, 1]])
def test_a_seek_in_a_mixture_gives_what_a_replay_gives(weights):
    def make():
        return Mixture(
            [Order(SHARDS, 0, 2), Order([4] * 4, 0, 2, salt=1), Order([9], 0, 2, salt=2)], weights
        )

    replayed = {epoch: make().picks(epoch, 0, make().samples).tolist() for epoch in (0, 1, 1000)}
    jumping = make()
    for draw in np.random.default_rng(1).integers(0, jumping.samples + 1, (100, 2)):
        start, stop = sorted(draw.tolist())
        for epoch, picks in replayed.items():
            assert jumping.picks(epoch, start, stop).tolist() == picks[start:stop]


def test_weights_that_make_no_mixture_are_refused():
    orders = [Order(SHARDS, 0, 2), Order([4], 0, 2)]
    for weights in ([1], [1, 0], [1, -1], [1, float("nan")], [1, float("inf")]):
        with pytest.raises(ValueError, match="expected 2 numbers above 0"):
            Mixture(orders, weights)


def test_a_seek_among_a_hundred_million_samples_is_quick_and_small():
    rng = np.random.default_rng(0)
    places = [
        (int(e), int(p))
        for e, p in zip(rng.integers(0, 3, 30), rng.integers(0, 10**8 - 64, 30), strict=True)
    ]
    Order([1000] * 100, 0, 8).epoch_indices(0, 0, 64)  # numpy's own first allocations
    sizes = np.full(10_000, 10_000)
    tracemalloc.start()
    try:
        order = Order(sizes, 0, 8)
        for epoch, position in places:
            order.epoch_indices(epoch, position, position + 64)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 3e6, f"{held} bytes are held"
    began = time.perf_counter()
    for _, position in places:
        order.epoch_indices(2, position, position + 64)
    assert (time.perf_counter() - began) / len(places) < 0.1, (
        "a seek builds one window, not the epoch"
    )


def test_the_state_goes_through_json_and_names_a_wrong_field():
    state = StreamState(2, 37, "abc")
    assert StreamState.from_json(json.loads(json.dumps(state.to_json()))) == state
    with pytest.raises(ValueError, match="position is -1"):
        StreamState.from_json({"epoch": 0, "position": -1, "digest": "abc"})
    with pytest.raises(ValueError, match="digest is None"):
        StreamState.from_json({"epoch": 0, "position": 1})


def test_the_first_images_are_the_same_in_every_epoch_and_a_larger_number_holds_them():
    mixture = Mixture([Order(SHARDS, 0, 2), Order([9], 0, 2, salt=2)])
    few, more = FirstOf(mixture, 12, seed=0), FirstOf(mixture, 20, seed=0)
    first, second = (few.picks(epoch, 0, 12) for epoch in (0, 1))

    def images(picks):
        return sorted(map(tuple, picks[:, :2].tolist()))

    assert len(set(images(first))) == 12
    assert images(first) == images(second) == images(mixture.picks(0, 0, 12))
    assert first[:, :2].tolist() != second[:, :2].tolist()
    assert set(images(first)) < set(images(more.picks(3, 0, 20)))
    assert np.array_equal(second[5:9], few.picks(1, 5, 9)), "any slice alone"
    assert second[:, 2].tolist() == [1] * 12
    with pytest.raises(ValueError, match="the first 99999 images are asked for"):
        FirstOf(mixture, 99999, seed=0)
