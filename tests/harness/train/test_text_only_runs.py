"""Records without a picture among others: learnt from and scored, on every engine and on ranks
whose share holds no picture at all, and never part of a verdict.
"""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from harness.checks import check_before_launch
from harness.data.encode import encode_set
from harness.doctor import examine
from harness.evaluate.run import collect, passes_of
from harness.evaluate.run_on_disk import evaluate_run
from harness.evaluate.small_gate import small_set
from harness.machine.launch_file import read_launch
from harness.machine.launcher import launch
from harness.model.vlm import VisionLanguageModel
from harness.own_data.view import write_sheets
from harness.plan.workload import workload
from harness.predict.predict import predict
from harness.train import prepare
from harness.train import run as train
from plan_cases import changed
from rank_program import SamplesRead
from shards.manifest import Manifest
from text_only_rank_program import ALONE, SETTINGS, config_of
from toy_runs import losses, make_config, make_shards

WORDS = range(200, 205)  # a set of texts alone


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    """A folder of the models; a training set, a dev set and texts alone."""
    folder = tmp_path_factory.mktemp("text-only")
    (folder / "clip").symlink_to(tiny_clip_folder)
    (folder / "t5").symlink_to(tiny_t5_folder)
    make_shards(folder / "train", 14, text_only=ALONE)
    make_shards(folder / "dev", 8, "dev", 100, text_only=(101, 104, 106))
    make_shards(folder / "words", 5, "words", 200, text_only=WORDS)
    return folder


@pytest.fixture(scope="module")
def trained(root):
    """A run over a mixture of sets, with both scored on the way."""
    config = make_config(root, root / "clip", root / "t5", "mixed", epochs=1, image_use_every=2)
    sets = [{"path": str(root / name), "weight": 1} for name in ("train", "words")]
    scored = [{"path": str(root / name)} for name in ("dev", "words")]
    data = {"train": sets, "dev": scored, "test": scored}
    config = changed(config, data=data, evaluation={"counterfactual_texts": 100})
    train.run(config)
    return config


def test_a_mixture_with_texts_alone_is_learnt_and_its_scores_leave_them_out_by_name(trained, root):
    assert np.isfinite(list(losses(trained.out_dir).values())).all()
    report = evaluate_run(trained.out_dir)
    assert (report["images"], report["without_picture"]) == (5, 8)
    for figures in report["tasks"].values():
        assert 0 < figures["without_picture"] < figures["texts"]
        assert figures["gate_images"] == 5
        assert "sets" not in figures  # that of texts alone is not judged
    folder = trained.out_dir / "evaluation"
    said = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    alone = {"0101", "0104", "0106", *(f"{n:04d}" for n in WORDS)}
    assert {row["key"] for row in said if not row.get("has_picture", True)} == alone
    assert "texts without a picture, not judged" in (folder / "report.md").read_text()
    assert "records without" in (trained.out_dir / "report.html").read_text()


def test_a_set_of_texts_alone_has_a_score_and_no_verdict(trained, root):
    report = evaluate_run(trained.out_dir, [str(root / "words")])
    assert (report["images"], report["without_picture"]) == (0, 5)
    for figures in report["tasks"].values():
        assert figures["verdict"] == "not judged: no picture"
        assert figures["reason"] == f"none of its {figures['texts']} texts has a picture"
        assert figures["gate_texts"] == 0
    assert report["tasks"]["vqa"]["accuracy"] is not None


def test_the_gate_asks_nothing_of_a_text_without_a_picture(trained, root):
    model = VisionLanguageModel.build(trained).eval()
    passes = passes_of(model, [str(root / "dev")], trained, counterfactual_texts=100)
    with closing(passes):
        collected = collect(passes, None, None)
    judged = {p.key for gate in collected.gates.values() for p in gate.predictions}
    assert judged == {"0100", "0102", "0103", "0105", "0107"}
    assert {key for _, _, key in collected.pooled} == judged


