"""harness.load takes a run, a checkpoint, a saved model and a name of the hub (data/formats)."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import harness as package
from harness.errors import ConfigError
from harness.model.vlm import VisionLanguageModel
from harness.redact import printable

FORMATS = Path(__file__).parents[1] / "data" / "formats" / "version_1"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    copy = shutil.copytree(FORMATS, tmp_path / "here")
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture
def of_the_hub(here, monkeypatch) -> Path:
    """A model that holds its own base and encoder, in a cache laid out as the hub's own."""
    snapshot = here / "hub" / "models--me--toy" / "snapshots" / ("c" * 40)
    shutil.copytree(here / "t5_run" / "checkpoints" / "step-000004" / "model", snapshot)
    for kind, part in (("lm", "t5"), ("vision", "clip")):
        (here / "models" / part).rename(snapshot / part)
        described = json.loads((snapshot / "config.json").read_text())
        described["model"][kind]["id"] = part
        (snapshot / "config.json").write_text(json.dumps(described))
    refs = here / "hub" / "models--me--toy" / "refs"
    refs.mkdir()
    (refs / "main").write_text("c" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "hub"))
    return snapshot


def same(a: VisionLanguageModel, b: VisionLanguageModel) -> bool:
    mine, theirs = a.trained_state(), b.trained_state()
    return mine.keys() == theirs.keys() and all(torch.equal(w, theirs[k]) for k, w in mine.items())


def test_a_run_a_checkpoint_and_its_model_are_one_model(here):
    run = package.load("t5_run")
    assert isinstance(run, VisionLanguageModel)
    assert not run.training
    (step,) = Path("t5_run/checkpoints").iterdir()
    assert same(package.load(step), run)
    assert same(package.load(step / "model"), run)
    assert same(package.load("t5_run", checkpoint="4", device="cpu"), run)
    with pytest.raises(ConfigError, match=r"--checkpoint 7: t5_run holds step-000004"):
        package.load("t5_run", checkpoint="7")
    with pytest.raises(ConfigError, match="is no run, which alone has checkpoints"):
        package.load(step / "model", checkpoint="4")


def test_a_model_of_the_hub_is_loaded_with_the_parts_that_it_holds(of_the_hub, harness):
    model = package.load("me/toy")
    assert same(model, AutoModel.from_pretrained("me/toy", cache_dir=of_the_hub.parents[2]))
    assert Path(model.config.model["lm"]["id"]) == of_the_hub / "t5"
    known = json.loads((FORMATS / "expected.json").read_text())["runs"]["t5_run"]
    code, said, _ = harness("ask", "me/toy", "--image", "picture.jpg")
    assert (code, said.rstrip("\n")) == (0, printable(known["caption"].rstrip("\n")))


def test_what_is_no_model_of_ours_is_refused_before_its_weights_are_fetched(of_the_hub, harness):
    (of_the_hub / "config.json").write_text('{"model_type": "llava"}')
    for name, expected in (
        ("me/toy", "me/toy is neither a folder nor a model that the hub gave (it is a model of an"),
        ("me/other", "me/other is neither a folder nor a model that the hub gave"),
        ("other", "other is not a folder; expected a run, a checkpoint, the folder of a saved mo"),
        ("models", "models holds no whole checkpoint"),
        (of_the_hub / "t5", "t5 is no saved model"),
    ):
        code, _, errors = harness("ask", name, "--image", "picture.jpg")
        assert code == 2
        assert expected in errors
    code, _, errors = harness("gate", "me/toy", "shards/dev", "--lm", "here")
    assert code == 2
    assert "--lm and --vision tell where the parts of a run are; me/toy is none" in errors


def test_importing_harness_is_fast_and_brings_neither_torch_nor_its_users():
    program = (
        "import sys, time; began = time.process_time(); import harness; "
        "print(time.process_time() - began < 0.1, len({'torch', 'pydantic'} & sys.modules.keys()), "
        "hasattr(harness, 'lead'))"
    )
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert said.stdout.split() == ["True", "0", "False"], said.stderr
