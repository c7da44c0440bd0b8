"""Without a network nobody waits: each way to a model of the hub asks for it once, and then says in
one sentence what is missing.
"""

import json
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import constants

from harness.checks import check_models
from harness.config.schema import LanguageModelConfig
from harness.doctor import examine
from harness.errors import ConfigError
from harness.evaluate.published import PublishedModel
from harness.export import proof, reloaded
from harness.machine import network
from harness.model.language.quantise import load_tokenizer
from harness.model.vlm import VisionLanguageModel
from harness.own_data.as_seen import AsSeen
from shards.manifest import Manifest
from toy_runs import make_config

NAME = "nobody/nothing"


@pytest.fixture(scope="module")
def config(root):
    made = make_config(root, root / "clip", root / "t5")
    model = made.model.model_copy(update={"lm": LanguageModelConfig(id=NAME, tuning="lora")})
    return made.model_copy(update={"model": model})


WAYS = {
    "train": (lambda config: check_models(config, with_vision=False), "model.lm.id"),
    "doctor": (lambda config: list(examine.texts(config)), "model.lm.id"),
    "view": (
        lambda config: AsSeen(config, Manifest.open(config.data.train[0].path)),
        "model.lm.id",
    ),
    "evaluate": (lambda _: PublishedModel(NAME), "--model"),
    "library": (lambda _: VisionLanguageModel.from_pretrained(NAME), NAME),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_unknown_model_without_a_network_is_one_sentence_at_once(
    way, config, silent_hub, monkeypatch, tmp_path
):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    look, key = WAYS[way]
    started = time.monotonic()
    with pytest.raises(ConfigError) as raised:
        look(config)
    assert time.monotonic() - started < 10
    assert len(silent_hub) == 1
    said = str(raised.value)
    assert said.startswith(key)
    assert NAME in said
    assert "\n" not in said
    assert way == "library" or "the hub cannot be reached" in said


def test_a_hub_that_answers_is_asked_for_the_model(silent_hub, monkeypatch):
    monkeypatch.setattr(network, "HUB_ANSWERS_WITHIN", 10.0)
    assert network.hub_answers()
    assert not constants.HF_HUB_OFFLINE


@pytest.mark.parametrize(
    ("status", "answers"), [(200, True), (403, True), (404, True), (503, False)]
)
def test_a_hub_that_is_out_of_order_is_out_of_reach_and_a_closed_root_is_not(
    silent_hub, monkeypatch, status, answers
):
    class Session:
        def head(self, *_, **__):
            return SimpleNamespace(status_code=status)

    monkeypatch.setattr(network, "get_session", Session)
    assert network.hub_answers() == answers
    assert (not answers) == constants.HF_HUB_OFFLINE


def test_who_asked_for_no_network_is_told_so(silent_hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="not in the local cache, and HF_HUB_OFFLINE is set"):
        load_tokenizer(LanguageModelConfig(id=NAME))
    assert not silent_hub


def test_the_process_that_proves_an_export_does_not_wait_where_this_one_has(
    silent_hub, monkeypatch, tmp_path
):
    given = {}

    def run(*_, env, **__):
        given.update(env)
        (tmp_path / reloaded.FOUND).write_text(json.dumps({}))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(proof.subprocess, "run", run)
    proof._in_fresh_process(tmp_path)
    assert "HF_HUB_OFFLINE" not in given
    assert network.why_no_hub() == "the hub cannot be reached"
    proof._in_fresh_process(tmp_path)
    assert given["HF_HUB_OFFLINE"] == "1"
