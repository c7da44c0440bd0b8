"""Decoders of many architectures behind one class: packed rows give what transformers' own forward
pass gives to each row alone, and answers are the same whatever stands beside them.
"""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from transformers import AutoTokenizer

import toy_batch
from harness.config.schema import Config, DecodingConfig, LanguageModelConfig, PromptsConfig
from harness.errors import ConfigError
from harness.machine.precision import choose
from harness.model import packing
from harness.model.language import quantise
from harness.model.language.decoder import DecoderLanguage
from harness.model.language.wording import Wording
from harness.model.vlm import VisionLanguageModel
from harness.plan.skeleton import Skeleton, weights
from harness.plan.workload import Sizes
from plan_cases import measured_saved
from tiny_models import DECODERS, tiny_decoder, tiny_gpt2_tokenizer
from toy_batch import moved, outputs, pixel_batch, same


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A function: model type -> the folder of a tiny one."""
    made = {}

    def folder(kind: str):
        if kind not in made:
            made[kind] = tiny_decoder(tmp_path_factory.mktemp("decoders") / kind, kind)
        return made[kind]

    return folder


@pytest.fixture(params=DECODERS)
def kind(request):
    return request.param


def built(folder, **settings):
    return toy_batch.model(folder, **{"kind": "decoder", "tuning": "lora"} | settings)


def batch_of(model, **prompts):
    collator = toy_batch.collator(model.tokenizer, prompts=PromptsConfig(**prompts))
    return collator(toy_batch.samples())


def read(model, batch, context: int, labels) -> tuple[dict, int]:
    """What the model of transformers reads of one target, and how many positions stand before."""
    prompt = batch.prompt_ids_CL[context][batch.prompt_mask_CL[context]]
    begins = [] if model.lm.begins is None else [model.lm.begins]
    words = torch.cat([prompt, torch.tensor(begins, dtype=torch.long), labels])
    image = model.bridge_tokens(batch)
    tokens = image.tokens_NQD[image.token_row_of_C[context]]
    embeds = torch.cat([tokens, model.lm.base.get_input_embeddings()(words)])
    return {"inputs_embeds": embeds[None]}, len(embeds) - len(labels)


def row_by_row(model, batch):
    """The mean loss by transformers' own forward pass, and the gradients."""
    model.zero_grad(set_to_none=True)
    total = 0.0
    for target in range(len(batch.labels_TL)):
        labels = batch.labels_TL[target][batch.weight_TL[target] > 0]
        inputs, before = read(model, batch, int(batch.context_of_T[target]), labels)
        logits = model.lm.base(**inputs).logits[0, before - 1 : -1]
        total = total + F.cross_entropy(logits, labels, reduction="sum")
    loss = total / batch.weight
    loss.backward()
    return loss.item(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("question_aware", [False, True])
def test_packed_rows_equal_unpacked_ones_and_transformers_own(
    folders, kind, question_aware, monkeypatch
):
    model = built(folders(kind), bridge={"question_aware": question_aware})
    batch = batch_of(model)
    rows = batch.packed(batch.begins, True).source_RW.shape[0]
    assert rows == 2, "the contexts of each picture share a row"
    loss, grads = toy_batch.gradients(model, batch)
    ways = [toy_batch.gradients(model, toy_batch.unrolled(batch)), row_by_row(model, batch)]
    # rows that are too long go on behind their prefix once more
    monkeypatch.setattr(packing, "MOST_POSITIONS", 40)
    shorter = replace(batch, index=None)
    assert shorter.packed(batch.begins, True).source_RW.shape[0] > 2
    ways.append(toy_batch.gradients(model, shorter))
    for other_loss, other in ways:
        assert loss == pytest.approx(other_loss, abs=1e-4)
        assert toy_batch.furthest(grads, other) < 1e-4


def test_checkpointed_activations_change_nothing(folders, kind):
    model = built(folders(kind))
    saving = built(folders(kind), train={"activation_checkpointing": True})
    batch = batch_of(model)
    loss, grads = toy_batch.gradients(model, batch)
    saved_loss, saved = toy_batch.gradients(saving, batch)
    assert loss == pytest.approx(saved_loss, abs=1e-5)
    assert toy_batch.furthest(grads, saved) < 1e-5


def test_exchanged_and_absent_pictures_are_seen_as_by_each_row_alone(folders):
    model = built(folders("llama")).eval()
    batch = batch_of(model)
    with torch.no_grad():
        image = model.bridge_tokens(batch)
        others = image.with_rows(torch.tensor([1, 0, 1, 0, 1]))
        assert len(batch.packed(False, False).source_RW) == 5, "each context by itself"
        for tokens in (others, image.with_rows(torch.tensor([-1, 0, 1, -1, 1]))):
            found = model.loss(batch, tokens).sum_T
            for context in range(5):
                rows = (batch.context_of_T == context).nonzero()[:, 0]
                alone = replace(
                    batch,
                    prompt_ids_CL=batch.prompt_ids_CL[context : context + 1],
                    prompt_mask_CL=batch.prompt_mask_CL[context : context + 1],
                    image_of_C=batch.image_of_C[context : context + 1],
                    labels_TL=batch.labels_TL[rows],
                    weight_TL=batch.weight_TL[rows],
                    context_of_T=torch.zeros(len(rows), dtype=torch.long),
                )
                own = tokens.with_rows(tokens.token_row_of_C[context : context + 1])
                assert torch.allclose(found[rows], model.loss(alone, own).sum_T, atol=1e-3)


def test_rows_beyond_a_window_or_the_positions_are_refused(folders):
    model = built(folders("gemma2"))
    made = toy_batch.collator(model.tokenizer, loss_on_padding=True, max_target_tokens=220)
    with pytest.raises(ConfigError, match="has 200 positions"):
        model.loss(made(toy_batch.samples()))
    model = built(folders("opt")).eval()
    with pytest.raises(ConfigError, match="has 256 positions"):
        model.generate(batch_of(model), DecodingConfig(max_new_tokens=256))


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beams", [1, 3])
def test_answers_are_the_same_alone_and_beside_others_and_those_of_transformers(
    folders, kind, beams
):
    model = built(folders(kind)).eval()
    batch = batch_of(model)
    decoding = DecodingConfig(max_new_tokens=6, beams=beams)
    said = model.generate(batch, decoding)
    eos = model.tokenizer.eos_token_id
    assert len({tuple(ids) for ids in said.token_ids}) > 1
    for row in range(5):
        inputs, _ = read(model, batch, row, torch.tensor([], dtype=torch.long))
        with torch.no_grad():
            asked = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
            ids = model.lm.base.generate(**inputs, **asked, eos_token_id=eos, pad_token_id=eos)
            first = model.lm.base(**inputs).logits[0, -1].softmax(dim=-1)
        assert [t for t in ids[0].tolist() if t != eos] == said.token_ids[row]
        assert said.p_eos_first_C[row].item() == pytest.approx(first[eos].item(), rel=1e-3)


def test_what_stands_before_the_answers_is_read_once_however_many_beams(folders, kind):
    model = built(folders(kind)).eval()
    read: list[tuple[int, ...]] = []

    def note(_base, _given, named):
        read.append(named["inputs_embeds"].shape[:2])

    model.lm.base.register_forward_pre_hook(note, with_kwargs=True)
    model.generate(batch_of(model), DecodingConfig(max_new_tokens=1, beams=4))
    assert read == [(5 * 4, 1)], "each beam goes on from the last position of what was read before"


def test_a_penalty_that_a_model_brings_along_is_not_obeyed(folders, tmp_path):
    folder = tiny_decoder(tmp_path, "qwen2")
    (folder / "generation_config.json").write_text('{"repetition_penalty": 9.0, "do_sample": true}')
    asked = DecodingConfig(max_new_tokens=6)
    plain, told = (built(place).eval() for place in (folders("qwen2"), folder))
    answers = [model.generate(batch_of(model), asked).token_ids for model in (plain, told)]
    assert answers[0] == answers[1]


# ---- words ---------------------------------------------------------------------------------------


def test_a_prompt_is_the_users_turn_and_an_answer_ends_as_a_turn_does(folders):
    model = built(folders("qwen2"))
    tokenizer, batch = model.tokenizer, batch_of(model)
    assert tokenizer.eos_token == "<|im_end|>"
    for row, context in enumerate(batch.contexts):
        ids = batch.prompt_ids_CL[row][batch.prompt_mask_CL[row]].tolist()
        turn = [{"role": "user", "content": context.prompt}]
        made = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        assert ids == made
    for ids, weight in zip(batch.labels_TL.tolist(), batch.weight_TL.tolist(), strict=True):
        length = int(sum(weight))
        assert ids[length - 1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert not batch.begins
    made = toy_batch.collator(tokenizer, max_prompt_tokens=3)
    cut = made(toy_batch.samples())
    assert made.truncated["prompt"] == 5
    assert tokenizer.decode(cut.prompt_ids_CL[0]).startswith("<|im_start|>user\n")
    assert "<|im_end|>\n<|im_start|>assistant\n" in tokenizer.decode(cut.prompt_ids_CL[0])


def test_without_its_template_a_prompt_stands_as_it_is(folders):
    config = LanguageModelConfig(kind="decoder", id=str(folders("llama")), tuning="frozen")
    plain = DecoderLanguage(config, chat="none").tokenizer
    assert (plain.chat_template, plain.eos_token) == (None, "</s>")
    (ids,), _ = Wording(plain).prompts(["is it red?"], 64)
    assert plain.convert_ids_to_tokens(ids[0]) == "<s>"
    assert plain.decode(ids[1:]) == "is it red?"
    (answer,), _ = Wording(plain).answers(["no"], [True], 8)
    assert plain.decode(answer) == " no</s>", "it goes on from the prompt"
    (answer,), _ = Wording(plain).answers(["no"], [False], 8)
    assert plain.decode(answer) == "no</s>"


def test_a_tokenizer_that_adds_nothing_has_a_token_between_prompt_and_answer():
    tokenizer = tiny_gpt2_tokenizer()
    assert Wording(tokenizer).begins == tokenizer.eos_token_id
    assert Wording(tokenizer).prompts(["", "a"], 8)[0][0] == []


def test_a_template_that_cannot_be_used_is_told_by_its_key(folders, tmp_path):
    folder = tiny_decoder(tmp_path, "qwen2")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('tools alone') }}")
    config = LanguageModelConfig(kind="decoder", id=str(folder), tuning="frozen")
    with pytest.raises(ConfigError, match=r"prompts\.chat: the chat template .*tools alone"):
        DecoderLanguage(config)
    assert DecoderLanguage(config, chat="none").begins is not None


