"""benchmarks/equal_loss.py: when one loop's dev loss is as low as another's, and what of its time
counts; and that both captions files of Flickr8k are read alike.
"""

import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import equal_loss

    return equal_loss


def test_a_loss_is_reached_on_the_line_between_two_looks_or_not_at_all(program):
    points = [(10.0, 4.0), (20.0, 3.0), (30.0, 3.5), (40.0, 2.0)]
    assert program.seconds_to(points, 4.5) == 10
    assert program.seconds_to(points, 3.25) == 17.5
    assert program.seconds_to(points, 2.75) == 35
    assert program.seconds_to(points, 1.9) is None


def test_a_look_at_the_dev_loss_takes_none_of_a_loops_time(program, monkeypatch):
    clock = iter([100.0, 110.0, 150.0, 160.0, 200.0])  # a look of 40 s after 10 s of learning
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    curve = program.Curve()
    looks = 0

    def look():
        nonlocal looks
        looks += 1
        return 6.0, 2.0

    for _ in range(2 * program.EVERY):
        curve.taken(look)
    assert looks == 2
    assert curve.points == [(10.0, 3.0), (20.0, 3.0)]


def test_both_captions_files_of_flickr8k_are_read_alike(program, tmp_path):
    import loop

    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / name).touch()
    table = 'image,caption\na.jpg,"A dog , running ."\na.jpg,Two .\nb.jpg,Three .\n'
    (tmp_path / "captions.txt").write_text(table)
    as_table = loop.captions_of(tmp_path, tmp_path, 1)
    lines = "a.jpg#0\tA dog , running .\na.jpg#1\tTwo .\nb.jpg#0\tThree .\n"
    (tmp_path / "Flickr8k.token.txt").write_text(lines)
    assert list(as_table.values()) == [["A dog , running .", "Two ."]]
    assert loop.captions_of(tmp_path, tmp_path, 1) == as_table
