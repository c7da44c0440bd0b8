"""BLEU, ROUGE-L and CIDEr-D against what pycocoevalcap said of the same captions
(tests/data/ptb/scores.json).
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from harness.evaluate import captions
from harness.evaluate.vqa import ScoreError

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "data" / "ptb" / "scores.json").read_text(encoding="utf-8")
)


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_every_figure_is_that_of_pycocoevalcap(case):
    scores = captions.score(case["hypotheses"], case["references"])
    assert scores.corpus == pytest.approx(case["corpus"], abs=1e-9)
    assert scores.image_ids == tuple(case["references"])
    assert scores.sums_IK[:, 10] == pytest.approx(case["ROUGE_L"], abs=1e-9)
    assert list(
        captions.cider_d_per_image(case["hypotheses"], case["references"]).values()
    ) == pytest.approx(case["CIDEr"], abs=1e-9)


HASHED = """
import random
from harness.evaluate.captions import cider_d_per_image

draw = random.Random(0)
words = "a dog man runs on the grass red ball in water with two jumps white".split()
said = {str(image): " ".join(draw.choices(words, k=12)) for image in range(20)}
truth = {image: [" ".join(draw.choices(words, k=12)) for _ in range(5)] for image in said}
print(list(cider_d_per_image(said, truth).values()))
"""


def test_cider_has_the_same_last_digit_whatever_order_the_hashes_of_a_process_make():
    said = {
        subprocess.run(
            [sys.executable, "-c", HASHED],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in range(4)
    }
    assert len(said) == 1


def test_bleu_of_a_resample_is_that_of_its_images_together_and_not_a_mean_over_them():
    case = GOLDEN[0]
    scores = captions.score(case["hypotheses"], case["references"])
    drawn = np.random.default_rng(1).integers(0, len(scores.image_ids), 25)
    ids = [scores.image_ids[i] for i in drawn]
    again = captions.score(
        {str(n): case["hypotheses"][i] for n, i in enumerate(ids)},
        {str(n): case["references"][i] for n, i in enumerate(ids)},
    )
    resampled = captions.figures(scores.sums_IK[drawn].sum(axis=0)[None])
    single = np.mean(captions.figures(scores.sums_IK[drawn])["Bleu_4"])
    assert resampled["Bleu_4"][0] == pytest.approx(again.corpus["Bleu_4"])
    assert resampled["ROUGE_L"][0] == pytest.approx(again.corpus["ROUGE_L"])
    assert abs(single - again.corpus["Bleu_4"]) > 0.01


def test_intervals_hold_the_figure_widen_with_confidence_and_are_the_same_again():
    scores = captions.score(GOLDEN[0]["hypotheses"], GOLDEN[0]["references"])
    found, wider = scores.with_intervals(), scores.with_intervals(confidence=0.99)
    assert list(found) == list(captions.MEASURES)
    for name, interval in found.items():
        assert interval.value == scores.corpus[name]
        assert interval.low < interval.value < interval.high
        assert wider[name].low < interval.low
    assert found == scores.with_intervals()
    assert found != scores.with_intervals(seed=1)
    alone = captions.score({"1": "a dog"}, {"1": ["a dog"]}).with_intervals()["Bleu_1"]
    assert (alone.low, alone.high) == (-math.inf, math.inf)
    assert alone.to_dict() == {"value": pytest.approx(1.0), "low": None, "high": None}


def test_missing_extra_and_undescribed_images_are_named():
    with pytest.raises(ScoreError, match="lack image 2, which"):
        captions.score({"1": "a"}, {"1": ["a"], "2": ["b"]})
    with pytest.raises(ScoreError, match="hold image 9, which"):
        captions.score({"1": "a", "9": "b"}, {"1": ["a"]})
    with pytest.raises(ScoreError, match="references hold image 1, without a caption"):
        captions.score({"1": "a"}, {"1": []})
    with pytest.raises(ScoreError, match="no caption to score"):
        captions.score({}, {})


@pytest.mark.parametrize(
    ("document", "sentence"),
    [
        ('{"annotations": []}', "is not a COCO caption file"),
        (
            '{"images": [{"id": 1}], "annotations": [{"image_id": 2, "caption": "a"}]}',
            "has captions of image 2, which",
        ),
        ('{"images": [{"id": 1}, {"id": 1}], "annotations": []}', "lists image 1, more than once"),
        ('{"images": [{"id": 1}], "annotations": []}', "has no caption of image 1,"),
    ],
)
def test_a_bad_reference_file_is_one_sentence(tmp_path, document, sentence):
    (tmp_path / "captions.json").write_text(document)
    with pytest.raises(ScoreError, match=sentence):
        captions.read_references(tmp_path / "captions.json")


def test_bad_results_are_one_sentence(tmp_path):
    results = tmp_path / "results.json"
    results.write_text('[{"image_id": 7, "caption": "a"}, {"image_id": 7, "caption": "b"}]')
    with pytest.raises(ScoreError, match=r"results\.json holds image 7, more than once"):
        captions.read_caption_results(results)
    results.write_text('[{"image": 7}]')
    with pytest.raises(ScoreError, match=r"results\.json is not a list"):
        captions.read_caption_results(results)


def test_the_stripped_scoring_leaves_words_of_letters_alone():
    assert captions.stripped("A man's 2 dogs, on a T-shirt no. 7!") == "mans dogs on tshirt no"
    assert captions.stripped("Ein Käfer; “groß”… 3d_x") == "ein käfer groß dx"
    assert captions.stripped("A 2.") == ""


def test_stripped_scores_are_those_of_texts_stripped_on_both_sides():
    said = {"1": "A dog runs, 2 men watch .", "2": "I see a boat ."}
    wanted = {"1": ["a dog runs 3 men watch"], "2": ["We see boats", "see boat", "7"]}
    by_hand = captions.score(
        {"1": "dog runs men watch", "2": "see boat"},
        {"1": ["dog runs men watch"], "2": ["we see boats", "see boat"]},
    )
    assert captions.stripped_scores(said, wanted).corpus == by_hand.corpus
    assert by_hand.corpus["Bleu_1"] > captions.score(said, wanted).corpus["Bleu_1"]
    with pytest.raises(ScoreError, match="references hold image 1, without a caption"):
        captions.stripped_scores({"1": "a"}, {"1": []})
    assert captions.stripped_scores({"1": "dog"}, {"1": ["7"]}).corpus["CIDEr"] == 0.0
