"""Models of others behind our interface: their own losses and answers whatever the batch; and the
report.
"""

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from torch.nn import functional as F  # noqa: N812

from harness.config.schema import DataConfig, DecodingConfig, PromptsConfig
from harness.data.images import ImageDecoder
from harness.errors import ConfigError
from harness.evaluate.encoded_once import EncodedOnce
from harness.evaluate.image_use.evidence import WORST_FIRST
from harness.evaluate.published import PictureCollator, PublishedModel, evaluate_published
from harness.model.batch import Batch
from published_models import CHAT, tiny_blip2, tiny_instructblip, tiny_llava
from shards.read import Sample
from shards.record import Record
from shards.write import write_shards
from toy_runs import make_shards, picture, texts

MAKERS = {"blip-2": tiny_blip2, "instructblip": tiny_instructblip, "llava": tiny_llava}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("published")
    return {kind: make(root / f"tiny-{kind}") for kind, make in MAKERS.items()}


@pytest.fixture(scope="module", params=MAKERS)
def setting(request, folders):
    """A model of each class, and a batch of pictures of unequal sizes with texts of unequal
    lengths.
    """
    model = PublishedModel(str(folders[request.param]))
    decode = ImageDecoder(1, "whole", 10_000)
    samples = [
        Sample(
            Record(str(i), "toy", "test", str(i), texts(i)),
            picture(i, side=32 + 8 * i),
            "png",
            0,
            i,
        )
        for i in range(4)
    ]
    for sample in samples:
        sample.payload = decode(sample)
    return model, PictureCollator(
        model.tokenizer, DataConfig(), PromptsConfig(**model.settings["prompts"]), training=False
    )(samples)


def alone(model: PublishedModel, batch: Batch, context: int) -> dict[str, torch.Tensor]:
    """What the model's own processor makes of one context, without any padding."""
    pictures = model.bridge_tokens(batch).of([context])
    return model._inputs(pictures, [batch.contexts[context].prompt])


def test_the_loss_of_each_target_is_that_of_the_model_itself(setting):
    model, batch = setting
    assert len({picture.shape for picture in batch.pictures}) == 4
    found = model.loss(batch, model.bridge_tokens(batch))
    for target, context in enumerate(batch.context_of_T.tolist()):
        inputs = alone(model, batch, context)
        labels = batch.labels_TL[target][batch.weight_TL[target] > 0][None]
        count = labels.shape[1]
        if not model.encoder_decoder:
            before = inputs["input_ids"].shape[1]
            inputs["input_ids"] = torch.cat([inputs["input_ids"], labels], dim=1)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            labels = F.pad(labels, (before, 0), value=-100)
        with torch.no_grad():
            own = model.model(**inputs, labels=labels).loss.item() * count
        assert found.sum_T[target].item() == pytest.approx(own, rel=1e-4)
    assert found.weight_T.tolist() == batch.weight_TL.sum(dim=1).tolist()


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_and_the_chance_of_ending_at_once_do_not_depend_on_the_batch(setting, beams):
    model, batch = setting
    decoding = DecodingConfig(max_new_tokens=5, beams=beams)
    found = model.generate(batch, decoding, model.bridge_tokens(batch))
    assert len(set(found.texts)) > 1
    eos = model.tokenizer.eos_token_id
    for context in range(len(batch.contexts)):
        inputs = alone(model, batch, context)
        out = model.model.generate(**inputs, max_new_tokens=5, num_beams=beams, do_sample=False)[0]
        new = out if model.encoder_decoder else out[inputs["input_ids"].shape[1] :]
        assert found.texts[context] == model.tokenizer.decode(new, skip_special_tokens=True).strip()
        start = (
            {"decoder_input_ids": torch.zeros(1, 1, dtype=torch.long)}
            if model.encoder_decoder
            else {}
        )
        with torch.no_grad():
            first = model.model(**inputs, **start).logits[0, -1].softmax(dim=0)
        assert found.p_eos_first_C[context].item() == pytest.approx(first[eos].item(), rel=1e-3)


def test_a_picture_is_encoded_once_for_all_its_questions_answers_and_losses(setting, monkeypatch):
    model, batch = setting
    assert len(batch.contexts) > len(batch.pictures)
    tokens = model.bridge_tokens(batch)
    decoding = DecodingConfig(max_new_tokens=4)
    encoder = model._encoder
    encoder._known.clear()
    encoded = []
    forward = encoder._forward

    def counted(pixel_values, *given, **named):
        encoded.append(len(pixel_values))
        return forward(pixel_values, *given, **named)

    monkeypatch.setattr(encoder, "_forward", counted)
    said = model.generate(batch, decoding, tokens)
    lost = model.loss(batch, tokens)
    assert encoded == [1] * len(batch.pictures)
    monkeypatch.setattr(EncodedOnce, "__call__", lambda self, *given, **of: forward(*given, **of))
    again = model.generate(batch, decoding, tokens)
    assert said.texts == again.texts
    assert torch.allclose(said.p_eos_first_C, again.p_eos_first_C, atol=1e-5)
    assert torch.allclose(lost.sum_T, model.loss(batch, tokens).sum_T, rtol=1e-4)


def test_another_picture_is_what_an_exchange_of_tokens_shows(setting):
    model, batch = setting
    tokens = model.bridge_tokens(batch)
    exchanged = model.loss(batch, tokens.with_rows((batch.image_of_C + 1) % 4)).sum_T
    turned = type(tokens)(batch.pictures[1:] + batch.pictures[:1], batch.image_of_C)
    assert torch.equal(exchanged, model.loss(batch, turned).sum_T)
    assert not torch.allclose(exchanged, model.loss(batch, tokens).sum_T)


