"""`harness config`: every key is told as schema.py has it, and the page in docs/ is what it
prints.
"""

from pathlib import Path

import pytest

from harness.config import reference
from harness.config.keys import flatten
from harness.config.load import load
from harness.config.schema import Config
from harness.errors import ConfigError

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"


def test_every_key_is_told_with_its_type_its_default_and_what_it_means():
    keys = {key.name: key for key in reference.keys_below()}
    assert list(keys) == list(flatten(Config(name="-")))
    assert all(key.type and key.comment for key in keys.values())
    assert [key.name for key in keys.values() if not key.default] == ["name"]
    assert keys["train.learning_rate"].default == "0.0001"
    assert keys["train.learning_rate"].type == "number above 0"
    assert keys["generate.caption.max_new_tokens"].default == "40"
    assert keys["generate.vqa.max_new_tokens"].default == "10"
    assert keys["model.lm.lora.targets"].type == "all_linear, or list of text"


def test_the_page_is_what_the_command_prints():
    assert PAGE.read_text(encoding="utf-8") == reference.page(), (
        "run: harness config --markdown > docs/configuration.md"
    )


def test_the_defaults_are_a_whole_config_that_loads(tmp_path):
    (tmp_path / "mine.yaml").write_text(reference.defaults(), encoding="utf-8")
    assert load(tmp_path / "mine.yaml") == Config(name="mine")


def test_a_section_or_one_key_is_shown_alone_and_a_wrong_one_is_told_the_closest(harness):
    names = [key.name for key in reference.chosen("prompts")]
    assert names == ["prompts.caption", "prompts.vqa", "prompts.chat"]
    code, out, _ = harness("config", "train.learning_rate")
    assert (code, "its peak" in out, "warmup" in out) == (0, True, False)
    with pytest.raises(ConfigError, match=r"did you mean train.learning_rate\?"):
        reference.chosen("train.learning_rat")
    with pytest.raises(ConfigError, match=r"did you mean train.learning_rate\?"):
        reference.chosen("learning_rate")
