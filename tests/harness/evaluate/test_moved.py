"""A run that was moved is asked and scored as where it was trained (data/formats)."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from harness.checkpoint import FILES, fact
from harness.evaluate import run_on_disk
from harness.evaluate.moved import Move
from harness.redact import printable
from harness.train.__main__ import main
from toy_runs import losses

PARTS = ("train", "dev")
FORMATS = Path(__file__).parents[2] / "data" / "formats" / "version_1"


@pytest.fixture
def moved(tmp_path, monkeypatch):
    """A run with its base, encoder and test set in its folder, away from where it was trained; the
    working folder is neither.
    """
    run = shutil.copytree(FORMATS / "t5_run", tmp_path / "away" / "mine")
    for part in ("t5", "clip"):
        shutil.copytree(FORMATS / "models" / part, run / part)
    shutil.copy(FORMATS / "picture.jpg", tmp_path)
    monkeypatch.chdir(tmp_path)
    return run


def known(name: str):
    return json.loads((FORMATS / "expected.json").read_text())["runs"]["t5_run"][name]


def ask(harness, run: Path, *options: object) -> tuple[int, str]:
    code, said, errors = harness("ask", run, "--image", "picture.jpg", *options)
    return code, errors if code else said.rstrip("\n")


def test_a_run_is_asked_wherever_it_and_its_parts_are_moved(moved, harness, tmp_path):
    wanted = (0, printable(known("caption").rstrip("\n")))
    assert ask(harness, moved) == wanted
    base = (moved / "t5").rename(tmp_path / "base")
    encoder = (moved / "clip").rename(tmp_path / "encoder")
    code, refused = ask(harness, moved, "--vision", encoder)
    assert code == 2
    assert "base language model 'models/t5'" in refused
    assert "--lm PATH" in refused
    code, refused = ask(harness, moved, "--lm", base)
    assert code == 2
    assert "vision encoder 'models/clip'" in refused
    assert "--vision PATH" in refused
    assert ask(harness, moved, "--lm", base, "--vision", encoder) == wanted


def test_sets_in_the_folder_of_a_run_are_scored_where_they_lie_now(moved, harness, monkeypatch):
    """The text-only floor that it was given on them is kept."""
    quick = partial(run_on_disk.evaluate_model, floors=False)
    monkeypatch.setattr(run_on_disk, "evaluate_model", quick)
    (step,) = (moved / "checkpoints").iterdir()
    config = json.loads((step / "state.json").read_text())["config"]
    assert config["out"] == "t5_run"
    shutil.copytree(FORMATS / "shards" / "dev", moved / "dev")
    rewrite(step, "data", {"test": [{"path": "t5_run/dev"}]})
    scores = moved / "evaluation" / "scores.json"
    earlier = json.loads(scores.read_text())
    earlier["data"] = ["t5_run/dev"]
    earlier["tasks"]["vqa"]["text_only_accuracy"] = 12.5
    scores.write_text(json.dumps(earlier))
    code, said, errors = harness("evaluate", moved, "--json")
    assert code == 0, errors
    report = json.loads(said)
    assert report["data"] == [str(moved / "dev")]
    assert report["tasks"]["vqa"]["text_only_accuracy"] == 12.5
    before = known("scores")["tasks"]["vqa"]["accuracy"]
    assert report["tasks"]["vqa"]["accuracy"] == pytest.approx(before)


def test_a_moved_run_goes_on_without_the_weights_that_it_began_from(moved, capfd):
    (step,) = (moved / "checkpoints").iterdir()
    rewrite(step, "model", {"init_from": "gone"})
    sets = {part: shutil.copytree(FORMATS / "shards" / part, moved / part) for part in PARTS}
    places = [f"data.{part}=[{{path: {folder}}}]" for part, folder in sets.items()]
    models = [f"model.lm.id={moved / 't5'}", f"model.vision.id={moved / 'clip'}"]
    given = [f"{moved}/config.yaml", f"out={moved}", "data.test=[]", *places, *models]
    assert main([*given, f"model.init_from={moved}", "--resume", "auto"]) == 2
    assert "--resume: model.init_from was 'gone' in " in capfd.readouterr().err
    assert main([*given, "model.init_from=null", "--resume", "auto"]) == 0
    uncut = {int(number): loss for number, loss in known("losses").items()}
    assert losses(moved) == pytest.approx(uncut, rel=1e-5)


def rewrite(step: Path, section: str, changes: dict) -> None:
    """Changes a checkpoint's config, and its hash with it."""
    state = json.loads((step / "state.json").read_text())
    state["config"][section] |= changes
    (step / "state.json").write_text(json.dumps(state))
    files = json.loads((step / FILES).read_text()) | {"state.json": fact(step / "state.json")}
    (step / FILES).write_text(json.dumps(files))


def test_only_what_lay_in_the_folder_and_is_there_now_is_elsewhere_now(tmp_path):
    (tmp_path / "dev").mkdir()
    move = Move(Path("runs/mine"), tmp_path)
    assert move.path("runs/mine/dev") == str(tmp_path / "dev")
    for other in ("runs/mine/gone", "runs/mine2/dev", "dev", "s3://bucket/runs/mine/dev"):
        assert move.path(other) == other
