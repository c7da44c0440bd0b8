"""What is wrong with a config is said before a launch (data, encoder, model ids, output folder),
and by the doctor.
"""

import json
from pathlib import Path

import pytest

from harness.checks import check_before_launch, check_models
from harness.config.encoder import encoder_name
from harness.config.load import load
from harness.doctor.diagnose import diagnose
from harness.doctor.findings import Finding, failed
from harness.doctor.overfit import Result
from harness.errors import ConfigError, explain
from harness.machine.launch_file import Launch, read_launch
from shards.files import ShardError
from shards.record import Record, RecordError, Text
from shards.write import write_shards

LAUNCH = Path(__file__).parents[2] / "data" / "launch"


@pytest.fixture
def features(tmp_path):
    return a_set(tmp_path / "features", load("demo").model.vision)


def a_set(folder, vision=None):
    """One record as an image set, or as a feature set of `vision`."""
    record = Record("a", "easy_vqa", "train", "a", (Text("1", "vqa", ("yes",), "is it red?"),))
    kind = {"kind": "features", "encoder": encoder_name(vision)} if vision else {}
    samples = [(record, b"not read here", "safetensors" if vision else "jpg")]
    write_shards(samples, folder, dataset="easy_vqa", split="train", **kind)
    return folder


@pytest.fixture
def config(tmp_path, features):
    (tmp_path / "lm").mkdir()
    (tmp_path / "lm" / "config.json").write_text("{}")

    def _config(*overrides):
        sets = [f"data.{part}=[{{path: {features}}}]" for part in ("train", "dev", "test")]
        return load(
            "demo", [*sets, f"model.lm.id={tmp_path / 'lm'}", f"out={tmp_path / 'out'}", *overrides]
        )

    return _config


