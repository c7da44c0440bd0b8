"""`harness score`: files in the official formats in, the official figures with intervals out."""

import json
from pathlib import Path

import numpy as np
import pytest
from test_cli import imported

from harness.evaluate import vqa
from harness.evaluate.bootstrap import percentile, ratio, resampled_sums

GOLDEN = Path(__file__).parents[2] / "data" / "ptb" / "scores.json"
ASKED = '{"questions": [{"question_id": 1}, {"question_id": 2}]}'


def caption_files(folder: Path, case: dict) -> tuple[Path, Path]:
    """A case of the golden file in the COCO formats."""
    results, references = folder / "results.json", folder / "captions.json"
    results.write_text(
        json.dumps([{"image_id": int(i), "caption": c} for i, c in case["hypotheses"].items()])
    )
    texts = [
        {"image_id": int(i), "caption": c}
        for i, captions in case["references"].items()
        for c in captions
    ]
    images = [{"id": int(i)} for i in case["references"]]
    annotations = [{**text, "id": n} for n, text in enumerate(texts)]
    references.write_text(json.dumps({"images": images, "annotations": annotations}))
    return results, references


@pytest.mark.parametrize("split", ["train2014", "val2014"])
@pytest.mark.parametrize("who", ["first_human", "mca"])
def test_score_vqa_prints_every_figure_of_the_official_program(harness, shared_data, split, who):
    folder = shared_data / "vqav2"
    known = json.loads(
        (folder / "known_answers" / f"OpenEnded_{split}_{who}_accuracy.json").read_text()
    )
    code, shown, _ = harness(
        *("score", "vqa", "--json"),
        *("--predictions", folder / "known_answers" / f"OpenEnded_{split}_{who}_results.json"),
        *("--questions", folder / f"v2_OpenEnded_mscoco_{split}_questions.json"),
        *("--annotations", folder / f"v2_mscoco_{split}_annotations.json"),
    )
    found = json.loads(shown)
    assert code == 0
    assert (
        found["overall"]["low"]
        < found["overall"]["value"]
        == known["overall"]
        < found["overall"]["high"]
    )
    assert {name: one["value"] for name, one in found["per_answer_type"].items()} == known[
        "perAnswerType"
    ]
    assert {name: one["value"] for name, one in found["per_question_type"].items()} == known[
        "perQuestionType"
    ]
    groups = [*found["per_answer_type"].values(), *found["per_question_type"].values()]
    assert all(one["low"] is None or one["low"] <= one["value"] <= one["high"] for one in groups)


