"""Texts without a picture in a batch with others: each context is learnt and answered as in a batch
of its own kind, and what stands in place of a picture changes nothing.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch

import toy_batch
from harness.config.schema import DecodingConfig, PromptsConfig
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from shards.read import Sample
from shards.record import Record, Text
from toy_batch import BRIDGES, LANGUAGES

EACH = [(kind, "qformer") for kind in LANGUAGES] + [("t5", bridge) for bridge in BRIDGES][1:]
TEXTS = (
    Text("t0", "vqa", ("four",), "what is two and two, and what would be more than that?"),
    Text("t1", "caption", ("a sentence that nobody sees", "another")),
    Text("t2", "vqa", ("no",), "is it red?"),
)


@pytest.fixture(params=EACH, ids=" ".join)
def model(request, tiny_t5_folder, tiny_gpt2_folder):
    kind, bridge = request.param
    folder = tiny_t5_folder if kind == "t5" else tiny_gpt2_folder
    return toy_batch.opened(toy_batch.model(folder, bridge=BRIDGES[bridge], **LANGUAGES[kind]))


def alone(places=range(3)) -> list[Sample]:
    """Records of one text each, without a picture."""
    records = [Record(f"t{n}", "words", "train", f"t{n}", (TEXTS[n],), False) for n in places]
    return [Sample(record, None, "", 1, n) for n, record in enumerate(records)]


def pictured() -> list[Sample]:
    return toy_batch.samples()


def mixed() -> list[Sample]:
    first, second = pictured()
    return [alone()[0], first, alone()[1], second, alone()[2]]


def collated(model, samples, **prompts) -> Batch:
    found = toy_batch.collator(model.tokenizer, prompts=PromptsConfig(**prompts))(samples)
    assert found is not None
    return found


def by_text(batch: Batch, values_T) -> dict[str, list[float]]:
    """Values of targets, by the text they belong to."""
    found: dict[str, list[float]] = {}
    for name, value in zip(batch.text_ids_T, values_T.tolist(), strict=True):
        found.setdefault(name, []).append(value)
    return found


def test_contexts_without_a_picture_point_at_none(model):
    batch = collated(model, mixed())
    assert batch.image_of_C.tolist() == [-1, 0, 0, 0, -1, 1, 1, -1]
    assert (batch.images, collated(model, alone()).images) == (2, 0)
    asked = toy_batch.collator(model.tokenizer).asked(mixed())
    assert asked.image_of_C.tolist() == batch.image_of_C.tolist()


@pytest.mark.parametrize("caption", ["describe", "none"])  # "none": nothing at all before a caption
def test_losses_and_gradients_of_a_mixed_batch_are_those_of_its_parts(model, caption):
    parts = [collated(model, samples, caption=caption) for samples in (pictured(), alone())]
    batch = collated(model, mixed(), caption=caption)
    found = by_text(batch, model.loss(batch).sum_T)
    expected = {name: sums for p in parts for name, sums in by_text(p, model.loss(p).sum_T).items()}
    assert found.keys() == expected.keys()
    for name, sums in expected.items():
        assert found[name] == pytest.approx(sums, rel=1e-6, abs=1e-5), name
    one = unscaled_gradients(model, [batch])
    assert toy_batch.furthest(one, unscaled_gradients(model, parts)) < 1e-5


def unscaled_gradients(model, batches) -> dict[str, torch.Tensor]:
    model.zero_grad(set_to_none=True)
    for batch in batches:
        model(batch).sum.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def test_texts_alone_are_read_as_by_a_model_that_is_shown_no_image_token(model):
    batch = collated(model, alone())
    without = model.bridge_tokens(batch).without_tokens()
    assert model.loss(batch).sum_T.tolist() == pytest.approx(
        model.loss(batch, without).sum_T.tolist(), rel=1e-6, abs=1e-5
    )


def test_every_trained_part_has_a_gradient_and_that_of_the_bridge_is_zero(model):
    loss, grads = toy_batch.gradients(model, collated(model, alone()))
    assert loss > 0
    assert None not in grads.values()
    for name, grad in grads.items():
        assert grad.isfinite().all(), name
        if name.startswith("bridge."):
            assert not grad.any(), name
    assert any(grad.any() for grad in grads.values())


def test_another_filler_changes_nothing(model, monkeypatch):
    found = []
    for scale in (0.0, 50.0):
        filler = scale * torch.randn(1, toy_batch.TOKENS, toy_batch.WIDTH)
        monkeypatch.setattr(
            model, "_with_filler", lambda b, filler=filler: replace(b, features_IPD=filler)
        )
        found.append(toy_batch.gradients(model, collated(model, alone())))
    (loss, grads), (other_loss, others) = found
    assert loss == other_loss
    for name, grad in grads.items():
        assert torch.equal(grad, others[name]), name


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_of_a_mixed_batch_are_those_of_its_parts(model, beams):
    model.eval()
    decoding = DecodingConfig(max_new_tokens=4, beams=beams)

    def answered(samples) -> dict[str, tuple]:
        batch = collated(model, samples)
        said = model.generate(batch, decoding)
        ids = [context.text.id for context in batch.contexts]
        return dict(
            zip(ids, zip(said.token_ids, said.p_eos_first_C.tolist(), strict=True), strict=True)
        )

    expected = answered(pictured()) | answered(alone())
    found = answered(mixed())
    assert {name: said[0] for name, said in found.items()} == {
        name: said[0] for name, said in expected.items()
    }
    for name, said in expected.items():
        assert found[name][1] == pytest.approx(said[1], abs=1e-5), name


def test_activations_that_are_checkpointed_change_nothing(model):
    batch = collated(model, mixed())
    loss, grads = toy_batch.gradients(model, batch)
    model.checkpoint_activations()
    again, others = toy_batch.gradients(model, batch)
    assert again == pytest.approx(loss, abs=1e-6)
    assert toy_batch.furthest(grads, others) < 1e-5


def test_a_model_with_an_encoder_runs_it_on_a_filler_as_on_a_picture(
    tiny_t5_folder, tiny_clip_folder
):
    """Every rank of a partitioned model asks for the encoder's weights alike."""
    config = toy_batch.config(tiny_t5_folder)
    vision = config.model.vision.model_copy(update={"id": str(tiny_clip_folder), "image_size": 32})
    parts = config.model.model_copy(update={"vision": vision})
    built = VisionLanguageModel.build(config.model_copy(update={"model": parts})).train()
    ran = []
    for module in built.modules():
        module.register_forward_hook(lambda m, i, o: ran.append(m))
    built(collated(built, alone()))
    texts_alone = list(ran)
    ran.clear()
    images = pictured()
    for sample in images:
        sample.payload = np.zeros((32, 32, 3), np.uint8)
    batch = collated(built, images)
    built(replace(batch, groups=()))
    assert texts_alone == ran
