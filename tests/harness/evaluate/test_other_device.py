"""A run is scored and asked on a machine that cannot do the precision of its training, which is
said.
"""

import json

import pytest
import torch

from harness.config.load import dump
from harness.machine.precision import choose
from harness.model.language import quantise
from harness.train import engine as engines
from harness.train import run as train
from harness.train.__main__ import main
from toy_runs import make_config, picture

SAID = "precision: fp32 in place of fp16, in which this device does not compute"


@pytest.fixture(scope="module")
def t4_run(root):
    """A run in 4 bits whose config asks for fp16, as one from a T4 does."""
    config = make_config(root, root / "clip", root / "t5", precision="fp16", max_steps=2)
    fp32 = choose("fp32", torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engines, "choose", lambda *_: fp32)
        train.run(config)
    (root / "picture.png").write_bytes(picture(0))
    (root / "t4.yaml").write_text(dump(config), encoding="utf-8")
    return config.out_dir


def test_a_4_bit_run_of_a_t4_is_scored_on_a_cpu_and_its_precision_is_told_once(t4_run, harness):
    code, said, errors = harness("evaluate", t4_run, "--data", t4_run.parent / "dev", "--json")
    assert code == 0, errors
    assert errors.count("precision:") == errors.count(SAID) == 1
    assert json.loads(said)["tasks"].keys() == {"caption", "vqa"}


def test_a_4_bit_run_of_a_t4_is_asked_on_a_cpu(t4_run, harness):
    code, said, errors = harness("ask", t4_run, "--image", t4_run.parent / "picture.png")
    assert code == 0, errors
    assert errors.count(SAID) == 1
    assert SAID not in said, "what is said on stdout is the answer"


def test_without_bitsandbytes_a_4_bit_run_is_refused_with_its_name(t4_run, harness, monkeypatch):
    monkeypatch.setattr(quantise, "find_spec", lambda name: None)
    code, _, errors = harness("ask", t4_run, "--image", t4_run.parent / "picture.png")
    assert code == 2
    assert "model.lm.tuning is qlora" in errors
    assert "pip install 'bitsandbytes>=0.49'" in errors
    assert "give a local folder" not in errors


def test_training_on_is_refused_on_a_cpu_and_the_advice_given_can_be_followed(t4_run, capsys):
    go_on = [str(t4_run.parent / "t4.yaml"), "train.max_steps=3", "--resume", "auto"]
    assert main(go_on) == 2
    refused = capsys.readouterr().err
    assert "train.precision is fp16" in refused
    _, _, advice = refused.strip().rpartition("use ")
    assert main([go_on[0], advice, *go_on[1:]]) == 0
    assert "from here on train.precision is 'auto'" in capsys.readouterr().err
