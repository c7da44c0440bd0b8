"""Parts are made once, by whose they are, and never taken for parts of something else."""

import threading

import pytest

from shards.parts import Parts, Share


def test_every_part_is_some_processs_alone():
    for count in (0, 1, 2, 7):
        for world in (1, 2, 3, 9):
            parts = [n for rank in range(world) for n in Share(rank, world).of(count)]
            assert parts == list(range(count))


def test_parts_come_in_order_and_are_made_once_however_often_work_is_killed(tmp_path):
    made = []

    def make(number: int) -> bytes:
        made.append(number)
        if made.count(2) == 1 and number == 2:
            raise KeyboardInterrupt
        return b"part %d" % number

    parts = Parts(tmp_path / "out", ["a"], 4, Share())
    with pytest.raises(KeyboardInterrupt):
        list(parts.each(make))
    again = Parts(tmp_path / "out", ["a"], 4, Share())
    assert list(again.each(make)) == [(n, b"part %d" % n) for n in range(4)]
    assert made == [0, 1, 2, 2, 3]
    other = Parts(tmp_path / "out", ["b"], 1, Share())
    assert list(other.each(lambda number: b"another")) == [(0, b"another")]
    other.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_first_process_waits_for_the_others(tmp_path):
    first = Parts(tmp_path / "out", [], 3, Share(0, 2))
    second = Parts(tmp_path / "out", [], 3, Share(1, 2))
    came = []
    waiting = threading.Thread(target=lambda: came.extend(first.each(lambda n: b"first")))
    waiting.start()
    waiting.join(0.3)
    assert waiting.is_alive()
    second.make_own(lambda n: b"second")
    waiting.join(10)
    assert came == [(0, b"first"), (1, b"second"), (2, b"second")]