def test_the_bridge_starts_from_pictures_alone_wherever_they_come(root):
    config = make_config(root, root / "clip", root / "t5", "start", dev=False)
    only = changed(config, data={"train": [{"path": str(root / "words")}]})
    model = VisionLanguageModel.build(only)
    before = model.bridge.projection.gain_D.clone()
    prepare.calibrate(model, only)
    assert model.bridge.projection.gain_D.equal(before)
    assert not prepare.make_loader(only, None).has_pictures
    prepare.calibrate(model, config)
    assert not model.bridge.projection.gain_D.equal(before)


def test_texts_alone_go_with_features_and_a_set_of_both_is_encoded_whole(root, tmp_path):
    config = make_config(root, root / "clip", root / "t5", "features", dev=False, max_steps=2)
    made = encode_set(root / "train", tmp_path / "train", config.model.vision)
    source = Manifest.open(root / "train")
    assert (made.samples, made.without_picture) == (source.samples, source.without_picture)
    assert [made.key(n) for n in range(14)] == [source.key(n) for n in range(14)]
    places = [str(tmp_path / "train"), str(root / "words")]
    config = changed(config, data={"train": [{"path": place} for place in places]})
    config = config.model_copy(update={"out": str(tmp_path / "run")})
    check_before_launch(config)
    train.run(config)
    assert len(losses(config.out_dir)) == 2


def test_pages_doctor_plan_and_predictions_know_them(trained, root, tmp_path):
    (sheet,) = write_sheets([str(root / "dev")], tmp_path / "sheet.html", config=trained)
    assert [bool(card.problem) for card in sheet.cards] == [False] * 8
    assert "3 records without a picture" in sheet.about
    page = (tmp_path / "sheet.html").read_text()
    assert page.count("a record without a picture, to the model: no picture") == 3
    found = examine.first_sample("data.dev", str(root / "dev"), trained).found
    assert "5 images" in found
    assert "3 records without a picture" in found
    assert "5 records without" in examine.first_sample("x", str(root / "words"), trained).found
    only = changed(trained, data={"train": [{"path": str(root / "words")}]})
    assert workload(only).sizes.contexts > 0
    said = predict(trained.out_dir, str(root / "dev"), tmp_path / "said.jsonl")
    assert said.damaged == 0
    assert {line["image"] for line in said.lines.read()} == {f"{n:04d}" for n in range(100, 108)}
    assert {c.record.has_picture for _, b in small_set_of(trained) for c in b.contexts} == {True}


def small_set_of(config):
    return small_set(VisionLanguageModel.build(config), config).batches


@pytest.mark.slow
def test_ranks_without_a_picture_meet_the_others_and_learn_what_one_process_learns(root):
    """Both engines in one launch: DDP refuses a parameter without gradient, and ZeRO-3 hangs where
    ranks ask for different weights.
    """
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    read = SamplesRead()
    alone = config_of(root, "alone")
    train.run(alone, observers=[read])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "support"))
        launch([str(root)], 2, launch_file=read_launch("zero2"), module="text_only_rank_program")
    told = [json.loads((root / f"{rank}.json").read_text()) for rank in (0, 1)]
    for name, bound in (("zero-3", 1e-4), ("ddp", 1e-5)):
        assert [each[name]["engine"] for each in told] == [told[0][name]["engine"]] * 2
        pictures = list(zip(*(each[name]["pictures"] for each in told), strict=True))
        assert any(min(step) == 0 < max(step) for step in pictures), "a rank has none, one has some"
        found = losses(root / name)
        assert list(found.values()) == pytest.approx(
            list(losses(alone.out_dir).values()), rel=bound
        )
    assert told[0]["zero-3"]["engine"] == "DeepSpeed ZeRO 3"
    assert told[0]["ddp"]["engine"] == "DDP"
    assert len(losses(alone.out_dir)) == len(read.steps) == SETTINGS["epochs"] * 4
