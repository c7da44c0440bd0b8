"""Work that is dealt out over ranks: in order, whole, and with one end for all."""

import threading
import time

import numpy as np
import pytest

from harness.machine.dealing import CHUNK, Alone, RankError, StoppedError
from ranks_in_threads import on_ranks
from shards.files import ShardError, UnreachableError


def squares(dealer, items=range(7), fails=None):
    """Deals out squares, and tells which rank made each."""

    def square(number):
        if number == fails:
            raise ShardError(f"number {number} cannot be read")
        return [number**2, dealer.rank]

    def main():
        return list(dealer.dealt("square", [(n,) for n in items], square))

    return dealer.lead(main, lambda: {"square": square}, (ShardError, UnreachableError))


def test_what_comes_back_is_in_the_order_of_the_items_and_each_is_done_by_one_rank():
    alone = squares(Alone())
    for size in (1, 2, 3):
        first, *others = on_ranks(size, squares)
        assert [value for value, _ in first] == [value for value, _ in alone]
        assert [rank for _, rank in first] == [n % size for n in range(7)]
        assert others == [None] * (size - 1)


def test_arrays_come_back_bit_for_bit_and_values_larger_than_the_store_takes():
    rng = np.random.default_rng(0)
    sent = rng.normal(size=CHUNK // 4)
    sent[:2] = np.nan, np.inf
    narrow_ND = rng.normal(size=(3, 4)).astype(np.float16)

    def given(dealer):
        def make(what):
            return {"large": [sent, None], "narrow": (narrow_ND.T, np.float32(0.1))}[what]

        items = [("narrow",), ("large",), ("large",), ("narrow",)]
        return dealer.lead(lambda: list(dealer.dealt("make", items, make)), lambda: {"make": make})

    found = on_ranks(3, given)[0]
    assert np.array_equal(found[1][0], sent, equal_nan=True)
    assert found[3][0].dtype == np.float16
    assert np.array_equal(found[0][0], found[2 - 2][0])
    assert np.array_equal(on_ranks(4, given)[0][3][0], narrow_ND.T)
    assert np.float32(on_ranks(4, given)[0][3][1]) == np.float32(0.1)


@pytest.mark.parametrize("fails", [0, 1, 5])
def test_what_one_rank_cannot_read_ends_all_with_the_same_sentence(fails):
    ended = on_ranks(3, lambda dealer: squares(dealer, fails=fails))
    for came in ended:
        assert type(came) is ShardError
        assert str(came) == f"number {fails} cannot be read"
    assert [getattr(came, "is_told", False) for came in ended] == [False, True, True]


def test_a_fault_that_nobody_expects_ends_the_others_too():
    def broken(dealer):
        def make(number):
            if number == 1:
                raise KeyError("lost")
            return number

        return dealer.lead(
            lambda: list(dealer.dealt("make", [(0,), (1,)], make)), lambda: {"make": make}
        )

    first, second, third = on_ranks(3, broken)
    assert isinstance(second, KeyError)  # its own, with its traceback
    assert isinstance(first, RankError)
    assert "rank 1 could not do its part of the work: KeyError: 'lost'" in str(first)
    assert isinstance(third, RankError)


def test_a_fault_of_the_first_rank_itself_ends_the_others_too():
    def broken(dealer):
        def main():
            raise ValueError("no bootstrap")

        return dealer.lead(main, dict)

    first, second = on_ranks(2, broken)
    assert isinstance(first, ValueError)
    assert isinstance(second, RankError)


def test_a_signal_that_one_rank_gets_stops_all_of_them_after_the_same_items():
    asked = threading.Event()
    done = []

    def stopped(dealer):
        def make(number):
            done.append(number)
            if number == 4:
                asked.set()
            return number

        items = [(n,) for n in range(30)]
        return dealer.lead(lambda: list(dealer.dealt("make", items, make)), lambda: {"make": make})

    came = on_ranks(3, stopped, stop_asked=asked.is_set)
    assert [type(one) for one in came] == [StoppedError] * 3
    assert sorted(done) == list(range(6))


def test_ranks_can_be_led_again_and_everywhere_reaches_all_of_them():
    seen = []

    def twice(dealer):
        def note(name):
            seen.append((name, dealer.rank))
            return dealer.rank

        for name in ("a", "b"):
            dealer.lead(
                lambda name=name: dealer.everywhere("note", (name,), note), lambda: {"note": note}
            )

    on_ranks(3, twice)
    assert sorted(seen) == [(name, rank) for name in "ab" for rank in range(3)]


def test_a_rank_that_waits_says_so():
    waits = []

    class Waiting:
        def __enter__(self):
            waits.append(time.monotonic())

        def __exit__(self, *_):
            pass

    def slow(dealer):
        def make(number):
            return number

        return dealer.lead(
            lambda: [*dealer.dealt("make", [(0,), (1,)], make)], lambda: {"make": make}
        )

    on_ranks(2, slow, waiting=Waiting)
    assert len(waits) == 3  # for the order, its result, and the end


def test_what_one_rank_cannot_open_ends_all_with_the_same_sentence():
    def opened(dealer):
        def work():
            if dealer.rank == 1:
                raise ShardError("rank 1 has no such set")
            return {"make": make}

        def make(number):
            return number

        main = lambda: list(dealer.dealt("make", [(0,), (1,), (2,)], make))  # noqa: E731
        return dealer.lead(main, work, [ShardError])

    assert [str(came) for came in on_ranks(3, opened)] == ["rank 1 has no such set"] * 3


def test_no_rank_leaves_before_the_first_is_done():
    left = []

    def closing(dealer):
        if not dealer.rank:
            time.sleep(0.2)
            left.append(0)
        dealer.close()
        left.append(dealer.rank)

    on_ranks(3, closing)
    assert left[0] == 0
    assert sorted(left) == [0, 0, 1, 2]
