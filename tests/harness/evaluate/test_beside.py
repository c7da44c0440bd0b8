"""Figures beside the verdict, on answers made by hand, and the table that tells them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy

from harness.config.schema import Config
from harness.evaluate.beside import (
    add_beside,
    interaction,
    neighbour_floor_of_questions,
    paired_accuracy,
)
from harness.evaluate.beside_table import ROWS, beside_tables
from harness.evaluate.collected import Collected
from harness.evaluate.floors import neighbour_floor
from harness.evaluate.predict import Prediction, Stratum
from harness.evaluate.results import TaskResult
from harness.evaluate.space import UnmeasuredError
from harness.evaluate.training_pictures import training_pictures
from shards.record import Record, Text
from shards.write import write_shards

COLOURS = ("red", "green", "blue")
SHAPES = ("circle", "square", "triangle")
SETTINGS = Config(name="-", evaluation={"bootstrap": 200}).evaluation


def answered(picture: int, question: str, answer: str, truth: str, **meta) -> Prediction:
    return Prediction(
        dataset="toy",
        split="test",
        key=f"{picture:04d}",
        image_id=str(picture),
        text_id=f"{picture} {question}",
        task="vqa",
        prompt=f"Question: {question} Answer:",
        question=question,
        references=(truth,),
        answer=answer,
        p_eos_first=0.0,
        meta=meta,
    )


def colours_and_shapes(pictures: int = 18) -> list[Prediction]:
    """Right answers to what colour and what shape."""
    return [
        answered(n, question, truth, truth)
        for n in range(pictures)
        for question, truth in (
            ("what colour is it?", COLOURS[n % 3]),
            ("what shape is it?", SHAPES[n // 3 % 3]),
        )
    ]


def opposites(says, pictures: int = 20) -> list[Prediction]:
    """Answers to two yes/no questions of which one is true of each picture."""
    found = []
    for n in range(pictures):
        for question, truth in (
            ("is it red?", "yes" if n % 2 else "no"),
            ("is it blue?", "no" if n % 2 else "yes"),
        ):
            found.append(answered(n, question, says(question, truth), truth))
    return found


# ---- interaction ---------------------------------------------------------------------------------


def test_a_model_that_is_right_about_colour_and_about_shape_has_no_interaction():
    figure = interaction(colours_and_shapes(), SETTINGS)
    assert (figure["score"], figure["additive_score"], figure["gap"]) == (100, 100, 0)
    assert (figure["gap_low"], figure["gap_high"]) == (0, 0)
    assert (figure["images"], figure["prompts"]) == (18, 2)


def test_a_model_whose_answers_need_picture_and_question_together_loses_half_without():
    figure = interaction(opposites(lambda question, truth: truth), SETTINGS)
    assert (figure["score"], figure["additive_score"], figure["gap"]) == (100, 50, 50)


def test_the_gap_has_an_interval_over_pictures():
    """Right on most pictures, always `yes` on three."""
    found = opposites(lambda question, truth: truth)
    found = [
        answered(int(p.image_id), p.question, "yes", p.references[0]) if int(p.image_id) < 3 else p
        for p in found
    ]
    figure = interaction(found, SETTINGS)
    assert figure["score"] == pytest.approx(92.5)
    assert figure["gap_low"] < figure["gap"] < figure["gap_high"]


def test_without_two_questions_on_the_same_pictures_there_is_no_interaction():
    found = [answered(n, f"question {n}?", "yes", "yes") for n in range(30)]
    with pytest.raises(UnmeasuredError, match="no two questions"):
        interaction(found, SETTINGS)


# ---- pairs ---------------------------------------------------------------------------------------


def test_groups_are_right_for_a_model_that_looks_and_wrong_for_one_that_does_not():
    looking = paired_accuracy(opposites(lambda question, truth: truth), SETTINGS)
    assert (looking["group_accuracy"], looking["chance"], looking["groups"]) == (100, 6.25, 10)
    blind = paired_accuracy(opposites(lambda question, truth: "yes"), SETTINGS)
    assert (blind["group_accuracy"], blind["question_accuracy"]) == (0, 0)


def test_complementary_pairs_are_the_groups_where_the_set_names_them():
    def pair(n: int, answer: str) -> list[Prediction]:
        ids = [f"{place} what is it?" for place in (2 * n, 2 * n + 1)]
        return [
            answered(2 * n, "what is it?", "a cat", "a cat", pair_id=ids[1]),
            answered(2 * n + 1, "what is it?", answer, "a dog", pair_id=ids[0]),
        ]

    found = [p for n in range(10) for p in pair(n, "a dog" if n < 4 else "a cat")]
    figure = paired_accuracy(found, SETTINGS)
    assert (figure["group_accuracy"], figure["chance"], figure["groups"]) == (40, 25, 10)
    assert 0 < figure["group_accuracy_low"] < 40 < figure["group_accuracy_high"] < 80


def test_without_opposite_answers_there_are_no_groups():
    with pytest.raises(UnmeasuredError, match="no two pictures have opposite answers"):
        paired_accuracy([answered(n, "is it?", "yes", "yes") for n in range(9)], SETTINGS)


# ---- neighbours ----------------------------------------------------------------------------------


def direction(index: int) -> np.ndarray:
    """The patch of a picture: near those of its colour."""
    centre_D = 10 * np.eye(8)[index % 3]
    return (centre_D + np.random.default_rng(index).normal(size=8)).astype(np.float16)[None]


@pytest.fixture
def collected(tmp_path) -> Collected:
    """Pictures 0 to 17 judged, among training pictures with questions, captions or both."""

    def record(index: int) -> Record:
        colour = COLOURS[index % 3]
        texts = []
        if index % 4:
            texts.append(Text(f"{index}q", "vqa", (colour, colour, "no"), "What colour is it?"))
        if index % 4 != 1:
            texts.append(Text(f"{index}c", "caption", (f"a {colour} thing",)))
        split = "test" if index < 18 else "train"
        return Record(f"{index:04d}", "toy", split, str(index), tuple(texts))

    write_shards(
        (
            (record(n), safetensors.numpy.save({"patches_PD": direction(n)}), "safetensors")
            for n in range(90)
        ),
        tmp_path / "train",
        dataset="toy",
        split="train",
        kind="features",
        encoder={"kind": "clip"},
    )
    config = Config(
        name="-",
        data={"train": [{"path": str(tmp_path / "train")}]},
        evaluation={"bootstrap": 100},
    )
    found = Collected(None, config, 100, (), None)
    for n in range(18):
        found.pooled["toy", "test", f"{n:04d}"] = direction(n)[0].astype(np.float32)
    return found


def test_both_kinds_of_texts_are_read_at_once_without_the_judged_pictures(collected):
    training = training_pictures(collected.config, None, collected.pooled)
    assert len(training.features) == 90 - 18
    assert training.questions_N[0] == {"What colour is it?": "red"}  # picture 18
    assert training.captions_N[0] == ("a red thing",)
    assert all(n % 4 for n in np.array(training.rows_with_questions()) + 18)
    assert all(n % 4 != 1 for n in np.array(training.rows_with_captions()) + 18)
    assert collected.training is collected.training


def test_answers_are_held_against_those_of_the_nearest_training_pictures(collected):
    figure = neighbour_floor_of_questions(colours_and_shapes(), collected)
    # Their colours are copied; nobody was asked for shapes in training.
    assert (figure["score"], figure["advantage"]) == (50, 50)
    assert (figure["images"], figure["texts"], figure["training_images"]) == (18, 36, 54)


def test_captions_are_copied_from_pictures_with_captions_alone(collected):
    captions = [
        Prediction(
            *("toy", "test", f"{n:04d}", str(n), f"{n}c", "caption", "describe", None),
            (f"a {COLOURS[n % 3]} thing", "something else"),
            "a wrong word",
            0.0,
        )
        for n in range(18)
    ]
    term = neighbour_floor(captions, collected)
    assert term.missing == ""
    assert term.about == "54 training pictures"
    assert term.score > 100
    assert term.advantage.high < 0


def test_without_features_or_training_sets_the_floor_is_missing_with_its_reason(collected):
    bare = Collected(None, Config(name="-"), 100, (), None)
    with pytest.raises(UnmeasuredError, match="no features of its own"):
        neighbour_floor_of_questions(colours_and_shapes(), bare)
    bare.pooled["toy", "test", "0000"] = np.ones(8)
    bare.__dict__.pop("training")
    with pytest.raises(UnmeasuredError, match="no local training set"):
        neighbour_floor_of_questions(colours_and_shapes(), bare)


# ---- all of them ---------------------------------------------------------------------------------


def test_every_set_has_figures_of_its_own_and_seconds_apart_and_captions_have_none_of_answers():
    config = Config(name="-", evaluation={"bootstrap": 50, "space_images": 0})
    collected = Collected(None, config, 100, (), None)
    looking = opposites(lambda question, truth: truth)
    blind = [replace(p, split="dev", answer="yes") for p in looking]
    collected.evaluation.tasks["vqa"] = TaskResult("vqa", [*looking, *blind])
    collected.evaluation.tasks["caption"] = TaskResult("caption", [])
    for stratum in (("toy_test", "vqa"), ("toy_dev", "vqa"), ("toy_test", "caption")):
        collected.gates[Stratum(*stratum)] = None
    add_beside(collected)
    result = collected.evaluation.tasks["vqa"]
    accuracy = {name: found["paired"]["group_accuracy"] for name, found in result.beside.items()}
    assert accuracy == {"toy_test": 100, "toy_dev": 0}
    names = ["interaction", "neighbour_floor", "paired"]
    assert list(result.beside["toy_test"]) == list(result.beside_seconds["toy_test"]) == names
    assert result.beside["toy_test"]["neighbour_floor"] == {
        "missing": "the model has no features of its own"
    }
    assert collected.evaluation.tasks["caption"].beside == {"toy_test": {}}


# ---- the table -----------------------------------------------------------------------------------


def test_the_table_tells_values_with_intervals_and_what_is_missing(collected):
    figures = {
        "interaction": interaction(colours_and_shapes(), SETTINGS),
        "paired": {"missing": "no groups"},
        "dropped_patches": {"scores": {"0": {"value": 90.0}, "100": {"value": 40.0}}},
    }
    (table,) = beside_tables("vqa", {"beside": {"toy_test": figures}})
    header, _, *rows = table.splitlines()
    assert "vqa, toy_test: beside the verdict (decides nothing)" in header
    assert "0.0 [0.0, 0.0]: 100.0, additive part 100.0 (18 images, 2 questions)" in rows[0]
    assert "not measured: no groups" in rows[1]
    assert "0%: 90.0, 100%: 40.0" in rows[2]
    assert beside_tables("vqa", {}) == []


def test_how_to_read_a_figure_takes_eight_words_at_most():
    assert all(len(row.reading.split()) <= 8 for row in ROWS.values())
