"""The shallow floor: what the forest finds, what it cannot know, and what it must not see."""

import subprocess
import sys

import numpy as np
import pytest

from harness.evaluate.gate_terms import shallow
from harness.evaluate.gate_terms.shallow import shallow_answers

QUICK = {"trees": 10}


def planted(texts: int = 1000, seed: int = 0) -> tuple[list[str], list[str], np.ndarray, list[int]]:
    """Returns two questions on each picture; a bin of the histogram answers one, the brightness the
    other.
    """
    rng = np.random.default_rng(seed)
    image_C = np.arange(texts) // 2
    statistics_CK = rng.random((texts // 2, 28)).astype(np.float32)[image_C]
    of_colour_C = np.arange(texts) % 2 == 0
    questions = np.where(of_colour_C, "Is there  much green?", "is it day?").tolist()
    high_C = np.where(of_colour_C, statistics_CK[:, 12], statistics_CK[:, 0]) > 0.5
    truths = np.where(of_colour_C, np.where(high_C, "yes", "no"), np.where(high_C, "day", "night"))
    return questions, truths.tolist(), statistics_CK, image_C.tolist()


def accuracy(floor: shallow.ShallowFloor, truths: list[str]) -> float:
    return float(np.mean([truths[row] for row in floor.rows_C] == np.array(floor.answers)))


def test_an_answer_that_a_statistic_tells_is_found():
    questions, truths, statistics_CK, image_C = planted()
    floor = shallow_answers(questions, truths, statistics_CK, image_C, **QUICK)
    assert accuracy(floor, truths) >= 0.95
    assert floor.rows_C.tolist() == list(range(1000))
    assert floor.seconds > 0
    assert len(floor.rules) == 5


def test_statistics_of_other_pictures_leave_the_floor_of_the_words():
    questions, truths, statistics_CK, image_C = planted()
    rng = np.random.default_rng(1)
    shuffled_CK = statistics_CK[::2][rng.permutation(500)[image_C]]
    floor = shallow_answers(questions, truths, shuffled_CK, image_C, **QUICK)
    assert accuracy(floor, truths) == pytest.approx(0.5, abs=0.05)


def test_a_picture_is_never_learnt_from_itself():
    """Its answer is drawn at random and the same for all its ten questions: only a forest that saw
    some of them would know the others.
    """
    rng = np.random.default_rng(0)
    image_C = (np.arange(1000) // 10).tolist()
    statistics_CK = rng.random((100, 28))[image_C]
    truths = rng.choice(["yes", "no"], 100)[image_C].tolist()
    floor = shallow_answers(
        [f"q{n % 10}" for n in range(1000)], truths, statistics_CK, image_C, **QUICK
    )
    assert accuracy(floor, truths) < 0.65


def test_the_aspect_ratio_is_a_statistic():
    rng = np.random.default_rng(0)
    statistics_CK = np.zeros((600, 28), np.float32)
    wide_C = rng.random(600) < 0.5
    statistics_CK[:, 26] = rng.integers(200, 2000, 600)
    statistics_CK[:, 25] = statistics_CK[:, 26] * np.where(wide_C, 1.02, 0.98)
    truths = np.where(wide_C, "wide", "high").tolist()
    floor = shallow_answers(["shape?"] * 600, truths, statistics_CK, range(600), **QUICK)
    assert accuracy(floor, truths) >= 0.97


def test_the_floor_is_not_below_the_most_common_answer_of_each_question():
    """Each question has its answer, and a name too rare to become a column."""
    rng = np.random.default_rng(0)
    names = ["".join(rng.choice(list("abcdefgh"), 6)) for _ in range(400)]
    answer_of = rng.choice([f"answer {n}" for n in range(7)], 400)
    number_C = rng.permutation(np.arange(1200) % 400)
    questions = [f"what is {names[number]}" for number in number_C]
    truths = answer_of[number_C].tolist()
    statistics_CK = rng.random((1200, 28))
    floor = shallow_answers(questions, truths, statistics_CK, range(1200), **QUICK)
    assert floor.rules == ("most common answer",) * 5
    assert accuracy(floor, truths) > 0.9


def test_pictures_without_statistics_are_answered_too():
    questions, truths, statistics_CK, image_C = planted(400)
    statistics_CK[200:] = np.nan
    floor = shallow_answers(questions, truths, statistics_CK, image_C, **QUICK)
    right_C = np.array(floor.answers) == np.array(truths)
    assert right_C[:200].mean() > 0.85
    assert right_C[200:].mean() < 0.65


def test_rare_answers_are_never_given():
    questions, truths, statistics_CK, image_C = planted(400)
    truths[::10] = ["seldom"] * 40
    floor = shallow_answers(questions, truths, statistics_CK, image_C, most_answers=4, **QUICK)
    assert set(floor.answers) == {"yes", "no", "day", "night"}
    assert len(floor.answers) == 400


def test_of_too_many_texts_whole_pictures_at_even_steps_are_used():
    questions, truths, statistics_CK, image_C = planted(400)
    floor = shallow_answers(questions, truths, statistics_CK, image_C, most_texts=100, **QUICK)
    assert len(floor.answers) == len(floor.rows_C) == 100
    used = [image_C[row] for row in floor.rows_C]
    assert used[::2] == used[1::2]
    assert set(np.diff(used[::2])) <= {4, 5}
    assert used[-1] == 199


def test_the_same_texts_give_the_same_answers():
    questions, truths, statistics_CK, image_C = planted(200)
    one, other = (
        shallow_answers(questions, truths, statistics_CK, image_C, **QUICK) for _ in range(2)
    )
    assert one.answers == other.answers


def test_no_words_and_unequal_pictures_are_no_obstacle():
    truths = ["yes"] * 9 + ["no"]
    floor = shallow_answers([""] * 10, truths, np.zeros((10, 28)), [*range(4), *[4] * 6], **QUICK)
    assert floor.answers == ["yes"] * 10


def test_too_few_pictures_have_no_floor():
    questions, truths, statistics_CK, image_C = planted(8)
    assert shallow_answers(questions, truths, statistics_CK, image_C) is None
    assert shallow_answers([], [], np.zeros((0, 28)), []) is None


def test_scikit_learn_is_not_loaded_until_a_floor_is_asked_for():
    code = (
        "import sys, harness.evaluate.gate_terms.shallow, harness.evaluate.gate_terms.neighbours;"
        "sys.exit('sklearn' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
