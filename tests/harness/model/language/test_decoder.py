"""GPT-2 at the seam: a grouped batch gives what GPT-2 itself gives row by row, and no more work
than that; and the labels that make it fall silent.
"""

from dataclasses import replace

import pytest
import torch
from transformers.pytorch_utils import Conv1D

import toy_batch
from harness.config.schema import DecodingConfig, LanguageModelConfig
from harness.errors import ConfigError
from harness.machine.precision import choose
from harness.model.bridge import BridgeOutput
from harness.model.language import quantise
from harness.model.language.decoder import DecoderLanguage
from harness.model.language.t5 import T5Language
from harness.model.vlm import VisionLanguageModel
from harness.plan.skeleton import Skeleton, weights
from harness.plan.workload import Sizes
from harness.train.guards import GradientGuard, frozen_hash
from plan_cases import measured_saved

TUNINGS = ("qlora", "lora", "frozen", "full")


def built(folder, *, opened: bool = True, **lm):
    """In train mode; `opened`: with cross-attention that lets something through, as after some
    training.
    """
    model = toy_batch.model(folder, kind="gpt2", **lm)
    return toy_batch.opened(model) if opened else model


def batch_of(model, **data):
    return toy_batch.collator(model.tokenizer, **data)(toy_batch.samples())


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cross_attention", [False, True])
def test_what_stands_before_the_targets_runs_once_per_context_and_images_are_read_once(
    tiny_gpt2_folder, cross_attention
):
    model = built(tiny_gpt2_folder, tuning="full", cross_attention=cross_attention)
    block, rows = model.lm.base.transformer.h[1], {"words": [], "images": []}
    block.attn.c_attn.register_forward_hook(
        lambda m, i, o: rows["words"].append(tuple(o.shape[:2]))
    )
    if cross_attention:
        block.crossattention.c_attn.register_forward_hook(
            lambda m, i, o: rows["images"].append(len(o))
        )
    batch = batch_of(model)
    model.loss(batch)
    packed = batch.packed(True, True)
    told = batch.prompt_mask_CL.sum(dim=1) + 1  # with BOS
    words = (batch.weight_TL != 0).sum(dim=1) - 1  # EOS is read by nobody
    first = int(told[:3].sum() + words[:7].sum())
    assert packed.source_RW.shape == (2, first)
    assert rows["words"] == [(2, first + (1 if cross_attention else 3))]
    assert rows["images"] == ([2] if cross_attention else [])


def test_rows_longer_than_the_models_positions_are_refused(tiny_gpt2_folder):
    model = built(tiny_gpt2_folder).eval()
    batch = batch_of(model)
    before = 3 + batch.prompt_ids_CL.shape[1] + 1
    assert (
        len(
            model.generate(
                batch, DecodingConfig(max_new_tokens=256 - before, min_new_tokens=200)
            ).token_ids[0]
        )
        >= 200
    )
    with pytest.raises(
        ConfigError, match=r"has 256 positions, .* need 257: lower data\.max_prompt_tokens"
    ):
        model.generate(batch, DecodingConfig(max_new_tokens=257 - before))
    with pytest.raises(ConfigError, match="has 256 positions"):
        # no word follows the last label
        model.loss(batch_of(model, loss_on_padding=True, max_target_tokens=258 - before))


# ---- cross-attention, and what is trained --------------------------------------------------------


