"""What every language model keeps to: a grouped batch gives what the model of transformers itself
gives row by row, and no more work than that; a saved model is the same model.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F  # noqa: N812

import toy_batch
from harness.config.schema import Config, DecodingConfig, PromptsConfig
from harness.data import collate as batches
from harness.model.bridge import BridgeOutput
from harness.model.vlm import VisionLanguageModel
from toy_batch import moved, outputs, pixel_batch, same

KINDS: dict[str, dict[str, Any]] = {
    "t5": {},
    "gpt2": {"kind": "gpt2"},
    "gpt2 with cross-attention": {"kind": "gpt2", "cross_attention": True},
}
GROUPED = [(kind, "always", least) for kind in KINDS for least in (1, 10**6)] + [
    (kind, "generation_only", 1) for kind in KINDS if kind != "t5"
]


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def settings(kind, tiny_t5_folder, tiny_gpt2_folder):
    """The keys of `model.lm` by which the kind is loaded."""
    return KINDS[kind] | {"id": str(tiny_t5_folder if kind == "t5" else tiny_gpt2_folder)}


@pytest.fixture
def built(settings):
    """A function: keys of `model.lm` and settings of toy_batch.config -> a model in train mode."""
    return lambda **keys: toy_batch.opened(toy_batch.model(settings["id"], **settings | keys))


@pytest.fixture
def close(kind):
    """How near losses come that are summed in another order."""
    return 1e-6 if kind == "t5" else 1e-5


def batch_of(model, **prompts):
    collator = toy_batch.collator(model.tokenizer, prompts=PromptsConfig(**prompts))
    return collator(toy_batch.samples())


def by_itself(model, batch, kind, bos):
    """The mean loss of the model's own forward, and the gradients."""
    model.zero_grad(set_to_none=True)
    loss = toy_batch.loss_of_t5(model, batch) if kind == "t5" else _of_gpt2(model, batch, bos)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def _of_gpt2(model, batch, bos):
    total = 0.0
    for target in range(len(batch.labels_TL)):
        labels = batch.labels_TL[target][batch.weight_TL[target] > 0]
        context = int(batch.context_of_T[target])
        inputs, before = read_by_gpt2(model, batch, context, labels, bos == "always")
        logits = model.lm.base(**inputs).logits[0, before - 1 : -1]
        total = total + F.cross_entropy(logits, labels, reduction="sum")
    return total / batch.weight


def read_by_gpt2(model, batch, context: int, labels, bos: bool) -> tuple[dict, int]:
    """What GPT-2 itself reads for one target, without any padding, and how many positions stand
    before its labels.
    """
    gpt2 = model.lm.base
    prompt = batch.prompt_ids_CL[context][batch.prompt_mask_CL[context]]
    start = torch.tensor([model.tokenizer.bos_token_id] * bos, dtype=torch.long)
    embeds = gpt2.transformer.wte(torch.cat([prompt, start, labels]))
    image = model.bridge_tokens(batch)
    tokens = image.tokens_NQD[image.token_row_of_C[context]]
    before = len(prompt) + len(start)
    if gpt2.config.add_cross_attention:
        return {"inputs_embeds": embeds[None], "encoder_hidden_states": tokens[None]}, before
    return {"inputs_embeds": torch.cat([tokens, embeds])[None]}, before + len(tokens)


# ---- the loss ------------------------------------------------------------------------------------


