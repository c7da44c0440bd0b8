"""A first stage as a whole run: resumed, scored by retrieval, on two ranks, and what begins with
it.
"""

import json
from pathlib import Path

import pytest

import harness
from first_stage_toy import run_config
from harness.doctor import examine
from harness.errors import ConfigError
from harness.evaluate.run_on_disk import evaluate_run, report_run
from harness.machine.launch_file import Launch
from harness.machine.launcher import launch
from harness.plan.plan import plan
from harness.train import run as train
from harness.train.engines import make_engine
from same_runs import AtStep, same_run
from tiny_models import tiny_clip, tiny_t5
from toy_runs import losses

OBJECTIVE = ["itc", "lm"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("first-stage")
    tiny_clip(root / "clip")
    tiny_t5(root / "t5")
    return root


@pytest.fixture(scope="module")
def whole(root):
    config = run_config(root, "whole", OBJECTIVE)
    train.run(config)
    return config


class KilledError(Exception):
    pass


def test_a_run_that_was_killed_and_goes_on_is_the_uninterrupted_one_to_the_bit(root, whole):
    def kill():
        raise KilledError

    config = run_config(root, "killed", OBJECTIVE)
    with pytest.raises(KilledError):
        train.run(config, observers=[AtStep(5, kill)])
    train.run(config, "auto")
    same_run(config.out_dir, whole.out_dir)


def test_its_scores_are_recalls_beside_chance_wherever_scores_are_told(whole):
    out = whole.out_dir
    rows = [json.loads(line)["values"] for line in (out / "metrics.jsonl").open()]
    values = {key: value for row in rows for key, value in row.items()}
    assert {"dev/text_to_image_R1", "train/itc_loss", "train/lm_loss"} <= values.keys()
    report = evaluate_run(out)
    figures = report["tasks"]["retrieval"]
    assert figures["images"] == 5
    assert figures["text_to_image_R1_chance"] == pytest.approx(20)
    assert figures["text_to_image_R1"] == values["dev/text_to_image_R1"]
    for folder in ("evaluation/dev", "evaluation/toy_dev-captions"):
        page = (out / folder / "report.md").read_text()
        assert "text to image, R@1" in page
        assert "whether it is used is no question" in page


def test_what_asks_for_answers_is_refused_in_a_sentence(whole):
    with pytest.raises(ConfigError, match="without a language model that could answer"):
        harness.load(whole.out_dir)
    with pytest.raises(ConfigError, match="a page shows answers, and it gives none"):
        report_run(whole.out_dir)


def test_zero_is_refused_by_name(whole, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="ZeRO is not for it"):
        make_engine(whole.train)


def test_plan_and_doctor_know_it(whole):
    made = plan(whole, "t4", Launch())
    assert made.fits
    assert any("a first stage" in note for note in made.notes)
    assert made.parameters["language model"] == 0
    assert {finding.state for finding in examine.model(whole, "cpu")} == {"OK"}
    assert {finding.state for finding in examine.texts(whole)} == {"OK"}


def test_a_second_stage_begins_with_its_q_former_and_norm(root, whole):
    started = run_config(root, "second", None, max_steps=1)
    bridge = started.model.bridge.model_copy(update={"init_from": str(whole.out_dir)})
    started = started.model_copy(
        update={"model": started.model.model_copy(update={"bridge": bridge})}
    )
    seen = {}

    class First(AtStep):
        def batches_made(self, run, samples, batches):
            seen.setdefault("queries", run.model.bridge.body.query_tokens.detach().clone())
            seen.setdefault("norm", run.model.bridge.patch_norm.weight.detach().clone())

    train.run(started, observers=[First(0, None)])
    from safetensors.torch import load_file

    from harness import checkpoint

    saved = load_file(checkpoint.newest(whole.out_dir).model / "model.safetensors")
    assert seen["queries"].equal(saved["bridge.body.query_tokens"])
    assert seen["norm"].equal(saved["bridge.patch_norm.weight"])
    whole_init = whole.model.model_copy(update={"init_from": str(whole.out_dir)})
    wrong = run_config(root, "wrong", None).model_copy(update={"model": whole_init})
    with pytest.raises(ConfigError, match=r"model\.bridge\.init_from set to it goes on"):
        train.run(wrong)


@pytest.mark.slow
def test_two_ranks_learn_what_one_does(root):
    alone = run_config(root, "alone", OBJECTIVE, epochs=1, evaluate_every=100)
    train.run(alone)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "support"))
        launch([str(root)], 2, module="first_stage_rank_program")
    expected = losses(alone.out_dir)
    assert len(expected) == 4
    assert losses(root / "two") == pytest.approx(expected, rel=1e-5)