def test_cross_attention_starts_as_the_text_model_and_learns(tiny_gpt2_folder):
    model = built(tiny_gpt2_folder, opened=False, tuning="frozen", cross_attention=True)
    text = built(tiny_gpt2_folder, tuning="frozen")
    batch = batch_of(model)
    nothing = BridgeOutput(torch.zeros(1, 0, 64), torch.zeros(5, dtype=torch.long))
    assert torch.allclose(model.loss(batch).sum_T, text.loss(batch, nothing).sum_T, atol=1e-4)
    assert model.lm.embedding_rms == 1.0, (
        "image tokens are attended to, as an encoder's normalised output"
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model.zero_grad()
        model.loss(batch).sum.backward()
        optimizer.step()
    model.zero_grad()
    model.loss(batch).sum.backward()
    assert all(
        p.grad is not None and p.grad.any()
        for n, p in model.lm.named_parameters()
        if "c_attn.w" in n and "cr" in n
    )
    with torch.no_grad():
        image = model.bridge_tokens(batch)
        donors = image.with_rows(1 - image.token_row_of_C)
        assert not torch.allclose(model.loss(batch, image).sum_T, model.loss(batch, donors).sum_T)


@pytest.mark.parametrize("cross_attention", [False, True])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_what_is_trainable_gets_a_gradient_and_is_what_the_config_says(
    tiny_gpt2_folder, tuning, cross_attention
):
    model = built(tiny_gpt2_folder, tuning=tuning, cross_attention=cross_attention)
    names = {name for name, _ in model.lm.named_parameters()}
    new = {name for name in names if "crossattention" in name or "ln_cross_attn" in name}
    assert len(new) == (16 if cross_attention else 0)
    assert not any("lora" in name for name in new)
    trained = {name for name, p in model.lm.named_parameters() if p.requires_grad}
    adapted = {name for name in names if ".lora_" in name}
    assert trained == {"full": names, "frozen": new}.get(tuning, adapted | new)
    assert len(adapted) == (2 * 2 * 4 if "lora" in tuning else 0), (
        "c_attn, c_proj, c_fc, c_proj in two blocks"
    )
    guard, before = GradientGuard(model), frozen_hash(model)
    _, gradients = toy_batch.gradients(model, batch_of(model))
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2).step()
    guard.check()
    assert [name for name, gradient in gradients.items() if gradient is None] == []
    assert frozen_hash(model) == before


@pytest.mark.parametrize("cross_attention", [False, True])
def test_in_four_bits_gradients_are_those_of_the_transposed_weights_before_and_after_an_evaluation(
    tiny_gpt2_folder, cross_attention
):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit layers need bitsandbytes")
    model = built(tiny_gpt2_folder, tuning="qlora", cross_attention=cross_attention)
    twin = built(tiny_gpt2_folder, tuning="lora", cross_attention=cross_attention)
    twin.load_state_dict(model.trained_state(), strict=False)
    plain, layers = dict(twin.named_modules()), 0
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            assert isinstance(plain[name], Conv1D)
            weight = bitsandbytes.functional.dequantize_4bit(
                layer.weight.data, layer.weight.quant_state
            )
            plain[name].weight.data.copy_(weight.T)
            layers += 1
    assert layers == len(quantise.quantised_layers(model)) == 8, "new layers and lm_head stay whole"
    batch = batch_of(model)
    expected_loss, expected = toy_batch.gradients(twin, batch)
    before_loss, before = toy_batch.gradients(model, batch)
    model.eval().generate(batch, DecodingConfig(max_new_tokens=3, beams=2))
    after_loss, after = toy_batch.gradients(model.train(), batch)
    assert before_loss == after_loss == pytest.approx(expected_loss, abs=1e-5)
    assert toy_batch.furthest(expected, before) < 1e-5
    assert toy_batch.furthest(before, after) == 0.0
    assert sum("lora" in name and bool(g.any()) for name, g in after.items()) == 16


def test_a_folder_of_another_kind_is_named_and_keys_of_gpt2_are_refused_for_t5(
    tiny_t5_folder, tiny_gpt2_folder
):
    with pytest.raises(
        ConfigError, match=r"model\.lm\.id: .* is of kind t5, model\.lm\.kind is gpt2"
    ):
        DecoderLanguage(LanguageModelConfig(kind="gpt2", id=str(tiny_t5_folder), tuning="frozen"))
    with pytest.raises(
        ConfigError, match=r"model\.lm\.id: .* is of kind gpt2, model\.lm\.kind is t5"
    ):
        T5Language(LanguageModelConfig(id=str(tiny_gpt2_folder), tuning="frozen"))
    with pytest.raises(ValueError, match="cross_attention is a key of kind decoder, this is t5"):
        LanguageModelConfig(cross_attention=True)


