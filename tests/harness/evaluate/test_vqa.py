"""VQA accuracy against the official program's own figures, and the oddities of its text rules one
by one.
"""

import json

import pytest

from harness.evaluate.vqa import (
    ScoreError,
    VQATruth,
    accuracy,
    caption_results,
    most_common,
    normalise,
    read_results,
    score,
    vqa_results,
)


@pytest.mark.parametrize("split", ["train2014", "val2014"])
@pytest.mark.parametrize("who", ["first_human", "mca"])
def test_every_figure_of_the_official_program_is_matched(shared_data, split, who):
    folder = shared_data / "vqav2"
    annotations = json.loads((folder / f"v2_mscoco_{split}_annotations.json").read_text())[
        "annotations"
    ]
    known = json.loads(
        (folder / "known_answers" / f"OpenEnded_{split}_{who}_accuracy.json").read_text()
    )
    truths = [
        VQATruth(
            str(a["question_id"]),
            tuple(x["answer"] for x in a["answers"]),
            a["answer_type"],
            a["question_type"],
        )
        for a in annotations
    ]
    scores = score(
        read_results(folder / "known_answers" / f"OpenEnded_{split}_{who}_results.json"), truths
    )
    assert scores.overall == known["overall"]
    assert scores.per_answer_type == known["perAnswerType"]
    assert scores.per_question_type == known["perQuestionType"]
    assert scores.n == len(annotations)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Two dogs", "2 dogs"),
        ("None", "0"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("somebody'd", "somebodyd"),  # the official table has this one the wrong way round
        ("black/white", "black white"),
        ("black / white", "black  white".replace("  ", " ")),
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits makes every mark vanish
        ("t-shirt", "t shirt"),
        ("at 3.", "at 3"),
        ("3.5", "3.5"),
        ("." * 40 + "x", "." * 8 + "x"),  # the flag re.UNICODE is taken for a count of 32
        ("it's; ok", "it's ok"),
        ("what:ever", "what:ever"),  # a colon is not in the official list
    ],
)
def test_normalisation_keeps_the_official_oddities(text, expected):
    assert normalise(text) == expected


def test_each_annotator_is_held_against_the_other_nine():
    answers = ["yes"] * 3 + ["no"] * 7
    # Of the three who said yes, each sees two others: 2/3; the seven others see three: 1.
    assert accuracy("yes", answers) == pytest.approx((3 * 2 / 3 + 7) / 10)
    assert accuracy("no", answers) == 1.0
    assert accuracy("maybe", answers) == 0.0


def test_texts_are_normalised_only_where_the_annotators_differ():
    assert accuracy("the dog", ["the dog"] * 10) == 1.0
    assert accuracy("dog", ["the dog"] * 10) == 0.0
    assert accuracy("dog", ["the dog"] * 9 + ["cat"]) == 1.0
    assert accuracy(" dog\n", ["dog"] * 10) == 1.0


def test_a_single_answer_counts_by_exact_match_after_normalisation():
    assert accuracy("A Circle.", ["circle"]) == 1.0
    assert accuracy("circles", ["circle"]) == 0.0


def test_most_common_joins_spellings_and_prefers_the_first_of_equals():
    assert most_common(["the dog", "cat", "Dog", "cat", "dog"]) == "the dog"
    assert most_common(["the dog", "cat", "dog", "cat", "dog"]) == "dog"
    assert most_common(["red", "blue"]) == "red"


@pytest.mark.parametrize("answers", [["two"] * 10, [" The dog\n"] * 10, ["2"] * 6 + ["two"] * 4])
def test_the_most_common_answer_is_right_whether_texts_are_normalised_or_not(answers):
    assert accuracy(most_common(answers), answers) == 1.0


def test_missing_extra_and_repeated_question_ids_are_named(tmp_path):
    truths = [VQATruth("1", ("a",)), VQATruth("2", ("b",))]
    with pytest.raises(ScoreError, match="lack question id 2"):
        score({"1": "x"}, truths)
    with pytest.raises(ScoreError, match="answer question id 9"):
        score({"1": "x", "2": "y", "9": "z"}, truths)
    with pytest.raises(ScoreError, match="hold question id 1, twice"):
        score({"1": "x", "2": "y"}, [*truths, truths[0]])
    with pytest.raises(ScoreError, match="no question"):
        score({}, [])
    results = tmp_path / "results.json"
    results.write_text('[{"question_id": 7, "answer": "a"}, {"question_id": 7, "answer": "b"}]')
    with pytest.raises(ScoreError, match=r"results\.json answers question id 7, more than once"):
        read_results(results)
    results.write_text('[{"question": 7}]')
    with pytest.raises(ScoreError, match=r"results\.json is not a list"):
        read_results(results)


def test_result_files_have_the_official_form(tmp_path):
    assert vqa_results([("42000", "white"), ("q-1", "red")]) == [
        {"question_id": 42000, "answer": "white"},
        {"question_id": "q-1", "answer": "red"},
    ]
    assert caption_results([("007", "a dog")]) == [{"image_id": "007", "caption": "a dog"}]
    (tmp_path / "r.json").write_text(json.dumps(vqa_results([("42000", "white")])))
    assert read_results(tmp_path / "r.json") == {"42000": "white"}
