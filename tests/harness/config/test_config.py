"""A config is loaded, overridden, dumped and refused; a refusal is one sentence with the place and
the remedy.
"""

import pytest
import yaml

from harness.config.keys import flatten
from harness.config.load import apply_overrides, dump, load, parse_override
from harness.config.schema import Config
from harness.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def _write(text: str):
        file = tmp_path / "experiment.yaml"
        file.write_text(text)
        return file

    return _write


def refusal(file, *overrides) -> str:
    with pytest.raises(ConfigError) as caught:
        load(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "name: a\ntrain: {learning_rte: 1}",
            "no key train.learning_rte; did you mean train.learning_rate?",
        ),
        ("name: a\nlearning_rate: 1", "no key learning_rate; did you mean train.learning_rate?"),
        ("nam: a", "no key nam; did you mean name?"),
        (
            "name: a\ndata: {train: [{pth: x}]}",
            "no key data.train.0.pth; did you mean data.train.0.path?",
        ),
        (
            "name: a\nmodel: {qqqq: 1}",
            "no key model.qqqq; the keys there are vision, bridge, lm, init_from",
        ),
        ("name: a\n3: x", "no key 3; the keys there are name,"),
        ("seed: 1", "name is missing"),
        ("name: a\ntrain: {epochs: many}", "train.epochs: found 'many', expected an integer"),
        ("name: a\ntrain: {epochs: 0}", "train.epochs: found 0, expected greater than 0"),
        ("name: a\nseed: yes", "seed: found true, expected a number"),
        (
            "name: a\ntrain: {learning_rate: yes}",
            "train.learning_rate: found true, expected a number",
        ),
        ("name: a\ntrain: {betas: [0.9, 1.0]}", "train.betas.1: found 1.0, expected less than 1"),
        (
            "name: a\ntrain: {learning_rate: .inf}",
            "train.learning_rate: found inf, expected a finite number",
        ),
        ("name: a\ntrain: {learning_rate: .nan}", "train.learning_rate: found nan, expected"),
        ("name: a\ntrain: {betas: [0.9]}", "train.betas.1: found [0.9], expected one value more"),
        (
            "name: a\ntrain: 5",
            "train: found 5, expected a section with keys such as epochs, max_steps",
        ),
        ("name: a\ntrain:", "train: found nothing, expected a section"),
        ("name: a\ndata: {train: x}", "data.train: found 'x', expected a list"),
        (
            "name: a\nmodel: {bridge: {kind: qformr}}",
            "model.bridge.kind: found 'qformr', expected 'qformer', 'mean_pool'",
        ),
        (
            "name: a\nmodel: {bridge: {width: 100, heads: 3}}",
            "model.bridge: width 100 is not divisible by heads 3",
        ),
        (
            "name: a\nmodel: {lm: {lora: {targets: 5}}}",
            "model.lm.lora.targets: found 5, expected 'all_linear' or a list",
        ),
        ("name: a\nmodel: {lm: {lora: {targets: [q, 5]}}}", "expected 'all_linear' or a string"),
        ("name: a\nname: b", "the key 'name' occurs twice"),
        (
            "name: a\ndata: {lanes: 5}",
            "data.lanes is 5 and train.global_batch 32: a batch takes as many images of each lane",
        ),
        ("name: [", "is not YAML"),
        ("name: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("- a", "found ['a'], expected a mapping"),
        ("", "found nothing, expected a mapping"),
    ],
)
def test_a_wrong_config_is_refused_with_the_file_the_key_what_was_found_and_what_is_right(
    write, text, message
):
    file = write(text)
    said = refusal(file)
    assert said.startswith(f"{file}: ")
    assert message in said


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epoch=3", "no key train.epoch; did you mean train.epochs?"),
        ("train.epochs=x", "train.epochs: found 'x', expected an integer"),
        ("train.epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("train..epochs=3", "expected key=value"),
        ("train.betas=[", "the value is not YAML"),
        ("name.first=b", "name is 'a', it holds no keys"),
        ("data.train.1.path=b", "data.train is a list of 1, found '1', expected a position in it"),
        ("data.train.x.path=b", "found 'x', expected a position in it"),
    ],
)
def test_a_wrong_override_is_refused_and_named_in_place_of_the_file(write, override, message):
    said = refusal(write("name: a\ndata: {train: [{path: x}]}"), override)
    assert said.startswith(f"override {override!r}: ")
    assert message in said