def test_questions_of_one_image_are_drawn_together():
    def truths(image_of) -> list[vqa.VQATruth]:
        return [vqa.VQATruth(str(n), ("yes",), "yes/no", "is", image_of(n)) for n in range(400)]

    said = {str(n): "yes" if n // 10 % 2 else "no" for n in range(400)}  # right or wrong by image
    by_image = vqa.intervals(vqa.graded(said, truths(lambda n: str(n // 10))))["overall"]
    by_question = vqa.intervals(vqa.graded(said, truths(str)))["overall"]
    assert by_image.value == by_question.value == 50.0
    # Forty draws in place of four hundred: sqrt(10) times as wide.
    assert (by_image.high - by_image.low) / (by_question.high - by_question.low) == pytest.approx(
        10**0.5, rel=0.2
    )


def test_a_group_of_one_image_has_no_interval_and_one_that_a_resample_misses_has():
    truths = [
        vqa.VQATruth(str(n), ("yes",), "lone" if n == 0 else "rare" if n < 3 else "x", None, str(n))
        for n in range(40)
    ]
    found = vqa.intervals(vqa.graded({str(n): "yes" if n % 2 else "no" for n in range(40)}, truths))
    assert found["per_question_type"] == {}
    assert found["per_answer_type"]["lone"].to_dict() == {"value": 0.0, "low": None, "high": None}
    assert found["per_answer_type"]["rare"].to_dict() == {"value": 50.0, "low": 0.0, "high": 100.0}
    nameless = [
        vqa.VQATruth(t.question_id, t.answers, "", None, t.image_id) for t in truths
    ]  # of a careless data set
    assert list(vqa.intervals([(t, 1.0) for t in nameless])["per_answer_type"]) == [""]


def test_resamples_are_the_same_however_many_fit_into_memory(monkeypatch):
    values = np.random.default_rng(0).normal(size=(50, 3))
    whole = resampled_sums(values, 30)
    monkeypatch.setattr("harness.evaluate.bootstrap._CELLS", 350)
    assert resampled_sums(values, 30) == pytest.approx(whole, abs=1e-12)
    assert percentile(0.5, [0.0, np.nan, 1.0], 2, 1.0).to_dict(1) == {
        "value": 0.5,
        "low": 0.0,
        "high": 1.0,
    }
    assert ratio(np.array([1.0, 0.0]), np.array([2.0, 0.0]), 20, 0.95).low == -np.inf


@pytest.mark.parametrize(
    ("questions", "annotations", "sentence"),
    [
        ('{"questions": [{}]}', "{}", 'is not an official file of "questions"'),
        (ASKED, "{}", 'is not an official file of "annotations"'),
        (
            '{"questions": [{"question_id": 1}, {"question_id": 1}]}',
            '{"annotations": []}',
            "id 1, more than once",
        ),
        (ASKED, '{"annotations": []}', "lacks question id 1, 2, which"),
        (
            '{"questions": []}',
            '{"annotations": [{"question_id": 3, "image_id": 1, "answers": []}]}',
            "id 3, which",
        ),
    ],
)
def test_question_and_annotation_files_that_do_not_fit_are_one_sentence(
    tmp_path, questions, annotations, sentence
):
    (tmp_path / "q.json").write_text(questions)
    (tmp_path / "a.json").write_text(annotations)
    with pytest.raises(vqa.ScoreError, match=sentence):
        vqa.read_truths(tmp_path / "q.json", tmp_path / "a.json")


def test_score_captions_prints_the_figures_of_pycocoevalcap_with_intervals(harness, tmp_path):
    case = json.loads(GOLDEN.read_text(encoding="utf-8"))[0]
    results, references = caption_files(tmp_path, case)
    code, shown, _ = harness(
        "score", "captions", "--predictions", results, "--references", references, "--json"
    )
    found = json.loads(shown)
    assert code == 0
    assert {name: one["value"] for name, one in found.items()} == pytest.approx(case["corpus"])
    assert all(one["low"] < one["value"] < one["high"] for one in found.values())
    code, shown, _ = harness(
        "score", "captions", "--predictions", results, "--references", references
    )
    assert (code, "CIDEr" in shown, "25 images" in shown) == (0, True, True)


def test_an_image_without_a_caption_is_an_error_unless_a_part_was_asked_for(harness, tmp_path):
    case = json.loads(GOLDEN.read_text(encoding="utf-8"))[0]
    part = {**case, "hypotheses": dict(list(case["hypotheses"].items())[:20])}
    results, references = caption_files(tmp_path, part)
    call = ("score", "captions", "--predictions", results, "--references", references)
    code, _, said = harness(*call)
    assert (code, said.count("\n")) == (2, 1)
    assert "lack image 20, 21, 22, 23, 24, which" in said
    code, shown, said = harness(*call, "--partial", "--json")
    assert (code, said) == (0, "harness: 5 of 25 images are not described and left out\n")
    only = tmp_path / "only"
    only.mkdir()
    results, references = caption_files(
        only, {**part, "references": {i: case["references"][i] for i in part["hypotheses"]}}
    )
    assert (
        harness(
            "score", "captions", "--predictions", results, "--references", references, "--json"
        )[1]
        == shown
    )


def test_a_reference_image_without_captions_is_named_and_a_part_scores_the_rest(harness, tmp_path):
    case = json.loads(GOLDEN.read_text(encoding="utf-8"))[0]
    results, references = caption_files(tmp_path, case)
    call = ("score", "captions", "--predictions", results, "--references", references)
    document = json.loads(references.read_text())
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] not in (3, 4)]
    references.write_text(json.dumps(document))
    code, _, said = harness(*call)
    assert (code, said.count("\n")) == (2, 1)
    assert "captions.json has no caption of image 3, 4, listed" in said
    assert "--partial" in said
    code, shown, said = harness(*call, "--partial", "--json")
    assert code == 0
    assert said.startswith("harness: 2 of 25 images have no caption in ")
    assert said.endswith("and are left out: 3, 4\n")
    rest = {
        name: {i: text for i, text in case[name].items() if i not in ("3", "4")}
        for name in ("hypotheses", "references")
    }
    (tmp_path / "rest").mkdir()
    results, references = caption_files(tmp_path / "rest", rest)
    call = ("score", "captions", "--predictions", results, "--references", references)
    assert harness(*call, "--json")[1] == shown


def test_the_stripped_scoring_stands_beside_the_official_one_by_name(harness, tmp_path):
    case = json.loads(GOLDEN.read_text(encoding="utf-8"))[0]
    results, references = caption_files(tmp_path, case)
    call = ("score", "captions", "--predictions", results, "--references", references)
    _, shown, _ = harness(*call)
    official, stripped = shown.split("stripped: ")
    found = json.loads(harness(*call, "--json", "--stripped")[1])
    other = found.pop("stripped")
    assert found == json.loads(harness(*call, "--json")[1])
    assert list(other) == list(found)
    for block, figures in ((official, found), (stripped, other)):
        assert f"{round(figures['CIDEr']['value'], 4):.4g}" in block
    assert "not the official figures" in stripped
    assert other["CIDEr"]["value"] != found["CIDEr"]["value"]


def test_an_answer_that_is_null_ends_the_scoring_with_one_sentence(harness, tmp_path):
    files = {
        "predictions": '[{"question_id": 1, "answer": null}]',
        "questions": '{"questions": [{"question_id": 1}]}',
        "annotations": '{"annotations": [{"question_id": 1, "image_id": 1, "answers": '
        '[{"answer": "0"}]}]}',
    }
    call = []
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        call += [f"--{name}", tmp_path / name]
    code, shown, said = harness("score", "vqa", *call)
    assert (code, shown, said.count("\n")) == (2, "", 1)
    assert 'entry 1 (question_id 1) has null as "answer"' in said


def test_scoring_imports_no_torch(tmp_path):
    results, references = caption_files(tmp_path, json.loads(GOLDEN.read_text(encoding="utf-8"))[2])
    modules, said = imported(
        "score", "captions", "--predictions", str(results), "--references", str(references)
    )
    assert not said
    assert "harness.evaluate.captions" in modules
    assert "torch" not in modules
