"""An evaluation is planned, from sizes, at what a real one holds in its losses and answers."""

import re
from dataclasses import replace

import pytest
import torch

from harness.config.schema import Config, DecodingConfig
from harness.machine import devices
from harness.machine.devices import DEVICES
from harness.machine.launch_file import read_launch
from harness.machine.precision import choose
from harness.model.vlm import VisionLanguageModel
from harness.plan.answering import Evaluated
from harness.plan.plan import advised
from harness.plan.planner import Planner
from harness.plan.skeleton import Skeleton
from harness.plan.workload import Sizes, Workload, _stand_in, workload
from plan_cases import changed, collated, measured_evaluation
from tiny_models import tiny_t5
from toy_runs import make_config

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_clip_folder) -> Config:
    root = tmp_path_factory.mktemp("answering")
    lm = str(tiny_t5(root / "t5", width=128, layers=4))
    return changed(make_config(root, tiny_clip_folder, lm), lm={"tuning": "frozen"})


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
@pytest.mark.parametrize("beams", [1, 3])
def test_losses_and_answers_hold_what_is_planned(config, tiny_gpt2_folder, kind, beams):
    if kind == "gpt2":
        config = changed(config, lm={"kind": "gpt2", "id": str(tiny_gpt2_folder)})
    model = VisionLanguageModel.build(config, precision=choose("fp32", CPU)).eval()
    batch = collated(config, model, 24)
    decoding = DecodingConfig(max_new_tokens=20, min_new_tokens=20, beams=beams)
    skeleton = Skeleton(config, choose("fp32", CPU))
    planned = Evaluated(skeleton, Sizes.of(batch), batch.images, decoding)
    found = measured_evaluation(model, batch, decoding)
    for phase in ("losses", "answers"):
        most = planned.held() + sum(getattr(planned, phase)().values())
        assert most == pytest.approx(found[phase], rel=0.2), phase


def planner(config, memory=None, launch=None, **work) -> Planner:
    device = DEVICES["a10"]
    if memory:
        device = replace(device, memory=int(memory / devices.FREE_SHARE))
    sizes = Sizes(2.0, 2.0, 9, 5, 1.0)
    return Planner(
        config, device, read_launch(launch), 2, Workload(sizes, 8, None, "", **work), None
    )


def test_start_values_need_no_more_for_a_larger_global_batch(config):
    few, many = (
        sum(
            planner(
                changed(config, train={"global_batch": n, "micro_batch": 4})
            ).calibration.values()
        )
        for n in (32, 1024)
    )
    assert few == many > 0


def test_an_evaluation_that_does_not_fit_is_told_with_a_number_of_images_that_does(config):
    config = changed(config, evaluation={"batch_images": 256}, train={"micro_batch": 1})
    whole = planner(config)
    needed, trained = sum(whole.evaluation.values()), whole.bytes(1)
    assert needed > trained
    assert advised(planner(config, needed * 1.01), brief=True).fits
    made = advised(planner(config, (needed + trained) / 2), brief=True)
    assert not made.fits
    assert made.tightest.needed == needed == made.evaluation_bytes
    (advice,) = made.advice
    assert re.match(r"evaluation\.batch_images=(128|64|32) fits", advice)


def test_beams_are_counted_and_a_partitioned_model_is_whole_while_it_is_evaluated(config):
    config = changed(config, generate={"caption": {"beams": 5, "max_new_tokens": 10}})
    config = changed(config, evaluation={"batch_images": 64}, train={"image_use_every": None})
    asked, described = (
        planner(config, tasks=frozenset([task])).evaluation for task in ("vqa", "caption")
    )
    assert described["KV cache"] > 2 * asked["KV cache"]
    three = planner(config, launch="zero3_offload")
    assert sum(three.peak(1)[0][name] for name in three.weights) == 0
    assert all(three.evaluation[name] == size for name, size in three.weights.items())


def test_without_a_tokenizer_lengths_are_assumed_and_so_said(config, tmp_path, monkeypatch):
    known = workload(config)
    assert "assumed" not in known.source
    monkeypatch.setattr("harness.plan.workload._tokenizer", lambda config: None)
    guessed = workload(config)
    assert (
        "lengths assumed at four letters a token, since there is no tokenizer of" in guessed.source
    )
    assert guessed.sizes.contexts == known.sizes.contexts
    assert guessed.evaluated.targets == known.evaluated.targets
    assert guessed.tasks == known.tasks == {"caption", "vqa"}
    assert 0 < guessed.sizes.target_tokens <= known.sizes.target_tokens + 2
    words = _stand_in()("a man, playing")["input_ids"]
    assert len(words) == len(["a", "man", ",", "play", "ing"])
