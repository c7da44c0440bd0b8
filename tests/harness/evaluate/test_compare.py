"""`harness compare`: which of two runs is better, on the images that both answered, and how sure
that is.
"""

import json
import shutil
from pathlib import Path

import pytest

from harness.errors import ConfigError
from harness.evaluate import captions, compare, vqa
from toy_runs import COLOURS, make_shards, texts

IMAGES = 30


@pytest.fixture(scope="module")
def test_set(tmp_path_factory) -> Path:
    return make_shards(tmp_path_factory.mktemp("data") / "test", IMAGES, "test")


def evaluated(folder: Path, data: Path, right: float, images: range = range(IMAGES)) -> Path:
    """A run's folder as `harness evaluate` leaves it; its answers are right for that share of the
    images.
    """
    answers, said = [], []
    for i in images:
        knows = i % 10 < 10 * right
        for text in texts(i):
            if text.task == "vqa":
                answers.append((text.id, text.targets[0] if knows else "nothing"))
            else:
                said.append(
                    (str(i), text.targets[0] if knows else f"a {list(COLOURS)[i % 3]} thing")
                )
    (folder / "evaluation").mkdir(parents=True)
    for name, entries in (
        ("toy_test_answers", vqa.vqa_results(answers)),
        ("toy_test_captions", vqa.caption_results(said)),
        ("scores", {"data": [str(data)]}),
    ):
        (folder / "evaluation" / f"{name}.json").write_text(json.dumps(entries))
    return folder


def test_the_better_run_is_ahead_in_every_resample_and_the_other_way_round_mirrors_it(
    test_set, tmp_path
):
    good, bad = (
        evaluated(tmp_path / "good", test_set, 0.9),
        evaluated(tmp_path / "bad", test_set, 0.3),
    )
    found, mirrored = compare.runs(good, bad), compare.runs(bad, good)
    assert found.keys() == {"vqa", "caption"}
    assert list(found["caption"]) == list(captions.MEASURES)
    for task, measures in found.items():
        for name, one in measures.items():
            other = mirrored[task][name]
            assert one.a > one.b
            assert one.difference.value == pytest.approx(one.a - one.b)
            assert 0 < one.difference.low < one.difference.value < one.difference.high
            assert (one.a_better, other.a_better, one.left_out) == (1.0, 0.0, 0)
            assert other.difference.low == pytest.approx(-one.difference.high)
    same = compare.runs(good, good)["vqa"]["accuracy"]
    assert (same.difference.low, same.difference.high, same.a_better) == (0.0, 0.0, 0.0)


def test_what_is_hard_for_both_does_not_widen_the_interval():
    """Both know the same half, and A one image more: only that one is unsure."""
    truths = [vqa.VQATruth(str(n), ("yes",), image_id=str(n)) for n in range(100)]
    b = {str(n): "yes" if n % 2 else "no" for n in range(100)}
    one = compare.answers({**b, "0": "yes"}, b, truths)["accuracy"]
    unpaired = vqa.intervals(vqa.graded(b, truths))["overall"]
    assert one.difference.value == pytest.approx(1.0)
    assert one.difference.high - one.difference.low < (unpaired.high - unpaired.low) / 4
    assert 0.5 < one.a_better < 0.75  # 1 - 1/e: the resamples that hold the image


def test_only_the_images_that_both_answered_count_and_the_rest_is_counted(test_set, tmp_path):
    whole = evaluated(tmp_path / "whole", test_set, 0.9)
    part = evaluated(tmp_path / "part", test_set, 0.9, range(0, 20))
    found = compare.runs(whole, part)["caption"]["CIDEr"]
    assert (found.texts, found.left_out) == (20, 10)
    assert found.difference.value == 0.0
    none = evaluated(tmp_path / "none", test_set, 0.9, range(0))
    with pytest.raises(ConfigError, match="no task in common"):
        compare.runs(whole, none)


def test_what_cannot_be_compared_is_one_sentence(test_set, tmp_path):
    gone = tmp_path / "gone"
    shutil.copytree(test_set, gone)
    run = evaluated(tmp_path / "run", gone, 0.9)
    shutil.rmtree(gone)
    with pytest.raises(ConfigError, match="which is gone; give the test set with --data"):
        compare.runs(run, run)
    with pytest.raises(
        ConfigError, match="on memory://test, which is remote; give the test set with --data"
    ):
        compare.runs(run, run, ["memory://test"])
    assert compare.runs(run, run, [str(test_set)])["vqa"]["accuracy"].difference.value == 0.0
    with pytest.raises(ConfigError, match=r"holds no evaluation/scores\.json"):
        compare.runs(run, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no question in common"):
        compare.answers({"1": "a"}, {"2": "a"}, [vqa.VQATruth("1", ("a",))])


def test_sets_that_were_moved_in_the_folder_of_a_run_are_found(test_set, tmp_path):
    run = evaluated(tmp_path / "away" / "mine", Path("runs/mine/test"), 0.9)
    shutil.copytree(test_set, run / "test")
    scores = run / "evaluation" / "scores.json"
    report = json.loads(scores.read_text()) | {"checkpoint": "runs/mine/checkpoints/step-000002"}
    scores.write_text(json.dumps({**report, "step": 2}))
    for given in (run, scores.parent):
        assert compare.runs(given, given)["vqa"]["accuracy"].left_out == 0
    scores.write_text(json.dumps({**report, "step": None}))  # of a model that is no run
    with pytest.raises(ConfigError, match="runs/mine/test, which is gone"):
        compare.runs(run, run)


def test_the_verb_takes_runs_and_result_files(test_set, tmp_path, harness):
    good, bad = (
        evaluated(tmp_path / "good", test_set, 0.9),
        evaluated(tmp_path / "bad", test_set, 0.3),
    )
    found = json.loads(harness("compare", good, bad, "--json")[1])
    assert found["vqa"]["accuracy"]["difference"]["low"] > 0
    assert "resamples with A > B" in harness("compare", good, bad)[1]
    files = [run / "evaluation" / "toy_test_captions.json" for run in (good, bad)]
    references = {"images": [{"id": i} for i in range(IMAGES)], "annotations": []}
    for i in range(IMAGES):
        told = next(text for text in texts(i) if text.task == "caption").targets
        references["annotations"] += [{"image_id": i, "caption": caption} for caption in told]
    (tmp_path / "captions.json").write_text(json.dumps(references))
    _, out, _ = harness("compare", *files, "--references", tmp_path / "captions.json", "--json")
    assert json.loads(out) == {"caption": found["caption"]}
    assert "give --references" in harness("compare", *files)[2]