def test_the_batch_is_truly_grouped_and_padded(built):
    batch = batch_of(built())
    assert (batch.images, len(batch.prompt_ids_CL), len(batch.labels_TL)) == (2, 5, 9)
    assert batch.context_of_T.tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4]
    assert batch.image_of_C.tolist() == [0, 0, 0, 1, 1]
    assert not batch.prompt_mask_CL.all()
    assert not batch.weight_TL.all()


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("kind", "bos", "least"), GROUPED)
def test_grouped_loss_and_gradients_equal_those_of_the_unrolled_batch_and_of_the_model_itself(
    built, close, monkeypatch, tuning, kind, bos, least
):
    monkeypatch.setattr(batches, "MIN_PADDING_SAVED", least)
    model = built(tuning=tuning, bos=bos)
    batch = batch_of(model)
    assert (len(batch.groups) > 2) == (least == 1)
    loss, grads = toy_batch.gradients(model, batch)
    for other_loss, other in (
        toy_batch.gradients(model, toy_batch.unrolled(batch)),
        by_itself(model, batch, kind, bos),
    ):
        assert loss == pytest.approx(other_loss, abs=close)
        assert toy_batch.furthest(grads, other) < 1e-5


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_activation_checkpointing_changes_no_gradient(built, kind, close, tuning):
    plain = built(tuning=tuning)
    saving = built(tuning=tuning, train={"activation_checkpointing": True})
    encoder_runs, decoder_rows = [], []
    if kind == "t5":
        assert saving.lm.t5.decoder.gradient_checkpointing
        assert not plain.lm.t5.decoder.gradient_checkpointing
        inner = saving.lm.t5.encoder.block[1].layer[0].SelfAttention.q
        inner.register_forward_hook(lambda *_: encoder_runs.append(1))
        watched = saving.lm.t5.decoder.block[1].layer[1].EncDecAttention.k
    else:
        watched = saving.lm.base.transformer.h[1].ln_1
    watched.register_forward_hook(lambda m, i, o: decoder_rows.append(len(o)))
    batch = batch_of(plain)
    loss, grads = toy_batch.gradients(plain, batch)
    saved_loss, saved = toy_batch.gradients(saving, batch)
    assert len(encoder_runs) == (2 if kind == "t5" else 0), (
        "the block was not run again in the backward pass: nothing was saved"
    )
    rows = 9 if kind == "t5" else 2  # packed: a picture's contexts in one
    assert decoder_rows == [rows, rows], "run again backwards, without the cache that it drops"
    assert loss == pytest.approx(saved_loss, abs=close)
    assert toy_batch.furthest(grads, saved) < 1e-5
    with torch.no_grad():
        assert saving.eval().loss(batch).sum.item() == pytest.approx(
            plain.eval().loss(batch).sum.item(), rel=1e-5
        )


def test_logits_are_made_for_weighted_tokens_alone(built):
    model = built(tuning="full")
    batch, rows = batch_of(model), []
    model.lm.base.lm_head.register_forward_hook(lambda m, i, o: rows.append(o.shape[0]))
    model.loss(batch)
    half = batch.weight_TL.clone()
    half[:4] = 0
    model.loss(replace(batch, weight_TL=half))
    assert rows == [int((batch.weight_TL > 0).sum()), int((half > 0).sum())]


def test_a_filler_gives_every_trainable_parameter_a_gradient_of_zeros(built):
    model = built(tuning="full")
    filler = toy_batch.collator(model.tokenizer).filler((toy_batch.TOKENS, toy_batch.WIDTH), True)
    assert filler.labels_TL.shape == (1, 1)
    for smoothing in (0.0, 0.1):
        model.label_smoothing = smoothing
        loss, grads = toy_batch.gradients(model, filler)
        assert loss == 0.0
        assert all(g is not None and not g.any() for g in grads.values()), [
            n for n, g in grads.items() if g is None
        ]


def test_weights_scale_each_token_and_sums_are_given_per_target(built, close):
    model = built(tuning="full")
    batch = batch_of(model)
    out = model.loss(batch)
    assert out.sum_T.sum().item() == pytest.approx(out.sum.item(), rel=1e-6)
    assert torch.equal(out.weight_T, batch.weight_TL.sum(dim=1))
    assert out.weight == batch.weight_TL.sum()
    weight = batch.weight_TL.clone()
    weight[3] *= 2.5
    weight[5] = 0
    again = model.loss(replace(batch, weight_TL=weight))
    expected = out.sum_T.clone()
    expected[3] *= 2.5
    expected[5] = 0
    assert torch.allclose(again.sum_T, expected, atol=10 * close)
    assert again.sum.item() == pytest.approx(expected.sum().item(), rel=1e-5)
    assert not again.sum_T.requires_grad


