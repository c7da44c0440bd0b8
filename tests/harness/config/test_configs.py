"""Every shipped experiment loads, says where it was verified, and holds the choices the README
promises.
"""

import pytest

from harness.ablate import experiment as ablations
from harness.config.keys import flatten
from harness.config.known_mistakes import KnownMistakesConfig
from harness.config.load import load, shipped
from harness.config.schema import Config
from harness.data import prompts
from harness.errors import ConfigError

FILES = sorted(shipped("configs").glob("*.yaml"))


def test_the_promised_experiments_are_there():
    promised = {
        "demo",
        "flickr8k_t4",
        "vqav2_t4",
        "captions_and_vqa_t4",
        "scale",
        "flickr8k_offline",
    }
    assert promised <= {f.stem for f in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_an_experiment_loads_and_its_first_comment_says_what_was_verified(file):
    config = load(file)
    assert config.name == file.stem
    assert config.data.train
    assert config.data.dev
    assert config.data.test
    for task in ("caption", "vqa"):
        prompts.template(task, getattr(config.prompts, task))
    comment = []
    for line in file.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line)
    said = "\n".join(comment)
    assert "Verified: " in said or "Never run with real weights" in said


def test_experiments_on_a_hub_model_say_they_never_ran_with_real_weights():
    for file in FILES:
        if load(file).model.lm.id.startswith("google/"):
            assert "Never run with real weights" in file.read_text(), file.name


def test_the_t4_runs_use_the_models_and_the_precision_of_the_issue():
    flickr, vqa, scale = load("flickr8k_t4"), load("vqav2_t4"), load("scale")
    assert (flickr.model.vision.id, flickr.model.bridge.query_tokens) == (
        "openai/clip-vit-base-patch32",
        32,
    )
    assert (vqa.model.vision.id, vqa.model.bridge.query_tokens) == (
        "openai/clip-vit-large-patch14",
        64,
    )
    assert (vqa.prompts.vqa, vqa.generate.vqa.max_new_tokens) == ("instruction", 10)
    assert {flickr.model.lm.id, vqa.model.lm.id} == {"google/flan-t5-base"}
    assert (scale.model.lm.id, scale.train.precision) == ("google/flan-t5-large", "bf16")
    assert {c.train.precision for c in (flickr, vqa, load("captions_and_vqa_t4"))} == {"fp16"}
    assert {s.path for s in load("captions_and_vqa_t4").data.train} == {
        "data/flickr8k/train",
        "data/vqav2/train",
    }


def test_each_remedy_changes_one_thing_of_the_failure():
    remedies = ablations.load("eos_collapse").variants
    failure = flatten(load("eos_collapse"))
    assert failure["known_mistakes.loss_on_padding"]
    assert failure["known_mistakes.bos"] == "generation_only"
    assert {
        name: {
            key
            for key, value in flatten(load("eos_collapse", variant.overrides)).items()
            if value != failure[key]
        }
        for name, variant in remedies.items()
    } == {
        "failure": set(),
        "padding_masked": {"known_mistakes.loss_on_padding"},
        "eos_weight": {"train.eos_loss_weight"},
        "cross_attention": {"model.lm.cross_attention"},
        "t5": {"model.lm.kind", "model.lm.id", "known_mistakes.bos"},
    }


def test_keys_of_an_earlier_version_are_read_where_they_stand_now():
    old = ["data.loss_on_padding=false", "model.lm.bos=always"]
    assert load("eos_collapse", old).known_mistakes == KnownMistakesConfig()
    new = load("eos_collapse")
    document = new.model_dump(mode="json")
    mistakes = document.pop("known_mistakes")
    document["data"]["loss_on_padding"] = mistakes["loss_on_padding"]
    document["model"]["lm"]["bos"] = mistakes["bos"]
    assert Config(**document) == new


def test_an_override_by_the_new_name_changes_a_file_of_an_earlier_version(tmp_path):
    (tmp_path / "old.yaml").write_text(
        "name: old\ndata: {loss_on_padding: true}\n"
        "model: {lm: {kind: gpt2, bos: generation_only}}\n"
    )
    new = ["known_mistakes.loss_on_padding=false", "known_mistakes.bos=always"]
    assert load(tmp_path / "old.yaml").known_mistakes.loss_on_padding
    assert load(tmp_path / "old.yaml", new).known_mistakes == KnownMistakesConfig()
    with pytest.raises(ConfigError, match="loss_on_padding"):
        load(tmp_path / "old.yaml", ["data.loss_on_padding=null"])


def test_a_config_that_became_a_variant_names_its_successor():
    with pytest.raises(ConfigError, match="run by `harness ablate eos_collapse`"):
        load("eos_collapse_t5")


def test_a_mistake_of_gpt2_is_refused_for_another_model():
    with pytest.raises(ConfigError, match=r"known_mistakes.bos is a mistake of kind decoder"):
        load("demo", ["known_mistakes.bos=generation_only"])