def test_a_mistake_in_the_file_is_not_blamed_on_an_override(write):
    file = write("name: a\ntrain: {epochs: 0}")
    assert refusal(file, "train.warmup=0.5").startswith(f"{file}: train.epochs")


def test_overrides_are_typed_reach_into_lists_and_the_last_one_wins(write):
    file = write("name: a\ndata: {train: [{path: x}, {path: y}]}")
    config = load(
        file,
        [
            "train.learning_rate=1e-3",
            "data.train.1.path=z=1",
            "train.clip_norm=null",
            "train.epochs=2",
            "train.epochs=3",
        ],
    )
    assert config.train.learning_rate == 1e-3
    assert [s.path for s in config.data.train] == ["x", "z=1"]
    assert config.train.clip_norm is None
    assert config.train.epochs == 3


def test_overriding_leaves_the_document_as_it_was():
    document = {"data": {"train": [{"path": "x"}]}}
    apply_overrides(document, ["data.train.0.path=y", "seed=1"])
    assert document == {"data": {"train": [{"path": "x"}]}}
    assert parse_override("a.b=[1, 2]") == (["a", "b"], [1, 2])


def test_a_dumped_config_loads_back_equal_and_names_every_default(write):
    config = load(
        write("name: é\ndata: {train: [{path: x, weight: 0.1}]}"),
        ["train.learning_rate=3.0000000000000004e-05", "model.lm.lora.targets=[q, v]"],
    )
    again = load(write(dump(config)))
    assert again == config
    assert yaml.safe_load(dump(Config(name="a")))["evaluation"]["bootstrap"] == 1000


def test_every_flat_key_is_an_override_that_gives_the_same_config(write):
    config = load(write("name: a\ndata: {train: [{path: x}]}\ntrain: {betas: [0.8, 0.9]}"))
    flat = flatten(config)
    assert flat["data.train.0.path"] == "x"
    assert flat["train.betas"] == [0.8, 0.9]
    overrides = [
        f"{key}={yaml.safe_dump(value, default_flow_style=True)}" for key, value in flat.items()
    ]
    assert load(write("name: b\ndata: {train: [{path: y}]}"), overrides) == config


def test_a_config_is_frozen(write):
    with pytest.raises(ValueError, match="frozen"):
        load(write("name: a")).seed = 3


def test_a_missing_config_names_the_closest_shipped_one(tmp_path):
    assert "did you mean configs/flickr8k_t4.yaml?" in refusal("configs/flickr8_t4.yaml")
    assert "the shipped ones are" in refusal(tmp_path / "zzzz.yaml")
    assert "is a folder" in refusal(tmp_path)


def test_a_shipped_config_is_found_by_name_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load("demo").name == load("configs/demo.yaml").name == "demo"
    (tmp_path / "demo").write_text("name: mine")
    assert load("demo").name == "mine"


def test_one_line_names_the_folder_of_all_splits_and_its_override_replaces_a_configs_own(
    write, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for split in ("mine/train", "mine/val", "alone"):
        (tmp_path / split).mkdir(parents=True)
        (tmp_path / split / "index.json").touch()

    def sets(config):
        named = (config.data.train, config.data.dev, config.data.test)
        assert config.data.folder is None  # the resolved config says which sets are read
        return [[one.path for one in part] for part in named]

    file = write("name: a\ndata:\n  folder: mine")
    assert sets(load(file)) == [["mine/train"], ["mine/val"], []]
    assert sets(load(file, ["data.train.0.path=x"]))[0] == ["x"]
    assert sets(load("flickr8k_t4", ["data.folder=mine"])) == [["mine/train"], ["mine/val"], []]
    absent = "data/flickr8k"  # what looks for them says so
    assert sets(load("flickr8k_t4")) == [[f"{absent}/{part}"] for part in ("train", "dev", "test")]
    assert sets(load(file, ["data.folder=alone"])) == [["alone"], [], []]
    assert "expected a local folder" in refusal(file, "data.folder=s3://bucket/mine")
    both = write("name: a\ndata: {folder: mine, dev: [{path: x}]}")
    assert refusal(both) == (
        f"{both}: data.folder stands for train, dev and test: give it, or data.dev, not both"
    )
