"""A sound tiny model learns its images by heart; one that cannot names the part without a
signal.
"""

import pytest
import torch
from test_examine import a_set, changed, question

from harness.doctor.overfit import Result, Signal, findings, one_text_each, overfit
from harness.errors import ConfigError
from harness.model.vlm import VisionLanguageModel
from shards.read import Sample
from shards.record import Record, Text
from toy_runs import make_config

PATIENCE = 3600.0  # seconds: the number of steps decides, not how busy the machine is


@pytest.fixture(scope="module")
def base(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    root = tmp_path_factory.mktemp("overfit")
    return changed(make_config(root, tiny_clip_folder, tiny_t5_folder), model__lm__tuning="full")


def lines(result: Result) -> dict[str, tuple[str, str]]:
    return {
        finding.name: (finding.state, finding.found + finding.fix) for finding in findings(result)
    }


def test_a_sound_model_learns_its_images_by_heart(base):
    result = overfit(base, 4, seconds=PATIENCE)
    assert result.exact == result.images == 4
    assert result.last_loss < 0.2 < result.first_loss
    assert result.shuffled_loss > result.last_loss + 0.1
    said = lines(result)
    assert [state for state, _ in said.values()] == ["OK"] * 4
    assert list(said) == [
        "overfit: bridge",
        "overfit: projection",
        "overfit: language model",
        "overfit 4",
    ]
    assert "learnt by heart: 4 of 4" in said["overfit 4"][1]


def test_a_bridge_cut_off_from_the_language_model_is_named(base, monkeypatch):
    tokens = VisionLanguageModel.bridge_tokens

    def cut(model, batch):
        made = tokens(model, batch)
        return type(made)(made.tokens_NQD.detach(), made.token_row_of_C)

    monkeypatch.setattr(VisionLanguageModel, "bridge_tokens", cut)
    result = overfit(base, 4, steps=3, seconds=PATIENCE)
    said = lines(result)
    assert said["overfit: language model"][0] == "OK"
    for part in ("bridge", "projection"):
        state, words = said[f"overfit: {part}"]
        assert state == "error"
        assert "gets no signal: no gradient at all" in words
        assert "moved by 0.00%" in words
    assert "what cuts off the bridge and the projection" in said["overfit 4"][1]


def test_where_nothing_reaches_the_loss_no_step_is_taken(base, monkeypatch):
    monkeypatch.setattr(
        VisionLanguageModel, "forward", lambda model, batch: torch.no_grad()(model.loss)(batch)
    )
    result = overfit(base, 2, seconds=PATIENCE)
    assert result.steps == 0
    assert all(signal.silent for signal in result.signals)


def test_texts_that_the_words_tell_apart_are_learnt_without_the_images(base, tmp_path, monkeypatch):
    tokens = VisionLanguageModel.bridge_tokens

    def all_alike(model, batch):
        made = tokens(model, batch)
        alike_NQD = made.tokens_NQD.mean(dim=0, keepdim=True).expand_as(made.tokens_NQD)
        return type(made)(alike_NQD, made.token_row_of_C)

    monkeypatch.setattr(VisionLanguageModel, "bridge_tokens", all_alike)
    asked = [[question(f"is it {word}?", word)] for word in ("red", "green", "blue", "dark")]
    config = changed(base, data__train=a_set(tmp_path / "told", *asked))
    state, words = lines(overfit(config, 4, seconds=PATIENCE))["overfit 4"]
    assert (state, "learnt by heart without the images" in words) == ("warning", True)


def test_images_that_make_no_difference_are_named_where_the_words_do_not_suffice(base):
    result = Result(4, 9, 4.0, 1.39, 1.40, exact=1, signals=())
    state, words = lines(result)["overfit 4"]
    assert (state, "the images make no difference" in words) == ("error", True)


def test_what_is_not_learnt_in_time_is_an_error(base):
    result = overfit(base, 4, steps=1, seconds=PATIENCE)
    state, words = lines(result)["overfit 4"]
    assert state == "error"
    assert words.startswith("not learnt by heart: 0 of 4 answered word for word after 1 steps")


def test_lora_has_a_signal_although_half_of_it_starts_at_zero(base):
    config = changed(base, model__lm__tuning="qlora", train__label_smoothing=0.1)
    result = overfit(config, 2, steps=2, seconds=PATIENCE)
    assert [signal.name for signal in result.signals] == ["bridge", "projection", "LoRA"]
    assert not any(signal.silent for signal in result.signals)
    assert all(signal.moved > 0 for signal in result.signals)


def test_nothing_keeps_a_text_from_being_learnt(base, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "harness.doctor.overfit.calibrate", lambda model, config: seen.append(config)
    )
    random = {
        "model__bridge__dropout": 0.5,
        "model__lm__lora__dropout": 0.5,
        "data__last_batch": "drop",
    }
    regular = {
        "train__label_smoothing": 0.5,
        "train__weight_decay": 0.5,
        "data__texts_per_image": 1,
    }
    overfit(changed(base, **random, **regular), 20, steps=0)
    (config,) = seen
    assert config.model.bridge.dropout == config.model.lm.lora.dropout == 0
    assert config.train.label_smoothing == config.train.weight_decay == 0
    assert (config.train.global_batch, config.data.last_batch, config.data.texts_per_image) == (
        20,
        "short",
        None,
    )


def test_nothing_trainable_is_refused(base):
    with pytest.raises(ConfigError, match="both frozen"):
        overfit(changed(base, model__lm__tuning="frozen", model__bridge__trainable=False), 2)


def test_a_gradient_too_small_for_adamw_is_no_signal():
    assert Signal("bridge", 10_000, 0.9e-6, 1.0, 0.0).silent
    assert not Signal("bridge", 10_000, 1.1e-6, 1.0, 0.0).silent
    assert Signal("bridge", 10_000, 0.0, 1.0, 0.0).silent
    assert Signal("bridge", 10_000, float("nan"), 1.0, 0.0).silent


def test_each_image_gets_the_question_that_most_share_and_another_caption_than_the_others():
    def sample(index: int, *texts: Text, payload=b"") -> Sample:
        return Sample(
            Record(str(index), "toy", "train", str(index), texts), payload, "png", 0, index
        )

    captions = Text("c", "caption", ("a dog", "a cat"))
    chosen = one_text_each(
        [sample(0, captions), sample(1, captions), sample(2, captions, payload=None)]
    )
    assert [one.record.texts[0].targets for one in chosen] == [("a dog",), ("a cat",)]
    shared = question("what is it?", "a dog")
    chosen = one_text_each(
        [
            sample(n, question(f"is it {n}?", "yes", "own"), question("what is it?", f"{n}"))
            for n in range(3)
        ]
        + [sample(3, shared)]
    )
    assert [one.record.texts[0].prompt for one in chosen] == ["what is it?"] * 4
    assert [one.record.texts[0].targets for one in chosen] == [("0",), ("1",), ("2",), ("a dog",)]