def test_a_template_that_tells_the_day_says_the_same_every_day(tmp_path):
    folder = tiny_decoder(tmp_path, "qwen2")
    file = folder / "chat_template.jinja"
    file.write_text("<|im_start|>{{ strftime_now('%d %b %Y') }}<|im_end|>" + file.read_text())
    config = LanguageModelConfig(kind="decoder", id=str(folder), tuning="frozen")
    before, _ = Wording(DecoderLanguage(config).tokenizer).template
    assert before.startswith("<|im_start|>26 Jul 2024<|im_end|>")


def test_a_tokenizer_without_an_end_or_with_a_token_of_its_own_is_refused(folders, tmp_path):
    folder = tiny_decoder(tmp_path / "pads", "llama")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    known = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[OWN]"})
    tokenizer.save_pretrained(folder)
    config = LanguageModelConfig(kind="decoder", id=str(folder), tuning="frozen")
    described = json.loads((folder / "config.json").read_text())
    assert described["vocab_size"] == known, "else the toy shows nothing"
    with pytest.raises(ConfigError, match=rf"uses '\[OWN\]', its token {known}, .* has {known}:"):
        DecoderLanguage(config)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    with pytest.raises(ConfigError, match="names no token that ends a text"):
        DecoderLanguage(config, chat="none")