def test_a_config_whose_data_and_models_are_there_passes_and_nothing_is_made(config, tmp_path):
    check_before_launch(config())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=[]", "data.train is empty"),
        ("data.dev.0.path=/nowhere", "data.dev.0.path: there is no folder of shards at /nowhere"),
        (
            "data.train=[{path: a, weight: 1}, {path: b}]",
            "some sets have a weight and some have none",
        ),
        ("model.vision.image_size=224", "image_size 128 instead of 224"),
        (
            "data.dev.0.loss_weight=0.5",
            "data.dev.0.loss_weight is 0.5, but nothing is learnt from data.dev: give it to a set "
            "of data.train",
        ),
        ("prompts.vqa='Question:'", "prompts.vqa: 'Question:' is neither one of"),
        ("model.lm.id=runs/gone", "there is no folder runs/gone: make it by `harness base-lm`"),
        ("model.lm.id=./gone", "model.lm.id: there is no folder ./gone"),
        (
            "model.lm.id=google/flan-t5-base",
            "model.lm.id: google/flan-t5-base is neither a folder nor in the cache",
        ),
        ("model.lm.id=no such model", "neither a folder nor a model id of the hub"),
        ("model.init_from=/gone", "model.init_from: there is no folder /gone"),
        ("train.precision=fp16", "train.precision is fp16, but this machine has no GPU"),
        ("tracking.uri=foo://x", "tracking.uri is foo://x, expected a database or a server"),
        ("out=/dev/null/x", "out: /dev/null is a file"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_key(
    config, monkeypatch, tmp_path, override, message
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("harness.machine.launcher.gpus", lambda: 0)
    with pytest.raises((ConfigError, ShardError)) as caught:
        check_before_launch(config(override))
    assert message in str(caught.value)


def test_features_of_another_encoder_are_refused_naming_both_and_the_key(config):
    with pytest.raises(
        ConfigError, match=r"data\.train\.0\.path: .*made by efficientnet.*not by openai/clip"
    ):
        check_before_launch(config("model.vision.kind=clip"))


def test_a_run_on_features_needs_no_encoder_and_one_on_images_does(config, tmp_path):
    vision = "model.vision={kind: clip, id: some/clip}"
    sets = [f"data.{part}.0.path={tmp_path / 'clip'}" for part in ("train", "dev", "test")]
    a_set(tmp_path / "clip", config(vision).model.vision)
    check_before_launch(config(vision, *sets))
    a_set(tmp_path / "images")
    sets = [f"data.{part}.0.path={tmp_path / 'images'}" for part in ("train", "dev", "test")]
    with pytest.raises(ConfigError, match=r"model\.vision\.id: some/clip is neither"):
        check_before_launch(config(vision, *sets))


def test_images_and_features_in_one_run_are_refused(config, tmp_path):
    images = a_set(tmp_path / "images")
    with pytest.raises(
        ConfigError,
        match=r"data\.dev\.0\.path is a set of images and data\.train\.0\.path one of features",
    ):
        check_before_launch(config(f"data.dev.0.path={images}"))


def test_a_folder_that_is_no_saved_model_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        check_models(config(f"model.lm.id={tmp_path / 'empty'}"))


def test_an_unreachable_hub_is_a_sentence_with_the_remedy(config, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("harness.checks.why_no_hub", lambda: None)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    with pytest.raises(
        ConfigError, match=r"the hub cannot be reached: download it .*model.lm.id=DIR"
    ):
        check_models(config("model.lm.id=google/flan-t5-base"))


def test_errors_of_the_user_are_sentences_and_bugs_are_not():
    assert explain(ShardError("a\n  b")) == "a b"
    assert explain(RecordError("r")) == "r"
    assert (
        explain(FileNotFoundError(2, "No such file or directory", "x.jpg"))
        == "x.jpg: no such file or directory"
    )
    assert explain(OSError("Can't load\nthe model")) == "Can't load the model"
    assert "pip install -e '.[demo]'" in explain(
        ModuleNotFoundError("No module", name="easy_vqa.data")
    )
    assert explain(ValueError("bug")) is None
    assert explain(ModuleNotFoundError("No module", name="harness.typo")) is None


@pytest.fixture
def quick(monkeypatch):
    """Without the seconds of two real processes and a 4-bit layer: test_doctor_machine.py has
    them.
    """
    monkeypatch.setattr(
        "harness.doctor.machine.all_reduce", lambda gpus: Finding("all-reduce", "OK", "")
    )
    monkeypatch.setattr(
        "harness.doctor.machine.four_bit", lambda: Finding("bitsandbytes", "OK", "")
    )


def test_the_machine_alone_is_examined_without_a_config(quick):
    found = diagnose()
    names = (
        "Python",
        "torch",
        "GPU",
        "bitsandbytes",
        "DeepSpeed",
        "threads",
        "memory",
        "disk",
    )
    assert not {*names, "all-reduce"} - {finding.name for finding in found}


def test_a_check_of_the_machine_that_breaks_is_a_line_and_the_others_go_on(quick, monkeypatch):
    def broken(*_):
        raise OSError("libcudart.so is missing")

    monkeypatch.setattr("harness.doctor.machine.all_reduce", broken)
    monkeypatch.setattr("harness.doctor.machine.four_bit", broken)
    found = {finding.name: finding for finding in diagnose()}
    assert found["bitsandbytes"] == Finding("bitsandbytes", "error", "libcudart.so is missing")
    assert found["all-reduce"].state == "error"
    assert found["disk"].state != "error"


def test_every_refusal_of_a_launch_is_a_line_of_its_own(config, quick, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    wrong = config(
        "data.dev=[{path: /nowhere}]",
        "model.lm.id=some/t5",
        "prompts.vqa='Question:'",
        "out=/dev/null/x",
    )
    found = {finding.name: finding for finding in diagnose(wrong)}
    assert {name for name, finding in found.items() if finding.state == "error"} >= {
        "data.dev.0.path",
        "model.lm.id",
        "prompts.vqa",
        "out",
    }
    assert found["prompts.caption"].state == "OK"
    assert found["data and model"] == Finding(
        "data and model", "warning", "not looked at", "put the errors above right first"
    )


def test_a_launch_file_is_held_against_the_config_as_before_training(config, quick, monkeypatch):
    monkeypatch.setattr("harness.doctor.examine.options", lambda *_: ())  # imports DeepSpeed
    unready = config("data.dev=[{path: /nowhere}]", "train.global_batch=32", "train.micro_batch=32")
    found = {}
    for name in ("ddp_bf16", "stage2_inline"):
        launch = read_launch(LAUNCH / f"{name}.yaml")
        (found[name],) = (f for f in diagnose(unready, launch, 2) if f.name == "launch file")
    assert found["ddp_bf16"].state == "warning"
    assert "mixed_precision is bf16, which decides nothing" in found["ddp_bf16"].found
    assert found["stage2_inline"].state == "error"
    assert "gradient_accumulation_steps is 4, but" in found["stage2_inline"].found


def test_a_sound_config_has_no_error_and_its_model_is_looked_at(
    quick, monkeypatch, tmp_path, tiny_clip_folder, tiny_t5_folder
):
    from toy_runs import make_config

    monkeypatch.setattr("harness.doctor.examine.check", lambda *_, **__: None)
    monkeypatch.setattr(
        "harness.doctor.overfit.overfit",
        lambda config, images, progress: Result(images, 5, 4.0, 0.1, 1.0, images, ()),
    )
    found = diagnose(make_config(tmp_path, tiny_clip_folder, tiny_t5_folder), overfit_images=3)
    assert not failed(found)
    looked_at = {finding.name for finding in found}
    assert {
        "model.lm.id",
        "data.train.0.path",
        "prompts",
        "targets",
        "labels",
        "image tokens",
        "plan",
    } <= looked_at
    assert looked_at >= {"overfit 3", "MLflow", "global batch", "learning rate", "steps"}


@pytest.mark.parametrize("state", ["OK", "warning", "error"])
def test_the_verb_prints_a_table_or_json_and_ends_with_1_on_errors(monkeypatch, harness, state):
    said = [Finding("disk", state, "3 GB free [at] /x", "make room")]
    asked = []
    monkeypatch.setattr(
        "harness.doctor.diagnose.diagnose", lambda *given: asked.append(given) or said
    )
    codes = []
    for arguments in (
        ["--json"],
        ["demo", "train.epochs=2", "--overfit", "8", "--launch", "zero2", "--processes", "4"],
    ):
        code, out, _ = harness("doctor", *arguments)
        codes.append(code)
        if arguments == ["--json"]:
            assert json.loads(out) == [
                {"name": "disk", "state": state, "found": "3 GB free [at] /x", "fix": "make room"}
            ]
        else:
            assert "3 GB free [at] /x" in out
    assert codes == [int(state == "error")] * 2
    assert asked[0][:4] == (None, Launch(), None, None)
    config, launch, processes, overfit, _ = asked[1]
    assert (config.train.epochs, launch.name, processes, overfit) == (2, "zero2", 4, 8)


def test_learning_by_heart_needs_a_config(harness):
    code, _, said = harness("doctor", "--overfit", "8")
    assert code == 2
    assert "--overfit needs a config" in said
