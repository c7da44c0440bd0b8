"""The language model's seam: a grouped batch gives what T5 itself gives row by row, and no more
work than that.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import T5Config, T5ForConditionalGeneration

import toy_batch
from harness.config.schema import DataConfig, DecodingConfig, LanguageModelConfig, PromptsConfig
from harness.data import collate as batches
from harness.data.collate import Collator
from harness.errors import ConfigError
from harness.model.bridge import BridgeOutput
from harness.model.language.t5 import T5Language, _scales_output


@pytest.fixture(scope="module")
def model(tiny_t5_folder):
    return toy_batch.model(tiny_t5_folder, tuning="full")


@pytest.fixture
def batch(model):
    return toy_batch.collator(model.tokenizer)(toy_batch.samples())


def by_t5_itself(model, batch):
    """The mean loss of T5's own forward over the unrolled batch, and the gradients."""
    flat = toy_batch.unrolled(batch)
    model.zero_grad(set_to_none=True)
    image, t5 = model.bridge_tokens(flat), model.lm.t5
    embeds = torch.cat([image.tokens_NQD, t5.shared(flat.prompt_ids_CL)], dim=1)
    seen = torch.ones(image.tokens_NQD.shape[:2], dtype=torch.bool)
    labels = flat.labels_TL.masked_fill(flat.weight_TL == 0, -100)
    loss = t5(
        inputs_embeds=embeds,
        attention_mask=torch.cat([seen, flat.prompt_mask_CL], dim=1),
        labels=labels,
    ).loss
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def test_the_batch_is_truly_grouped_and_padded(batch):
    assert (batch.images, len(batch.prompt_ids_CL), len(batch.labels_TL)) == (2, 5, 9)
    assert batch.context_of_T.tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 4]
    assert batch.image_of_C.tolist() == [0, 0, 0, 1, 1]
    assert not batch.prompt_mask_CL.all()
    assert not batch.weight_TL.all()


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_grouped_loss_and_gradients_equal_those_of_the_unrolled_batch_and_of_t5_itself(
    tiny_t5_folder, monkeypatch, tuning, apart
):
    monkeypatch.setattr(batches, "MIN_PADDING_SAVED", 1 if apart else 10**6)
    model = toy_batch.model(tiny_t5_folder, tuning=tuning)
    batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
    assert (len(batch.groups) > 2) == apart
    loss, grads = toy_batch.gradients(model, batch)
    for other_loss, other in (
        toy_batch.gradients(model, toy_batch.unrolled(batch)),
        by_t5_itself(model, batch),
    ):
        assert loss == pytest.approx(other_loss, abs=1e-6)
        assert toy_batch.furthest(grads, other) < 1e-5


def test_targets_of_like_length_are_decoded_together_unless_the_model_is_partitioned(
    model, monkeypatch
):
    monkeypatch.setattr(batches, "MIN_PADDING_SAVED", 1)
    batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
    shapes = []
    hook = model.lm.t5.decoder.register_forward_hook(
        lambda m, i, k, o: shapes.append(k["input_ids"].shape), with_kwargs=True
    )
    out = model.loss(batch)
    apart, length = sum(rows * columns for rows, columns in shapes), batch.labels_TL.shape[1]
    assert apart == (batch.weight_TL > 0).sum(), "rows of one length each: no padding is left"
    shapes.clear()
    model.lm.t5.lm_head.weight.ds_id = 0
    whole = model.loss(batch)
    del model.lm.t5.lm_head.weight.ds_id
    hook.remove()
    assert shapes == [(9, length)]
    assert torch.allclose(out.sum_T, whole.sum_T, atol=1e-5)


def test_keys_and_values_of_the_encoder_states_are_made_once_per_context(model, batch):
    seen = []
    attention = model.lm.t5.decoder.block[1].layer[1].EncDecAttention
    hooks = [
        m.register_forward_hook(lambda m, i, o: seen.append(len(o)))
        for m in (attention.k, attention.v)
    ]
    model.loss(batch)
    for hook in hooks:
        hook.remove()
    assert seen == [5, 5]


