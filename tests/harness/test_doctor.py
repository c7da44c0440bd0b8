"""What is wrong with a config is said before a launch: data, encoder, model ids, output folder."""

import pytest

from harness.config import ConfigError, load
from harness.doctor import check_before_launch, check_models, explain
from harness.model.processing import encoder_name
from shards.manifest import ShardError
from shards.record import Record, RecordError, Text
from shards.write import write_shards


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
        return load("demo", [*sets, f"model.lm.id={tmp_path / 'lm'}", f"out={tmp_path / 'out'}", *overrides])

    return _config


def test_a_config_whose_data_and_models_are_there_passes_and_nothing_is_made(config, tmp_path):
    check_before_launch(config())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train=[]", "data.train is empty"),
        ("data.dev.0.path=/nowhere", "data.dev.0.path: there is no folder of shards at /nowhere"),
        ("data.train=[{path: a, weight: 1}, {path: b}]", "some sets have a weight and some have none"),
        ("model.vision.image_size=224", "image_size 128 instead of 224"),
        ("prompts.vqa=Question:", "prompts.vqa"),
        ("model.lm.id=runs/gone", "there is no folder runs/gone: make it by `harness base-lm`"),
        ("model.lm.id=./gone", "model.lm.id: there is no folder ./gone"),
        ("model.lm.id=google/flan-t5-base", "model.lm.id: google/flan-t5-base is neither a folder nor in the cache"),
        ("model.lm.id=no such model", "neither a folder nor a model id of the hub"),
        ("model.init_from=/gone", "model.init_from: there is no folder /gone"),
        ("train.precision=fp16", "train.precision is fp16, but this machine has no GPU"),
        ("tracking.uri=foo://x", "tracking.uri is foo://x, expected a database or a server"),
        ("out=/dev/null/x", "out: /dev/null is a file"),
    ],
)
def test_what_cannot_be_used_is_named_with_its_key(config, monkeypatch, tmp_path, override, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("harness.launcher.gpus", lambda: 0)
    with pytest.raises((ConfigError, ShardError)) as caught:
        check_before_launch(config(override))
    assert message in str(caught.value)


def test_features_of_another_encoder_are_refused_naming_both_and_the_key(config):
    with pytest.raises(ConfigError, match=r"data\.train\.0\.path: .*made by efficientnet.*not by openai/clip"):
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
        ConfigError, match=r"data\.dev\.0\.path is a set of images and data\.train\.0\.path one of features"
    ):
        check_before_launch(config(f"data.dev.0.path={images}"))


def test_a_folder_that_is_no_saved_model_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no config\.json"):
        check_models(config(f"model.lm.id={tmp_path / 'empty'}"))


def test_an_unreachable_hub_is_a_sentence_with_the_remedy(config, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", unreachable)
    with pytest.raises(ConfigError, match=r"the hub cannot be reached: download it .*model.lm.id=DIR"):
        check_models(config("model.lm.id=google/flan-t5-base"))


def test_errors_of_the_user_are_sentences_and_bugs_are_not():
    assert explain(ShardError("a\n  b")) == "a b"
    assert explain(RecordError("r")) == "r"
    assert explain(FileNotFoundError(2, "No such file or directory", "x.jpg")) == "x.jpg: no such file or directory"
    assert explain(OSError("Can't load\nthe model")) == "Can't load the model"
    assert "pip install 'vl-harness[demo]'" in explain(ModuleNotFoundError("No module", name="easy_vqa.data"))
    assert explain(ValueError("bug")) is None
    assert explain(ModuleNotFoundError("No module", name="harness.typo")) is None