def test_smoothing_is_that_of_cross_entropy_and_for_training_alone(built):
    model, logits = built(tuning="full"), {}
    batch = batch_of(model)
    model.lm.base.lm_head.register_forward_hook(lambda m, i, o: logits.update(now=o.detach()))
    model.label_smoothing = 0.2
    smoothed, plain = model.loss(batch), model.eval().loss(batch)
    labels = batch.labels_TL[batch.weight_TL > 0]
    for out, smoothing in ((smoothed, 0.2), (plain, 0.0)):
        nats = F.cross_entropy(logits["now"], labels, reduction="sum", label_smoothing=smoothing)
        assert out.sum.item() == pytest.approx(nats.item(), rel=1e-5)


def test_a_longer_row_beside_them_does_not_change_the_loss_of_the_others(built, close):
    model = built(tuning="full")
    batch, record = batch_of(model), toy_batch.records()[0]
    text = replace(
        record.texts[1],
        prompt="is there a red shape in the picture? " * 4,
        targets=("a man in a hat lays on the grass with his dogs",),
    )
    longer = replace(toy_batch.samples()[0], record=replace(record, texts=(text,)))
    both = toy_batch.collator(model.tokenizer)([*toy_batch.samples(), longer])
    assert both.labels_TL.shape[1] > batch.labels_TL.shape[1]
    assert both.prompt_ids_CL.shape[1] > batch.prompt_ids_CL.shape[1]
    assert torch.allclose(model.loss(both).sum_T[:9], model.loss(batch).sum_T, atol=10 * close)


def test_no_prompt_and_no_image_still_give_a_finite_loss_and_an_answer(built, kind):
    bos = "always" if kind == "t5" else "generation_only"
    model = built(bos=bos).eval()
    batch = batch_of(model, caption="none", vqa="none")
    assert batch.prompt_mask_CL.sum(dim=1).tolist()[0] == 0, (
        "the prompt `none` has no token, not even EOS"
    )
    image = model.bridge_tokens(batch)
    for tokens in (image, image.without_tokens()):
        with torch.no_grad():
            assert model.loss(batch, tokens).sum_T.isfinite().all()
            if kind == "t5":
                _, mask_CS = model.lm.encode(tokens, batch)
                assert mask_CS.any(dim=1).all(), "an attention over nothing is undefined"
            else:
                _, mask_CS = model.lm._prefix(tokens, batch)
                assert mask_CS[:, -1].all(), "an attention over nothing is undefined"
        assert len(model.generate(batch, DecodingConfig(max_new_tokens=3), tokens).texts) == 5
    blind = BridgeOutput(torch.zeros(1, 0, 64), torch.zeros(5, dtype=torch.long))
    with torch.no_grad():
        # of other rows, where they are packed
        assert torch.allclose(
            model.loss(batch, blind).sum_T,
            model.loss(batch, image.without_tokens()).sum_T,
            rtol=0 if kind == "t5" else 1e-5,
            atol=0,
        )
        assert not torch.allclose(model.loss(batch, blind).sum_T, model.loss(batch, image).sum_T)
        # A context with nothing in it is the same whether longer prompts stand beside it or not.
        captions = replace(
            toy_batch.samples()[0],
            record=replace(toy_batch.records()[0], texts=toy_batch.records()[0].texts[:1]),
        )
        nothing = PromptsConfig(caption="none", vqa="none")
        short = toy_batch.collator(model.tokenizer, prompts=nothing)([captions])
        beside = model.loss(batch, image.without_tokens()).sum_T[:5]
        alone = model.loss(short, model.bridge_tokens(short).without_tokens()).sum_T
        assert torch.allclose(alone, beside, atol=1e-4)


# ---- generation ----------------------------------------------------------------------------------


def alone(batch, row: int):
    """The batch with one context and nothing of the padding."""
    length = int(batch.prompt_mask_CL[row].sum())
    return replace(
        batch,
        prompt_ids_CL=batch.prompt_ids_CL[row : row + 1, :length],
        prompt_mask_CL=batch.prompt_mask_CL[row : row + 1, :length],
        image_of_C=batch.image_of_C[row : row + 1],
        contexts=batch.contexts[row : row + 1],
    )


