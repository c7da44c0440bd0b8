"""Sets and runs of earlier versions are read, scored, asked and gone on from (data/formats)."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from harness.model.vlm import VisionLanguageModel
from harness.redact import printable
from harness.train.__main__ import main
from shards.manifest import Manifest
from shards.read import Reader
from toy_runs import losses

FORMATS = Path(__file__).parents[1] / "data" / "formats"
VERSIONS = sorted(path.name for path in FORMATS.glob("version_*"))
SCORES = (
    *("loss_nats", "accuracy", "CIDEr", "ROUGE_L", "Bleu_1"),
    *("p_eos_first", "texts"),
)  # and not what the gate says: its donors and names are not those of 2026-11-26


@pytest.fixture(params=VERSIONS)
def expected(request, tmp_path, monkeypatch):
    """What a version read, scored and said; the working folder is a copy of its files."""
    copy = shutil.copytree(FORMATS / request.param, tmp_path / "copy")
    monkeypatch.chdir(copy)
    return json.loads((copy / "expected.json").read_text())


def test_sets_of_images_and_of_features_hold_what_they_held(expected):
    for place, records in expected["sets"].items():
        manifest = Manifest.open(place)
        read = Reader(manifest).read
        samples = [read(index) for index in range(manifest.samples)]
        hashes = [hashlib.sha256(sample.payload).hexdigest() for sample in samples]
        texts = [json.loads(sample.record.to_json()) for sample in samples]
        found = [list(pair) for pair in zip(texts, hashes, strict=True)]
        assert found == records, place
    assert len(expected["sets"]) == 4


def test_a_set_with_all_its_files_is_as_its_index_says(expected, harness):
    code, said, _ = harness("shards", "verify", "shards/dev", "features/train", "features/dev")
    assert (code, said.count("everything is as its index says")) == (0, 3)


@pytest.mark.parametrize("run", ["t5_run", "gpt2_run"])
def test_a_run_gets_the_scores_it_got(expected, harness, run):
    code, said, errors = harness("evaluate", run, "--json")
    assert code == 0, errors
    found, before = json.loads(said)["tasks"], expected["runs"][run]["scores"]["tasks"]
    assert found.keys() == before.keys() == {"caption", "vqa"}
    for task, known in before.items():
        wanted = {name: known[name] for name in SCORES if name in known}
        assert {name: found[task][name] for name in wanted} == pytest.approx(wanted, abs=1e-4), task


@pytest.mark.parametrize("run", ["t5_run", "gpt2_run"])
def test_a_run_that_was_killed_goes_on_as_one_that_was_not(expected, capfd, run):
    assert max(losses(Path(run))) >= 5, "it was killed past its checkpoint"
    assert main([f"{run}/config.yaml", "--resume", "auto"]) == 0
    assert "going on after step 4" in capfd.readouterr().err
    uncut = {int(step): loss for step, loss in expected["runs"][run]["losses"].items()}
    assert losses(Path(run)) == pytest.approx(uncut, rel=1e-5)


@pytest.mark.parametrize("run", ["t5_run", "gpt2_run"])
def test_a_run_goes_on_as_before_over_sets_whose_index_was_upgraded(expected, harness, run):
    shutil.copytree(run, "before")
    assert main([f"{run}/config.yaml", "out=before", "--resume", "auto"]) == 0
    sets = list(expected["sets"])
    code, said, _ = harness("shards", "index", *sets, "--upgrade")
    assert (code, said.count("its index has format 2")) == (0, 4)
    assert main([f"{run}/config.yaml", "--resume", "auto"]) == 0
    assert losses(Path(run)) == losses(Path("before")), "the same bits"
    uncut = {int(step): loss for step, loss in expected["runs"][run]["losses"].items()}
    assert losses(Path(run)) == pytest.approx(uncut, rel=1e-5)


def test_an_upgrade_takes_nothing_that_the_index_says_already(expected, harness):
    code, _, errors = harness("shards", "index", "shards/dev", "--upgrade", "--split", "test")
    assert code == 2
    assert "--upgrade takes sets alone" in errors


@pytest.mark.parametrize("run", ["t5_run", "gpt2_run"])
def test_a_model_says_what_it_said(expected, harness, run):
    known, ask = expected["runs"][run], ("ask", run, "--image", "picture.jpg")
    # Untrained as it is, it says control characters too, which are written out now.
    assert harness(*ask)[1].rstrip("\n") == printable(known["caption"].rstrip("\n"))
    answer = harness(*ask, "--prompt", "what colour is it?")[1]
    assert answer.rstrip("\n") == printable(known["answer"].rstrip("\n"))


@pytest.mark.parametrize("run", ["t5_run", "gpt2_run"])
def test_a_saved_model_keeps_its_weights_and_is_the_start_of_another_run(expected, run):
    (folder,) = Path(run).glob("checkpoints/*/model")
    saved = load_file(folder / "model.safetensors")
    found = VisionLanguageModel.from_pretrained(folder).trained_state()
    assert found.keys() == saved.keys()
    assert all(value.equal(saved[name]) for name, value in found.items())
    new = ["out=new", f"model.init_from={run}", "train.max_steps=1", "data.dev=[]"]
    assert main([f"{run}/config.yaml", *new]) == 0
    from_random_weights = expected["runs"][run]["losses"]["1"]
    assert losses(Path("new"))[1] < from_random_weights - 0.5