@pytest.mark.parametrize("where", ["qwen2", "llama"])
def test_the_known_mistake_begins_answers_with_a_token_that_training_never_shows(folders, where):
    model = built(folders(where)).eval()
    batch = batch_of(model)
    sound = model.lm._prefix(model.bridge_tokens(batch), batch)[0]
    loss = model.loss(batch).sum
    model.lm.bos_in_training = False
    assert model.lm._prefix(model.bridge_tokens(batch), batch)[0].shape[1] == sound.shape[1] + 1
    assert torch.equal(model.loss(batch).sum, loss)


# ---- 4 bits, LoRA, what is saved -----------------------------------------------------------------


def test_four_bits_and_lora_are_on_every_linear_layer_but_the_head(folders, kind):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit layers need bitsandbytes")
    model = built(folders(kind), tuning="qlora")
    inner = [
        (name, module)
        for name, module in model.lm.base.named_modules()
        if isinstance(module, bitsandbytes.nn.Linear4bit)
    ]
    adapted = {
        name.split(".lora_")[0] for name, _ in model.lm.named_parameters() if "lora_" in name
    }
    assert len(inner) == len(adapted) >= 8
    assert not any("lm_head" in name for name in adapted)
    assert len(quantise.quantised_layers(model)) == len(inner)
    loss, grads = toy_batch.gradients(model, batch_of(model))
    assert loss == pytest.approx(row_by_row(model, batch_of(model))[0], abs=1e-4)
    assert all(grad is not None for grad in grads.values())