def test_activation_checkpointing_changes_no_gradient(tiny_t5_folder):
    for tuning in ("full", "lora"):
        plain, saving = (
            toy_batch.model(tiny_t5_folder, tuning=tuning, train={"activation_checkpointing": on})
            for on in (False, True)
        )
        assert saving.lm.t5.decoder.gradient_checkpointing
        assert not plain.lm.t5.decoder.gradient_checkpointing
        runs = []
        inner = saving.lm.t5.encoder.block[1].layer[0].SelfAttention.q
        inner.register_forward_hook(lambda *_: runs.append(1))  # noqa: B023
        keys, rows = saving.lm.t5.decoder.block[1].layer[1].EncDecAttention.k, []
        keys.register_forward_hook(lambda m, i, o: rows.append(len(o)))  # noqa: B023
        batch = toy_batch.collator(plain.tokenizer)(toy_batch.samples())
        (loss, grads), (saved_loss, saved) = (
            toy_batch.gradients(plain, batch),
            toy_batch.gradients(saving, batch),
        )
        assert len(runs) == 2, "the block was not run again in the backward pass: nothing was saved"
        assert rows == [9, 9], "checkpointing drops caches: none is to be made"
        assert loss == pytest.approx(saved_loss, abs=1e-6)
        assert toy_batch.furthest(grads, saved) < 1e-5


def test_logits_are_made_for_weighted_tokens_alone(model, batch):
    rows = []
    hook = model.lm.t5.lm_head.register_forward_hook(lambda m, i, o: rows.append(o.shape[0]))
    model.loss(batch)
    half = batch.weight_TL.clone()
    half[:4] = 0
    model.loss(replace(batch, weight_TL=half))
    hook.remove()
    assert rows == [int((batch.weight_TL > 0).sum()), int((half > 0).sum())]


def test_a_filler_gives_every_trainable_parameter_a_gradient_of_zeros(model):
    filler = toy_batch.collator(model.tokenizer).filler((toy_batch.TOKENS, toy_batch.WIDTH), True)
    for smoothing in (0.0, 0.1):
        model.label_smoothing = smoothing
        loss, grads = toy_batch.gradients(model, filler)
        assert loss == 0.0
        assert all(g is not None and not g.any() for g in grads.values()), [
            n for n, g in grads.items() if g is None
        ]
    model.label_smoothing = 0.0


def test_weights_scale_each_token_and_sums_are_given_per_target(model, batch):
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
    assert torch.allclose(again.sum_T, expected, atol=1e-5)
    assert not again.sum_T.requires_grad


def test_smoothing_is_that_of_cross_entropy_and_for_training_alone(model, batch):
    logits = {}
    hook = model.lm.t5.lm_head.register_forward_hook(lambda m, i, o: logits.update(now=o.detach()))
    model.label_smoothing = 0.2
    smoothed, plain = model.loss(batch), model.eval().loss(batch)
    hook.remove()
    model.label_smoothing = 0.0
    model.train()
    labels = batch.labels_TL[batch.weight_TL > 0]
    for out, smoothing in ((smoothed, 0.2), (plain, 0.0)):
        nats = F.cross_entropy(logits["now"], labels, reduction="sum", label_smoothing=smoothing)
        assert out.sum.item() == pytest.approx(nats.item(), rel=1e-5)


def test_a_longer_row_beside_them_does_not_change_the_loss_of_the_others(model, batch):
    record = toy_batch.records()[0]
    question = "is there a red shape in the picture? " * 4
    text = replace(
        record.texts[1],
        prompt=question,
        targets=("a man in a hat lays on the grass with his dogs",),
    )
    longer = replace(toy_batch.samples()[0], record=replace(record, texts=(text,)))
    both = toy_batch.collator(model.tokenizer)([*toy_batch.samples(), longer])
    assert both.labels_TL.shape[1] > batch.labels_TL.shape[1]
    assert both.prompt_ids_CL.shape[1] > batch.prompt_ids_CL.shape[1]
    assert torch.allclose(model.loss(both).sum_T[:9], model.loss(batch).sum_T, atol=1e-5)