def inputs_of(model, single, kind) -> dict:
    """What the model of transformers itself reads before it answers."""
    if kind != "t5":
        inputs, _ = read_by_gpt2(model, single, 0, torch.tensor([], dtype=torch.long), True)
        return inputs | {"pad_token_id": model.tokenizer.eos_token_id}
    image = model.bridge_tokens(single)
    words = model.lm.t5.shared(single.prompt_ids_CL)
    return {"inputs_embeds": torch.cat([image.tokens_NQD[image.token_row_of_C], words], dim=1)}


@pytest.mark.parametrize("beams", [1, 3])
def test_each_context_gets_the_answer_that_the_model_itself_gives_to_it_alone(built, kind, beams):
    model = built(tuning="lora").eval()
    batch = batch_of(model)
    decoding = DecodingConfig(max_new_tokens=6, beams=beams)
    answers = model.generate(batch, decoding)
    assert len(answers.texts) == len(answers.token_ids) == len(answers.p_eos_first_C) == 5
    assert any(answers.texts)
    assert kind == "t5" or len({tuple(ids) for ids in answers.token_ids}) > 2
    tokenizer = model.tokenizer
    silent = {0, tokenizer.eos_token_id} if kind == "t5" else {tokenizer.eos_token_id}
    for row in range(5):
        single = alone(batch, row)
        own = model.generate(single, decoding)
        assert own.token_ids == [answers.token_ids[row]]
        assert own.texts == [answers.texts[row]]
        with torch.no_grad():
            ids = model.lm.base.generate(
                **inputs_of(model, single, kind),
                max_new_tokens=6,
                num_beams=beams,
                do_sample=False,
            )[0].tolist()
        assert [t for t in ids if t not in silent] == answers.token_ids[row]
        assert (
            answers.texts[row]
            == tokenizer.decode(answers.token_ids[row], skip_special_tokens=True).strip()
        )


def test_the_probability_of_ending_at_once_is_that_of_the_first_step(built, kind):
    model = built(tuning="lora").eval()
    batch, eos = batch_of(model), model.tokenizer.eos_token_id
    decoding = DecodingConfig(max_new_tokens=2, min_new_tokens=2)
    p_eos_C = model.generate(batch, decoding).p_eos_first_C
    for row in range(5):
        single = alone(batch, row)
        only_eos = replace(
            single,
            labels_TL=torch.tensor([[eos]]),
            weight_TL=torch.ones(1, 1),
            context_of_T=torch.tensor([0]),
        )
        with torch.no_grad():
            assert p_eos_C[row].item() == pytest.approx(
                model.loss(only_eos).sum.neg().exp().item(), rel=1e-4
            )
            if kind != "t5":
                inputs = inputs_of(model, single, kind)
                del inputs["pad_token_id"]
                first = model.lm.base(**inputs).logits[0, -1].softmax(dim=-1)
                assert p_eos_C[row].item() == pytest.approx(first[eos].item(), rel=1e-4)


def test_a_model_that_ends_at_once_says_nothing_unless_it_must(built):
    model = built(tuning="lora").eval()
    batch, eos = batch_of(model), torch.tensor([model.tokenizer.eos_token_id])
    model.lm.base.lm_head.register_forward_hook(lambda m, i, o: o.index_fill(-1, eos, 90.0))
    silent = model.generate(batch, DecodingConfig(max_new_tokens=5))
    forced = model.generate(batch, DecodingConfig(max_new_tokens=5, min_new_tokens=3))
    assert silent.texts == [""] * 5
    assert silent.p_eos_first_C.min() > 0.99
    assert silent.token_ids == [[]] * 5
    assert all(len(ids) == 3 for ids in forced.token_ids)


# ---- saving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tuning", ["qlora", "lora", "frozen", "full"])
def test_a_saved_model_is_the_same_model_bit_for_bit(settings, tiny_clip_folder, tmp_path, tuning):
    parts = {
        "vision": {"id": str(tiny_clip_folder), "image_size": 32},
        "bridge": {"query_tokens": 3, "layers": 1, "width": 32, "heads": 4},
        "lm": settings | {"tuning": tuning, "lora": {"r": 4}},
    }
    model = moved(VisionLanguageModel.build(Config(name="saved", model=parts)))
    batch = pixel_batch(model)
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert not again.training
    assert same(outputs(again, batch), expected)