@pytest.mark.parametrize("tuning", ["qlora", "full"])
def test_a_saved_model_is_the_same_model(folders, tiny_clip_folder, tmp_path, tuning):
    parts = {
        "vision": {"id": str(tiny_clip_folder), "image_size": 32},
        "bridge": {"query_tokens": 3, "layers": 1, "width": 32, "heads": 4},
        "lm": {"kind": "decoder", "id": str(folders("qwen2")), "tuning": tuning, "lora": {"r": 4}},
    }
    model = moved(VisionLanguageModel.build(Config(name="saved", model=parts)))
    batch = pixel_batch(model)
    expected = outputs(model, batch)
    model.save_pretrained(tmp_path)
    again = VisionLanguageModel.from_pretrained(tmp_path)
    assert same(outputs(again, batch), expected)


@pytest.mark.parametrize("kind", ["opt", "qwen3", "gemma2"])
def test_a_plan_knows_the_bytes(folders, kind):
    config = toy_batch.config(folders(kind), kind="decoder", tuning="qlora")
    real = VisionLanguageModel.build(config, toy_batch.ENCODER).train()
    skeleton = Skeleton(config, choose("fp32", torch.device("cpu")), toy_batch.ENCODER)
    assert weights(skeleton.model) == weights(real)
    batch = batch_of(real)
    planned = skeleton.run(Sizes.of(batch), batch.images, checkpointing=False, gradients_held=False)
    assert planned.saved == pytest.approx(measured_saved(real, batch), rel=0.1)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("other", "settings", "told"),
    [
        ("t5", {}, "it is of kind t5, model.lm.kind is decoder"),
        ("llama", {"cross_attention": True}, "of kind llama, .* which GPT-2 alone has"),
        ("llama", {"kind": "gpt2"}, "it is of kind llama, model.lm.kind is gpt2"),
    ],
)
def test_other_kinds_are_refused_by_name(folders, tiny_t5_folder, other, settings, told):
    folder = tiny_t5_folder if other == "t5" else folders(other)
    config = {"kind": "decoder", "id": str(folder), "tuning": "frozen"} | settings
    with pytest.raises(ConfigError, match=told):
        DecoderLanguage(LanguageModelConfig(**config))


def test_a_model_whose_layers_see_all_of_a_row_is_refused(tmp_path):
    """A recurrent one, whose targets no mask keeps apart, and one whose window counts columns."""
    for kind, fields in (
        ("mamba", {"state_size": 4, "num_hidden_layers": 1}),
        ("gpt_neo", {"num_layers": 2, "num_heads": 2, "attention_types": [[["local"], 2]]}),
    ):
        folder = tiny_decoder(tmp_path / kind, kind, **fields)
        with pytest.raises(ConfigError, match=f"is a {kind}, whose layers do not keep the targets"):
            DecoderLanguage(LanguageModelConfig(kind="decoder", id=str(folder), tuning="frozen"))
