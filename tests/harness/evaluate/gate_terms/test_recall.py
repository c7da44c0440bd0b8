"""Recall of captions among alike pictures, and what alike is."""

import numpy as np
import pytest

from harness.evaluate.gate_terms.recall import chance, groups_alike, recalled


def test_a_caption_that_suits_its_own_picture_best_is_found():
    nats_PC = np.full((4, 4), 3.0) - np.eye(4)
    assert recalled(nats_PC).all()


def test_a_model_that_does_not_look_finds_nothing():
    nats_PC = np.tile([1.0, 2.0, 3.0], (3, 1))
    assert not recalled(nats_PC).any()


def test_a_caption_that_is_cheap_under_every_picture_is_found_only_by_its_own():
    nats_PC = np.full((3, 3), 3.0)
    nats_PC[:, 0] = 0.5
    assert not recalled(nats_PC).any()
    nats_PC -= 0.2 * np.eye(3)
    assert recalled(nats_PC).all()  # though caption 0 has the fewest nats under each picture


def test_a_model_that_says_at_random_is_at_chance():
    nats_PC = np.random.default_rng(0).normal(size=(1000, 1000))
    assert recalled(nats_PC).sum() < 8


def test_captions_of_the_same_words_are_no_rivals():
    captions = ["A red circle", "a red  circle", "a blue square"]
    nats_PC = np.array([[1.0, 1.0, 2.0], [1.0, 1.0, 2.0], [2.0, 2.0, 1.0]])
    assert recalled(nats_PC).tolist() == [False, False, True]
    assert recalled(nats_PC, captions).all()
    assert chance(captions) == pytest.approx([1 / 2, 1 / 2, 1 / 3])
    assert recalled(np.ones((2, 2)), ["a", "a"]).all()
    assert chance(["a", "a"]).tolist() == [1, 1]  # certain, so it proves nothing


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_named(bad):
    nats_PC = np.ones((3, 3))
    nats_PC[1, 2] = bad
    with pytest.raises(ValueError, match=f"caption 2 has {bad} nats under picture 1"):
        recalled(nats_PC)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match="at least 2 pictures"):
        recalled(np.ones(shape))


def test_alike_pictures_are_grouped():
    rng = np.random.default_rng(0)
    kind_I = rng.permutation(np.repeat(np.arange(4), 25))
    scaled_IK = 10 * kind_I[:, None] + rng.normal(size=(100, 3))
    groups = groups_alike(scaled_IK, size=25)
    assert [len(set(kind_I[group])) for group in groups] == [1, 1, 1, 1]


def test_grouping_starts_outside_so_that_the_last_group_is_not_what_lies_at_both_ends():
    groups = groups_alike(np.arange(120.0)[:, None], size=60)
    assert sorted(group.tolist() for group in groups) == [[*range(60)], [*range(60, 120)]]


@pytest.mark.parametrize(
    ("pictures", "sizes"),
    [
        (0, []),
        (7, [7]),
        (100, [100]),
        (149, [149]),
        (150, [100, 50]),
        (201, [100, 101]),
        (350, [100, 100, 100, 50]),
    ],
)
def test_every_picture_is_in_one_group_and_no_group_is_small(pictures, sizes):
    scaled_IK = np.random.default_rng(0).normal(size=(pictures, 29))
    groups = groups_alike(scaled_IK)
    assert [len(group) for group in groups] == sizes
    assert sorted(row for group in groups for row in group) == list(range(pictures))


def test_pictures_without_statistics_are_in_no_group():
    scaled_IK = np.random.default_rng(0).normal(size=(6, 2))
    scaled_IK[2] = np.nan
    assert np.concatenate(groups_alike(scaled_IK, size=2)).tolist().count(2) == 0
