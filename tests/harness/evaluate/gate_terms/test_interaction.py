"""The additive part of a model's answers, and the grids on which it is known."""

import itertools
from fractions import Fraction

import numpy as np

from harness.evaluate.gate_terms.interaction import additive_answers, complete_grid

COLOURS = ("red", "green", "blue")
SHAPES = ("circle", "square", "triangle")


def test_a_model_that_is_right_about_colour_and_about_shape_is_additive():
    answers_PT = [list(picture) for picture in itertools.product(COLOURS, SHAPES)]
    assert additive_answers(answers_PT) == answers_PT


def test_a_model_that_never_looks_is_additive():
    answers_PT = [["red", "circle", "yes"]] * 5
    assert additive_answers(answers_PT) == answers_PT


def test_yes_to_one_question_and_no_to_its_opposite_is_interaction():
    # "Is it red?", "Is it blue?": the additive part knows that one is yes, not which.
    answers_PT = [["yes", "no"]] * 3 + [["no", "yes"]] * 3
    additive = additive_answers(answers_PT)
    assert additive == [["no", "no"]] * 6


def test_a_picture_that_makes_every_answer_yes_is_additive():
    answers_PT = [["yes", "yes"]] * 4 + [["no", "no"]] * 4
    assert additive_answers(answers_PT) == answers_PT


def test_it_is_the_projection_of_the_one_hot_answers_in_exact_fractions():
    rng = np.random.default_rng(0)
    answer_PT = rng.choice(list("abcd"), size=(31, 7), p=[0.4, 0.3, 0.2, 0.1])

    def exact(picture: int, prompt: int, answer: str) -> tuple[Fraction, Fraction]:
        is_it_PT = answer_PT == answer
        of_prompt = Fraction(int(is_it_PT[:, prompt].sum()), 31)
        of_picture = Fraction(int(is_it_PT[picture].sum()), 7)
        return of_picture + of_prompt - Fraction(int(is_it_PT.sum()), 31 * 7), of_prompt

    expected_PT = [
        [max("abcd", key=lambda answer, p=p, t=t: exact(p, t, answer)) for t in range(7)]
        for p in range(31)
    ]
    assert additive_answers(answer_PT.tolist()) == expected_PT


def test_of_equal_answers_it_is_the_one_more_common_for_the_prompt():
    answers_PT = [["yes", "no"], ["no", "yes"], ["yes", "yes"]]
    assert additive_answers(answers_PT) == [["yes", "yes"]] * 3


def asked(prompts_of: dict[str, list[str]]) -> tuple[list[str], list[str]]:
    pairs = [(prompt, image) for image, prompts in prompts_of.items() for prompt in prompts]
    return [prompt for prompt, _ in pairs], [image for _, image in pairs]


def test_the_largest_grid_is_found_with_its_texts():
    prompt_C, image_C = asked(
        {"i": ["x", "y", "z"], "j": ["z", "x"], "k": ["y", "x"], "l": ["x", "y", "y"], "m": ["x"]}
    )
    rows_PT = complete_grid(prompt_C, image_C, fewest_pictures=2)
    asked_of = [[(image_C[row], prompt_C[row]) for row in rows_T] for rows_T in rows_PT]
    assert asked_of == [
        [("i", "x"), ("i", "y")],
        [("k", "x"), ("k", "y")],
        [("l", "x"), ("l", "y")],
    ]
    assert rows_PT[2, 1] == prompt_C.index("y", image_C.index("l"))  # of the same two the first


def test_a_frequent_prompt_that_stands_alone_does_not_hide_a_grid():
    prompt_C, image_C = asked(
        {f"a{n}": ["x"] for n in range(9)} | {"i": ["y", "z"], "j": ["z", "y"]}
    )
    assert complete_grid(prompt_C, image_C, fewest_pictures=2).shape == (2, 2)


def test_without_two_prompts_on_enough_pictures_there_is_no_grid():
    prompt_C, image_C = asked({"i": ["x", "y"], "j": ["x"], "k": ["y"]})
    assert complete_grid(prompt_C, image_C, fewest_pictures=2) is None
    assert complete_grid([], [], fewest_pictures=2) is None
