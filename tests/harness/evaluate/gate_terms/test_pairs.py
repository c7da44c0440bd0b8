"""Groups of questions and pictures that are right together or not at all."""

import numpy as np
import pytest

from harness.evaluate.gate_terms.pairs import paired

RED, BLUE = "Is it red?", "Is it blue?"
TRUTHS = {("i", RED): "yes", ("i", BLUE): "no", ("j", RED): "no", ("j", BLUE): "yes"}
QUESTION_C = [question for _, question in TRUTHS]
IMAGE_C = [image for image, _ in TRUTHS]
TRUTH_C = list(TRUTHS.values())


@pytest.mark.parametrize(
    ("wrong", "shares"),
    [
        ((), (1, 1, 1)),
        ((("i", RED),), (0, 1 / 2, 1 / 2)),
        ((("i", RED), ("j", RED)), (0, 1 / 2, 0)),
        ((("i", RED), ("i", BLUE)), (0, 0, 1 / 2)),
        (tuple(TRUTHS), (0, 0, 0)),
    ],
)
def test_the_shares_of_a_group_are_those_of_naturalbench(wrong, shares):
    found = paired(QUESTION_C, IMAGE_C, TRUTH_C, [text not in wrong for text in TRUTHS])
    assert (found.group_accuracy, found.question_accuracy, found.image_accuracy) == shares
    assert (found.groups, found.questions, found.chance) == (1, 2, 1 / 16)


@pytest.mark.parametrize("answer", ["yes", "no"])
def test_a_model_that_always_says_the_same_gets_no_group_question_or_image(answer):
    found = paired(QUESTION_C, IMAGE_C, TRUTH_C, [truth == answer for truth in TRUTH_C])
    assert (found.group_accuracy, found.question_accuracy, found.image_accuracy) == (0, 0, 0)


@pytest.mark.parametrize(
    "truths",
    [
        ("yes", "no", "yes", "no"),  # the same on both pictures
        ("yes", "yes", "no", "no"),  # the same for both questions
        ("yes", "no", "no", "no"),
    ],
)
def test_texts_that_need_no_look_at_both_make_no_group(truths):
    assert paired(QUESTION_C, IMAGE_C, truths, [True] * 4) is None


def test_questions_on_one_picture_or_of_other_words_make_no_group():
    assert paired([RED, BLUE], ["i", "i"], ["yes", "no"], [True] * 2) is None
    other = [RED, BLUE, RED, "Is it green?"]
    assert paired(other, IMAGE_C, TRUTH_C, [True] * 4) is None
    same = [RED, BLUE, "is it  RED?", "is it blue?"]
    assert paired(same, IMAGE_C, TRUTH_C, [True] * 4).groups == 1


def test_luck_gets_what_is_told_and_each_text_is_in_one_group():
    rng = np.random.default_rng(0)
    images = 8000
    image_C = np.repeat(np.arange(images), 3).tolist()
    question_C = [RED, BLUE, "Is it green?"] * images
    colour_I = rng.integers(3, size=images)
    truth_C = np.where(np.arange(3) == colour_I[:, None], "yes", "no").ravel().tolist()
    right_C = rng.random(3 * images) < 0.5
    found = paired(question_C, image_C, truth_C, right_C)
    assert found.groups > images / 3
    assert 4 * found.groups <= 3 * images
    assert found.group_accuracy == pytest.approx(found.chance, abs=0.02)
    assert found.question_accuracy == pytest.approx(1 / 4, abs=0.02)
    assert found.image_accuracy == pytest.approx(1 / 4, abs=0.02)
    assert found == paired(question_C, image_C, truth_C, right_C)


def test_every_text_is_in_one_group_at_most():
    # Two pictures could each be grouped with the first: only one is.
    questions = [RED, BLUE] * 3
    found = paired(questions, list("iijjkk"), ["yes", "no", "no", "yes", "no", "yes"], [True] * 6)
    assert found.groups == 1


def test_a_text_that_waited_for_two_partners_is_given_to_one():
    questions = ["A?", "B?", "C?", "A?", "B?", "A?", "C?"]
    truths = ["yes", "no", "no", "no", "yes", "no", "yes"]
    assert paired(questions, list("iiijjkk"), truths, [True] * 7).groups == 1


def test_other_answers_than_yes_and_no_must_differ_for_both_questions():
    questions = ["What colour?", "Is it round?"] * 2
    for truths in (["red", "yes", "red", "no"], ["red", "yes", "blue", "yes"]):
        assert paired(questions, list("iijj"), truths, [True] * 4) is None
    truths = ["red", "yes", "blue", "no"]
    assert paired(questions, list("iijj"), truths, [True] * 4).groups == 1


def test_complementary_pairs_are_right_together():
    questions = [RED, RED, BLUE, BLUE, RED, BLUE]
    truths = ["yes", "no", "no", "yes", "no", "no"]
    right = [True, True, True, False, True, True]
    names = ["a", "a", "b", "b", None, "c"]
    found = paired(questions, list("ijklmn"), truths, right, names)
    assert (found.groups, found.questions, found.chance) == (2, 1, 1 / 4)
    assert (found.group_accuracy, found.question_accuracy) == (1 / 2, 1 / 2)
    assert found.image_accuracy == 3 / 4


def test_a_pair_with_the_same_truth_is_none():
    assert paired([RED, RED], ["i", "j"], ["no", "no"], [True] * 2, ["a", "a"]) is None