def test_flan_t5s_own_output_matrix_is_read_and_its_output_not_scaled(tiny_t5_folder):
    """Flan-T5's file holds two matrices, and its config says so; transformers 5.23 says `tied` of
    it all the same.
    """
    from safetensors.torch import load_file

    file = load_file(tiny_t5_folder / "model.safetensors")
    language = T5Language(LanguageModelConfig(id=str(tiny_t5_folder), tuning="frozen"))
    assert torch.equal(language.t5.lm_head.weight, file["lm_head.weight"])
    assert torch.equal(language.t5.shared.weight, file["shared.weight"])
    assert not torch.equal(file["lm_head.weight"], file["shared.weight"])
    assert not _scales_output(language.t5.config)


def test_a_t5_of_version_1_is_tied_and_scales_its_output(tmp_path, tiny_t5_folder):
    shutil.copytree(tiny_t5_folder, tmp_path / "t5")
    torch.manual_seed(1)
    fields = json.loads((tmp_path / "t5" / "config.json").read_text()) | {
        "tie_word_embeddings": True
    }
    T5ForConditionalGeneration(T5Config(**fields)).save_pretrained(tmp_path / "t5")
    model = toy_batch.model(tmp_path / "t5", tuning="full")
    assert model.lm.t5.lm_head.weight is model.lm.t5.shared.weight
    assert _scales_output(model.lm.t5.config)
    batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
    (loss, grads), (expected, own) = toy_batch.gradients(model, batch), by_t5_itself(model, batch)
    assert loss == pytest.approx(expected, abs=1e-6)
    assert toy_batch.furthest(grads, own) < 1e-5


def test_the_switch_of_the_output_scale_is_found_under_either_name():
    """Up to transformers 5.17 `tie_word_embeddings` says it; since then `scale_decoder_outputs`,
    and all are `tied`.
    """
    assert not _scales_output(SimpleNamespace(tie_word_embeddings=False))
    assert _scales_output(SimpleNamespace(tie_word_embeddings=True))
    assert not _scales_output(
        SimpleNamespace(tie_word_embeddings=True, scale_decoder_outputs=False)
    )
    assert _scales_output(SimpleNamespace(tie_word_embeddings=True, scale_decoder_outputs=True))


def test_a_t5_of_unequal_depths_is_refused(tmp_path, tiny_t5_folder):
    """It trains, and fails inside transformers' cache when it generates."""
    shutil.copytree(tiny_t5_folder, tmp_path / "t5")
    fields = json.loads((tmp_path / "t5" / "config.json").read_text()) | {"num_decoder_layers": 1}
    (tmp_path / "t5" / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="1 decoder layers and 2 encoder layers"):
        T5Language(LanguageModelConfig(id=str(tmp_path / "t5"), tuning="frozen"))


# ---- generation ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def speaker(tiny_t5_folder):
    """A model whose answers differ: its weights are larger than those of a new one."""
    model = toy_batch.model(tiny_t5_folder, tuning="lora").eval()
    return model


def alone(model, batch, row: int):
    """The batch with one context and nothing of the padding."""
    length = int(batch.prompt_mask_CL[row].sum())
    return replace(
        batch,
        prompt_ids_CL=batch.prompt_ids_CL[row : row + 1, :length],
        prompt_mask_CL=batch.prompt_mask_CL[row : row + 1, :length],
        image_of_C=batch.image_of_C[row : row + 1],
        contexts=batch.contexts[row : row + 1],
    )


