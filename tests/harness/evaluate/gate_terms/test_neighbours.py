"""Captions and answers copied from the nearest training pictures."""

import numpy as np
import pytest

from harness.evaluate.gate_terms.neighbours import consensus_captions, neighbour_answers

EAST = [1.0, 0.0]
NORTH = [0.0, 1.0]


def directions(*degrees: float) -> np.ndarray:
    radians = np.radians(degrees)
    return np.stack([np.cos(radians), np.sin(radians)], axis=1)


def test_the_caption_most_like_the_others_of_the_neighbours_is_copied():
    captions_N = [
        ["a dog runs on grass", "an animal outside"],
        ["a brown dog runs on the grass", "a red car"],
        ["a dog runs on green grass", "nothing like it"],
    ]
    said = consensus_captions(np.array([EAST]), directions(1, 2, 3), captions_N)
    assert said == ["a dog runs on grass"]


def test_only_the_nearest_pictures_are_copied_from_by_direction_not_length():
    training_ND = directions(1, 2, 88, 89) * np.array([[9.0], [0.1], [1.0], [1.0]])
    captions_N = [["a dog"], ["a dog runs"], ["a boat"], ["a boat sails"]]
    features_JD = np.array([EAST, NORTH]) * 5
    said = consensus_captions(features_JD, training_ND, captions_N, pictures=2)
    assert [caption.split()[1] for caption in said] == ["dog", "boat"]


def test_the_consensus_is_that_of_the_nearest_captions_not_of_all():
    """Three captions agree closely; four others share one common word with everything."""
    close = ["zebra giraffe", "zebra giraffe", "zebra giraffe"]
    spread = ["the one", "the two", "the three", "the four"]
    training_ND = directions(*range(1, 8))
    captions_N = [[caption] for caption in (*spread, *close)]
    said = consensus_captions(np.array([EAST]), training_ND, captions_N, captions=2)
    assert said == ["zebra giraffe"]


def test_of_equal_captions_the_nearest_is_copied():
    said = consensus_captions(np.array([EAST]), directions(3, 1, 2), [["same"], ["Same"], ["SAME"]])
    assert said == ["Same"]


def test_a_caption_is_not_its_own_neighbour():
    captions_N = [["one alone"], ["a dog"], ["a dog"]]
    said = consensus_captions(np.array([EAST]), directions(1, 2, 3), captions_N, captions=1)
    assert said == ["a dog"]


@pytest.mark.parametrize("seed", range(20))
def test_of_two_captions_the_nearer_is_copied(seed):
    words = np.random.default_rng(seed).choice([f"w{n}" for n in range(30)], (2, 20))
    captions_N = [[" ".join(words_of)] for words_of in words]
    said = consensus_captions(np.array([EAST]), directions(2, 1), captions_N)
    assert said == captions_N[1]


def test_a_picture_without_any_feature_is_no_obstacle():
    said = consensus_captions(np.zeros((1, 2)), directions(1, 2), [["a dog"], ["a dog"]])
    assert said == ["a dog"]


def test_neighbours_with_one_caption_or_none():
    assert consensus_captions(np.array([EAST]), directions(1, 2), [[], ["a dog"]]) == ["a dog"]
    assert consensus_captions(np.array([EAST]), directions(1, 2), [[], []]) == [""]
    said = consensus_captions(np.array([EAST, NORTH]), directions(1, 89), [[], ["a"]], pictures=1)
    assert said == ["", "a"]


def test_words_of_one_letter_count():
    captions_N = [["x y"], ["a b"], ["a b"]]
    said = consensus_captions(np.array([EAST]), directions(1, 2, 3), captions_N)
    assert said == ["a b"]


def test_the_neighbours_most_common_answer_to_the_same_question_is_given():
    near = [{"What colour?": "red"}] * 25
    far = [{"what  colour?": "blue", "what shape?": "circle"}] * 40
    training_ND = directions(*np.linspace(0, 10, 25), *np.linspace(80, 90, 40))
    said = neighbour_answers(
        ["what colour?", "WHAT colour?", "what shape?", "who?"],
        [0, 1, 0, 0],
        np.array([EAST, NORTH]),
        training_ND,
        near + far,
    )
    # "what shape?" was asked of far pictures only; "who?" never: the answer most common of all.
    assert said == ["red", "blue", "circle", "blue"]


def test_without_training_questions_nothing_is_said():
    assert neighbour_answers(["who?"], [0], np.array([EAST]), directions(1), [{}]) == [""]
