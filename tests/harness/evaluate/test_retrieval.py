"""Recall of retrieval against a loop that is slow and plain."""

import numpy as np
import pytest

from harness.config.schema import EvaluationConfig
from harness.evaluate.retrieval import RANKS, recalls
from harness.evaluate.told import recall_rows, score_line


def slow(sim_NT, picture_T):
    found = {}
    for rank in RANKS:
        by_picture = []
        for picture in range(len(sim_NT)):
            order = sorted(range(len(picture_T)), key=lambda t: -sim_NT[picture, t])
            by_picture.append(any(picture_T[t] == picture for t in order[:rank]))
        by_text = []
        for text, picture in enumerate(picture_T):
            order = sorted(range(len(sim_NT)), key=lambda n: -sim_NT[n, text])
            by_text.append(picture in order[:rank])
        found[f"image_to_text_R{rank}"] = 100 * np.mean(by_picture)
        found[f"text_to_image_R{rank}"] = 100 * np.mean(by_text)
    return found


def test_recalls_are_those_of_a_loop_with_chance_and_intervals_beside_them():
    rng = np.random.default_rng(0)
    picture_T = np.repeat(np.arange(40), rng.integers(1, 6, 40))
    sim_NT = rng.normal(size=(40, len(picture_T)))
    sim_NT += 1.5 * (picture_T == np.arange(40)[:, None])
    figures = recalls(sim_NT, picture_T, EvaluationConfig(bootstrap=50))
    for name, value in slow(sim_NT, picture_T).items():
        assert figures[name] == pytest.approx(value)
        assert figures[f"{name}_low"] <= value <= figures[f"{name}_high"]
    assert figures["text_to_image_R5_chance"] == pytest.approx(100 * 5 / 40)
    assert len(recall_rows(figures)) == 6
    assert "R@1" in score_line("retrieval", figures)
    drawn = [rng.permutation(len(picture_T))[:5] for _ in range(4000)]
    hits = [[(picture_T[few] == n).any() for n in range(40)] for few in drawn]
    assert figures["image_to_text_R5_chance"] == pytest.approx(100 * np.mean(hits), abs=0.5)


def test_a_model_that_says_the_same_of_all_has_no_hit():
    figures = recalls(np.zeros((10, 20)), np.repeat(np.arange(10), 2), EvaluationConfig())
    assert figures["image_to_text_R10"] == figures["text_to_image_R5"] == 0.0


def test_what_is_no_number_is_found_by_nobody():
    picture_T = np.repeat(np.arange(10), 2)
    sim_NT = 1.0 * (picture_T == np.arange(10)[:, None])
    sim_NT[3] = np.nan
    figures = recalls(sim_NT, picture_T, EvaluationConfig())
    assert figures["image_to_text_R1"] == figures["text_to_image_R1"] == 90.0
    figures = recalls(np.full((20, 40), np.nan), np.repeat(np.arange(20), 2), EvaluationConfig())
    assert figures["image_to_text_R10"] == figures["text_to_image_R10"] == 0.0
