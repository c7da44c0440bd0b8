"""`harness init`: its answers as options or on a terminal, and a config that the doctor passes."""

import io
import sys
from pathlib import Path

import pytest

from harness.config.load import load
from harness.doctor import diagnose, examine
from harness.doctor.findings import failed
from harness.own_data.first_config import Answers, write_first_config
from toy_runs import make_shards


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_shards(tmp_path / "data/mine/train", 12, questions=False)
    make_shards(tmp_path / "data/mine/dev", 4, "dev", 50, questions=False)
    make_shards(tmp_path / "data/asked", 8, captions=False)
    return "data/mine"


def options(place, **changed):
    given = {"task": "captions", "data": place, "device": "cpu", "lm": "toy", "out": "mine.yaml"}
    pairs = (given | changed).items()
    return [word for name, value in pairs if value for word in (f"--{name}", str(value))]


def test_the_config_of_local_models_passes_the_doctor(
    data, tiny_clip_folder, tiny_t5_folder, monkeypatch
):
    answers = Answers(
        "captions", data, "cpu", str(tiny_t5_folder), Path("mine.yaml"), str(tiny_clip_folder)
    )
    said = write_first_config(answers)
    assert said[0] == "mine.yaml: for 12 in train, 4 in dev"
    assert not [line for line in said if "guessed" in line]
    text = Path("mine.yaml").read_text()
    assert "would fit cpu" in text  # what the plan found
    monkeypatch.setattr(diagnose, "_of_machine", lambda *_: [])  # of which a config knows nothing
    monkeypatch.setattr(examine, "plan", lambda *_: None)  # made by init itself
    found = diagnose.diagnose(load("mine.yaml", ["tracking.kind=none"]))
    assert len(found) > 10
    assert not failed(found), [finding for finding in found if finding.state == "error"]


def test_the_toy_needs_its_base_model_first_and_all_is_said(data, harness):
    code, said, _ = harness("init", *options(data))
    assert code == 0
    assert "harness base-lm data/mine/train --config mine.yaml" in said
    config = load("mine.yaml")
    assert [one.path for one in config.data.dev] == ["data/mine/dev"]
    assert config.model.vision.kind == "efficientnet_lite0"
    code, _, error = harness("init", *options(data))
    assert (code, "is there already" in error) == (2, True)


def test_without_a_dev_set_it_says_what_that_costs(data, harness):
    code, said, _ = harness("init", *options("data/asked", task="questions", device="t4"))
    assert code == 0
    assert "data.dev is empty" in said
    assert load("mine.yaml").generate.vqa.max_new_tokens == 8


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"data": None, "lm": None}, "no terminal to ask on: give --data, --lm too"),
        ({"task": "questions"}, "holds captions, and no questions"),
        ({"device": "t5"}, "no such device; expected t4, l4"),
        ({"data": "photos"}, "there is no folder of shards at photos/train"),
        ({"out": "mine"}, "expected the name of a YAML file"),
    ],
)
def test_answers_that_do_not_fit_are_refused_in_a_sentence(
    data, harness, monkeypatch, changed, says
):
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, error = harness("init", *options(data, **changed))
    assert code == 2
    assert says in error
    assert not Path("mine.yaml").exists()


def test_on_a_terminal_what_is_missing_is_asked_until_it_fits(data, harness, monkeypatch):
    typed = io.StringIO("neither\nc\nnowhere\ndata/mine\ncpu\n\nother.yaml\n")
    typed.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", typed)
    code, said, asked = harness("init")
    assert code == 0, asked
    assert "found 'neither', expected captions or questions" in asked
    assert "there is no folder of shards at nowhere/train" in asked
    assert "[toy]" in asked  # what is suggested for a CPU
    assert said.startswith("other.yaml")
    assert load("other.yaml").name == "other"