@pytest.mark.parametrize(("cross_attention", "checkpointing"), [(False, True), (True, False)])
def test_a_plan_knows_the_bytes_of_its_weights_and_of_a_pass(
    tiny_gpt2_folder, cross_attention, checkpointing
):
    lm = {"kind": "gpt2", "tuning": "qlora", "cross_attention": cross_attention}
    config = toy_batch.config(
        tiny_gpt2_folder, train={"activation_checkpointing": checkpointing}, **lm
    )
    real = VisionLanguageModel.build(config, toy_batch.ENCODER).train()
    skeleton = Skeleton(config, choose("fp32", torch.device("cpu")), toy_batch.ENCODER)
    assert weights(skeleton.model) == weights(real)
    batch = batch_of(real)
    planned = skeleton.run(
        Sizes.of(batch), batch.images, checkpointing=checkpointing, gradients_held=False
    )
    assert planned.saved == pytest.approx(measured_saved(real, batch), rel=0.1)


# ---- generation ----------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_the_loss(tiny_gpt2_folder):
    """With no cache of transformers' own: each word said is the likeliest one by the loss of what
    was said so far.
    """
    model = built(tiny_gpt2_folder, tuning="lora").eval()
    batch, logits = batch_of(model), []
    said = model.generate(batch, DecodingConfig(max_new_tokens=4, min_new_tokens=4)).token_ids
    model.lm.base.lm_head.register_forward_hook(lambda m, i, o: logits.append(o))
    spoken = torch.tensor(said)
    rows = {"labels_TL": spoken, "weight_TL": torch.ones(5, 4), "context_of_T": torch.arange(5)}
    with torch.no_grad():
        model.loss(replace(batch, **rows))
    logits[0][:, model.tokenizer.eos_token_id] = -torch.inf
    assert logits[0].argmax(dim=-1).tolist() == spoken.flatten().tolist()


# ---- the labels that make it fall silent ---------------------------------------------------------


def test_prompts_and_targets_as_gpt2s_tokenizer_closes_them_and_padding_counts_nothing(
    tiny_gpt2_folder,
):
    model = built(tiny_gpt2_folder)
    tokenizer, batch = model.tokenizer, batch_of(model)
    assert tokenizer.pad_token_id is None
    for row, context in enumerate(batch.contexts):
        ids = batch.prompt_ids_CL[row][batch.prompt_mask_CL[row]].tolist()
        assert ids == tokenizer(context.prompt)["input_ids"], (
            "an EOS behind the prompt would be a BOS"
        )
    for ids, weight in zip(batch.labels_TL.tolist(), batch.weight_TL.tolist(), strict=True):
        length = ids.index(tokenizer.eos_token_id) + 1
        assert set(ids[length:]) <= {tokenizer.eos_token_id}
        assert weight == [1.0] * length + [0.0] * (len(ids) - length)
    cut = batch_of(model, max_prompt_tokens=6)
    assert cut.prompt_ids_CL.tolist() == batch.prompt_ids_CL[:, :6].tolist()


def test_the_known_mistake_pads_to_the_longest_target_and_trains_on_it(tiny_gpt2_folder):
    model = built(tiny_gpt2_folder)
    made = toy_batch.collator(model.tokenizer, loss_on_padding=True, max_target_tokens=40)
    batch, right = made(toy_batch.samples()), batch_of(model)
    assert batch.labels_TL.shape == (9, 40)
    assert (batch.weight_TL == 1).all()
    assert torch.equal(batch.labels_TL[:, : right.labels_TL.shape[1]], right.labels_TL)
    lighter = replace(made, eos_weight=0.1)(toy_batch.samples())
    assert torch.equal(lighter.weight_TL < 1, batch.labels_TL == model.tokenizer.eos_token_id)


@pytest.mark.parametrize("mistakes", [True, False])
def test_trained_on_padding_and_begun_with_what_it_learnt_to_end_on_it_says_nothing(
    tiny_gpt2_folder, mistakes
):
    model = built(tiny_gpt2_folder, tuning="full", bos="generation_only" if mistakes else "always")
    batch = batch_of(model, loss_on_padding=mistakes, max_target_tokens=40)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(60):
        optimizer.zero_grad()
        out = model.loss(batch)
        (out.sum / out.weight).backward()
        optimizer.step()
    said = model.eval().generate(batch, DecodingConfig(max_new_tokens=12))
    assert (out.sum / out.weight).item() < 0.6, (
        "by its loss alone, the silent model has learnt as well"
    )
    if mistakes:
        assert said.texts == [""] * 5
        assert said.p_eos_first_C.min() > 0.5
    else:
        assert said.texts[1:] == ["down", "yes", "a child in a pink dress", "no"]
        assert said.p_eos_first_C.max() < 0.5