@pytest.mark.parametrize(
    "template", [None, CHAT, "{{ bos_token }}" + CHAT], ids=["none", "chat", "chat with BOS"]
)
def test_a_prompt_holds_the_picture_and_one_bos_with_any_chat_template_or_none(tmp_path, template):
    model = PublishedModel(str(tiny_llava(tmp_path / "llava", template)))
    ids = model._inputs([np.zeros((32, 32, 3), np.uint8)], ["is it red?"])["input_ids"][0].tolist()
    assert ids.count(model.model.config.image_token_id) == 16
    assert ids[0] == model.tokenizer.bos_token_id
    assert ids.count(ids[0]) == 1
    assert ("ASSISTANT:" in model.tokenizer.decode(ids)) == (template is not None)


def test_in_four_bits_it_answers_nearly_the_same_on_a_cpu(folders):
    whole, small = (PublishedModel(str(folders["llava"]), load_in_4bit=on) for on in (False, True))
    sample = Sample(Record("0", "toy", "test", "0", texts(0)), picture(0), "png", 0, 0)
    sample.payload = ImageDecoder(1, "whole", 10_000)(sample)
    batch = PictureCollator(small.tokenizer, DataConfig(), PromptsConfig(), training=False)(
        [sample]
    )
    from bitsandbytes.nn import Linear4bit

    assert any(isinstance(module, Linear4bit) for module in small.model.modules())
    losses = [model.loss(batch, model.bridge_tokens(batch)).sum.item() for model in (whole, small)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.5)
    assert (
        len(
            small.generate(
                batch, DecodingConfig(max_new_tokens=3), small.bridge_tokens(batch)
            ).texts
        )
        == 2
    )


def test_the_command_scores_two_models_on_the_same_images_in_one_table(
    folders, tmp_path, monkeypatch, harness
):
    shards = make_shards(tmp_path / "test", 40, "test")
    monkeypatch.chdir(tmp_path)
    named = [argument for kind in ("blip-2", "llava") for argument in ("--model", folders[kind])]
    short = [
        "--override",
        "generate.caption.max_new_tokens=2",
        "--override",
        "generate.vqa.max_new_tokens=2",
    ]
    code, out, _ = harness("evaluate", *named, "--data", shards, "--limit", 34, *short)
    assert code == 0
    header = next(line for line in out.splitlines() if line.startswith("| vqa"))
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "vqa",
        "tiny-blip-2",
        "tiny-llava",
    ]
    assert "vqa, tiny-llava: " in out
    folder = next((tmp_path / "runs" / "published").glob("*tiny-llava/toy_test+first-34+*"))
    report = json.loads((folder / "scores.json").read_text())
    assert (report["images"], report["step"], set(report["tasks"])) == (
        34,
        None,
        {"caption", "vqa"},
    )
    for task in report["tasks"].values():
        assert task["gate_images"] == 34
        assert task["verdict"].startswith(WORST_FIRST)
        assert {
            "true_loss_nats",
            "shuffled_loss_nats",
            "blank_loss_nats",
            "noise_loss_nats",
        } <= task.keys()
    assert report["tasks"]["vqa"]["accuracy"] is not None
    captions = json.loads((folder / "toy_test_captions.json").read_text())
    assert len({entry["image_id"] for entry in captions}) == 34


def test_beside_the_verdict_stands_what_shuffled_pictures_cost_and_why_no_patch_is_left_out(
    folders, tmp_path
):
    shards = make_shards(tmp_path / "test", 6, "test", captions=False)
    short = ["generate.vqa.max_new_tokens=2", "evaluation.bootstrap=20"]
    report = evaluate_published(
        str(folders["blip-2"]), [str(shards)], tmp_path / "out", overrides=short
    )
    beside = report["tasks"]["vqa"]["beside"]["toy_test"]
    assert beside["shuffled_tiles"]["images"] == 6
    assert beside["dropped_patches"] == {"missing": "the model shows no patches"}
    assert beside["neighbour_floor"] == {"missing": "the model has no features of its own"}


def test_what_cannot_be_evaluated_is_said_in_a_sentence(folders, tmp_path):
    images = [str(make_shards(tmp_path / "test", 4, "test"))]
    with pytest.raises(ConfigError, match="there is no instructblip-flan-t5-base; published are"):
        evaluate_published("Salesforce/instructblip-flan-t5-base", images)
    with pytest.raises(ConfigError, match="--data DIR"):
        evaluate_published(str(folders["llava"]), [])
    with pytest.raises(
        ConfigError,
        match=r"cannot be loaded \(no such folder.*\): give an image-text-to-text",
    ):
        evaluate_published(str(tmp_path / "nowhere"), images)
    with pytest.raises(
        ConfigError,
        match=r"override 'prompts\.vq=x': no key prompts\.vq; did you mean prompts\.vqa",
    ):
        evaluate_published(str(folders["llava"]), images, overrides=["prompts.vq=x"])
    broken = tiny_llava(tmp_path / "broken")
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    weights.pop(next(name for name in weights if "multi_modal_projector" in name))
    safetensors.torch.save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="it lacks 1 weights of a LlavaForConditionalGeneration"):
        evaluate_published(str(broken), images)
    row = (
        Record("0", "toy", "test", "0", texts(0)),
        safetensors.torch.save({"patches_PD": torch.zeros(1, 1)}),
        "safetensors",
    )
    write_shards(
        [row],
        tmp_path / "features",
        dataset="toy",
        split="test",
        kind="features",
        encoder={"kind": "clip"},
    )
    with pytest.raises(ConfigError, match="holds features: a published model needs images"):
        evaluate_published(str(folders["llava"]), [str(tmp_path / "features")])