@pytest.mark.parametrize("beams", [1, 3])
def test_each_context_gets_the_answer_that_t5_gives_to_it_alone(speaker, beams):
    batch = toy_batch.collator(speaker.tokenizer)(toy_batch.samples())
    decoding = DecodingConfig(max_new_tokens=6, beams=beams)
    said = speaker.generate(batch, decoding)
    assert len(said.texts) == len(said.token_ids) == len(said.p_eos_first_C) == 5
    assert any(said.texts)
    for row in range(5):
        single = alone(speaker, batch, row)
        own = speaker.generate(single, decoding)
        assert own.token_ids == [said.token_ids[row]]
        assert own.texts == [said.texts[row]]
        image = speaker.bridge_tokens(single)
        t5 = speaker.lm.t5
        embeds = torch.cat(
            [image.tokens_NQD[image.token_row_of_C], t5.shared(single.prompt_ids_CL)], dim=1
        )
        with torch.no_grad():
            ids = t5.generate(
                inputs_embeds=embeds, max_new_tokens=6, num_beams=beams, do_sample=False
            )[0].tolist()
        assert [t for t in ids if t > 1] == said.token_ids[row]
        assert (
            said.texts[row]
            == speaker.tokenizer.decode(said.token_ids[row], skip_special_tokens=True).strip()
        )


def test_the_probability_of_ending_at_once_is_that_of_the_first_step(speaker):
    batch = toy_batch.collator(speaker.tokenizer)(toy_batch.samples())
    p_eos_C = speaker.generate(
        batch, DecodingConfig(max_new_tokens=2, min_new_tokens=2)
    ).p_eos_first_C
    for row in range(5):
        single = alone(speaker, batch, row)
        only_eos = replace(
            single,
            labels_TL=torch.tensor([[1]]),
            weight_TL=torch.ones(1, 1),
            context_of_T=torch.tensor([0]),
        )
        with torch.no_grad():
            assert p_eos_C[row].item() == pytest.approx(
                speaker.loss(only_eos).sum.neg().exp().item(), rel=1e-4
            )


def test_a_model_that_ends_at_once_says_nothing_unless_it_must(speaker):
    batch = toy_batch.collator(speaker.tokenizer)(toy_batch.samples())
    head = speaker.lm.t5.lm_head
    hook = head.register_forward_hook(lambda m, i, o: o.index_fill(-1, torch.tensor([1]), 50.0))
    silent = speaker.generate(batch, DecodingConfig(max_new_tokens=5))
    forced = speaker.generate(batch, DecodingConfig(max_new_tokens=5, min_new_tokens=3))
    hook.remove()
    assert silent.texts == [""] * 5
    assert silent.p_eos_first_C.min() > 0.99
    assert silent.token_ids == [[]] * 5
    assert all(len(ids) == 3 for ids in forced.token_ids)


def test_no_prompt_and_no_image_still_give_a_finite_loss_and_an_answer(speaker):
    nothing = Collator(speaker.tokenizer, DataConfig(), PromptsConfig(caption="none", vqa="none"))
    batch = nothing(toy_batch.samples())
    assert batch.prompt_mask_CL.sum(dim=1).tolist()[0] == 0, (
        "the prompt `none` has no token, not even EOS"
    )
    image = speaker.bridge_tokens(batch)
    for tokens in (image, image.without_tokens()):
        with torch.no_grad():
            assert speaker.loss(batch, tokens).sum_T.isfinite().all()
            _, mask_CS = speaker.lm.encode(tokens, batch)
            assert mask_CS.any(dim=1).all(), "an attention over nothing is undefined"
        assert len(speaker.generate(batch, DecodingConfig(max_new_tokens=3), tokens).texts) == 5
    blind = BridgeOutput(torch.zeros(1, 0, 64), torch.zeros(5, dtype=torch.long))
    with torch.no_grad():
        assert torch.equal(
            speaker.loss(batch, blind).sum_T, speaker.loss(batch, image.without_tokens()).sum_T
        )
        assert not torch.allclose(
            speaker.loss(batch, blind).sum_T, speaker.loss(batch, image).sum_T
        )
        # A context with nothing in it is the same whether longer prompts stand beside it or not.
        captions = replace(
            toy_batch.samples()[0],
            record=replace(toy_batch.records()[0], texts=toy_batch.records()[0].texts[:1]),
        )
        short = nothing([captions])
        beside = speaker.loss(batch, image.without_tokens()).sum_T[:5]
        assert torch.allclose(
            speaker.loss(short, speaker.bridge_tokens(short).without_tokens()).sum_T,
            beside,
            atol=1e-4,
        )
