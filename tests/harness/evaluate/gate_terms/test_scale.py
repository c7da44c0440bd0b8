"""Distances between pictures in what needs no look at their content."""

import numpy as np
import pytest

from harness.evaluate.gate_terms.scale import nearest, nearest_k, scaled

GROUPS = {
    "brightness": slice(0, 1),
    "histogram": slice(1, 25),
    "aspect": slice(25, 26),
    "size": slice(26, 28),
    "file size": slice(28, 29),
}


def pictures(count: int = 200, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    statistics_IK = rng.random((count, 28)).astype(np.float32)
    statistics_IK[:, 25:27] = rng.integers(100, 900, (count, 2))
    statistics_IK[:, 27] = rng.integers(5_000, 90_000, count)
    return statistics_IK


@pytest.mark.parametrize("group", GROUPS)
def test_every_group_weighs_the_same(group):
    assert scaled(pictures())[:, GROUPS[group]].var(axis=0).sum() == pytest.approx(1)


def test_a_group_weighs_the_same_where_most_of_its_columns_are_constant():
    statistics_IK = pictures()
    statistics_IK[:, 3:25] = 0.1
    scaled_IK = scaled(statistics_IK)
    assert scaled_IK[:, GROUPS["histogram"]].var(axis=0).sum() == pytest.approx(1)
    assert not scaled_IK[:, 3:25].any()


def test_pictures_of_one_size_do_not_differ_in_size_or_aspect():
    statistics_IK = pictures()
    statistics_IK[:, 25:27] = (640, 480)
    assert not scaled(statistics_IK)[:, 25:28].any()


def test_sizes_count_by_their_ratio():
    statistics_IK = pictures(3)
    statistics_IK[:, 27] = (1_000, 10_000, 100_000)
    bytes_I = scaled(statistics_IK)[:, 28]
    assert bytes_I[1] - bytes_I[0] == pytest.approx(bytes_I[2] - bytes_I[1])


def test_pictures_without_statistics_change_nothing_and_are_near_nothing():
    statistics_IK = pictures(20)
    missing_IK = np.concatenate([statistics_IK, np.full((2, 28), np.nan, np.float32)])
    scaled_IK = scaled(missing_IK)
    assert np.array_equal(scaled_IK[:20], scaled(statistics_IK))
    assert np.isnan(scaled_IK[20:]).all()
    assert nearest(scaled_IK, 0, np.array([20, 21])) is None
    assert nearest(scaled_IK, 20, np.arange(20)) is None
    assert nearest(scaled_IK, 0, np.array([21, 7])) == 7
    assert nearest_k(scaled_IK, scaled_IK[:3], 50).shape == (3, 20)
    with pytest.raises(ValueError, match="rows to NaN"):
        nearest_k(scaled_IK, scaled_IK[20:], 3)


def test_statistics_of_nothing_but_missing_pictures_are_missing():
    assert np.isnan(scaled(np.full((3, 28), np.nan))).all()


def test_the_nearest_is_another_picture_among_those_allowed():
    scaled_IK = np.array([[0.0], [0.1], [5.0], [6.0]])
    assert nearest(scaled_IK, 0, np.arange(4)) == 1
    assert nearest(scaled_IK, 0, np.array([3, 2, 0])) == 2
    assert nearest(scaled_IK, 0, np.array([0])) is None


def test_the_k_nearest_in_blocks_are_those_of_a_plain_search(monkeypatch):
    monkeypatch.setattr("harness.evaluate.gate_terms.scale._CELLS", 450)
    scaled_IK = scaled(pictures())
    queries_JK = scaled(pictures(31, seed=1))
    distance_JI = np.square(queries_JK[:, None] - scaled_IK).sum(axis=2)
    expected = distance_JI.argsort(axis=1)[:, :7]
    assert np.array_equal(nearest_k(scaled_IK, queries_JK, 7), expected)


def test_another_number_of_columns_is_refused():
    with pytest.raises(ValueError, match=r"28 columns, these are \(5, 27\)"):
        scaled(np.zeros((5, 27)))
