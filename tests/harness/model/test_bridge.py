"""Bridges: patch tokens of any scale in, tokens of the language model's width and scale out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, Blip2Config, Blip2ForConditionalGeneration

from harness.checks import check_models
from harness.config.schema import BridgeConfig, Config, LanguageModelConfig, ModelConfig
from harness.data.collate import Collator
from harness.data.images import ImageDecoder
from harness.errors import ConfigError
from harness.evaluate.image_use.gate import exchanged
from harness.evaluate.run_on_disk import evaluate_run
from harness.model.bridge import Bridge, BridgeOutput
from harness.model.start import start_from
from harness.model.vlm import VisionLanguageModel
from harness.train import run as train
from plan_cases import changed
from shards.loader import Loader
from toy_runs import make_config

KINDS = {"qformer": 4, "mean_pool": 1, "linear": 7}


def bridge(kind: str, **settings) -> Bridge:
    torch.manual_seed(0)
    small = {"query_tokens": 4, "layers": 2, "width": 32, "heads": 4}
    return Bridge(
        BridgeConfig(kind=kind, **(small | settings)),
        patch_width=24,
        lm_width=64,
        patches=7,
        embedding_rms=9.5,
    )


@pytest.mark.parametrize(("kind", "tokens"), KINDS.items())
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_calibrated_tokens_are_centred_and_have_the_scale_of_the_lms_embeddings(
    kind, tokens, scale
):
    made = bridge(kind)
    # Channels of very different size, and much that all images have in common, as CLIP's inner
    # layers have.
    patches_IPD = scale * (torch.randn(16, 7, 24) * torch.logspace(-2, 1, 24) + 3 * torch.randn(24))
    made.calibrate(patches_IPD)
    out_IQD = made(patches_IPD)
    assert out_IQD.shape == (16, tokens, 64)
    assert out_IQD.pow(2).mean().sqrt().item() == pytest.approx(9.5, rel=1e-3)
    assert out_IQD.mean(dim=0).abs().max() < 1e-3 * 9.5
    normed_IPD = made.patch_norm(patches_IPD)
    assert normed_IPD.mean(dim=(0, 1)).abs().max() < 1e-2
    assert normed_IPD.std(dim=(0, 1)).median().item() == pytest.approx(1, rel=1e-2)


def test_calibration_on_one_image_scales_and_keeps_what_it_says():
    made = bridge("qformer")
    patches_1PD = torch.randn(1, 7, 24)
    made.calibrate(patches_1PD)
    out_1QD = made(patches_1PD)
    assert out_1QD.isfinite().all()
    assert out_1QD.pow(2).mean().sqrt().item() == pytest.approx(9.5, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_each_image_only_its_own(kind):
    made = bridge(kind)
    patches_IPD = torch.randn(3, 7, 24, requires_grad=True)
    (made(patches_IPD)[1] * torch.randn(64)).sum().backward()
    assert [n for n, p in made.named_parameters() if p.grad is None] == []
    moved_I = patches_IPD.grad.abs().sum(dim=(1, 2)) > 0
    assert moved_I.tolist() == [False, True, False]


def test_the_queries_look_at_the_image_in_every_nth_layer():
    every, second = (
        bridge("qformer", layers=4),
        bridge("qformer", layers=4, cross_attention_frequency=2),
    )

    def looking(made: Bridge) -> list[int]:
        layers = made.body.qformer.encoder.layer
        return [at for at, layer in enumerate(layers) if layer.has_cross_attention]

    assert looking(every) == [0, 1, 2, 3]
    assert looking(second) == [0, 2]
    second(torch.randn(2, 7, 24)).pow(3).sum().backward()
    assert [n for n, p in second.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("queries", [1, 16, 64])
def test_as_many_tokens_as_queries(queries):
    assert bridge("qformer", query_tokens=queries)(torch.randn(2, 7, 24)).shape == (2, queries, 64)


def test_a_bridge_that_is_not_trained_is_frozen_whole():
    assert not any(p.requires_grad for p in bridge("qformer", trainable=False).parameters())
    assert all(p.requires_grad for p in bridge("qformer").parameters())


def test_counterfactual_tokens_are_other_rows_or_none_and_leave_the_true_ones_alone():
    true = BridgeOutput(torch.randn(2, 4, 8), torch.tensor([0, 0, 1]))
    shuffled, none = true.with_rows(torch.tensor([1, 1, 0])), true.without_tokens()
    assert shuffled.tokens_NQD is true.tokens_NQD
    assert shuffled.token_row_of_C.tolist() == [1, 1, 0]
    assert none.tokens_NQD.shape == (2, 0, 8)
    assert true.token_row_of_C.tolist() == [0, 0, 1]


# ---- a Q-Former that reads the question ----------------------------------------------------------


def aware(**settings) -> Bridge:
    torch.manual_seed(0)
    small = {"query_tokens": 4, "layers": 2, "width": 32, "heads": 4, "question_aware": True}
    sizes = {
        "patch_width": 24,
        "lm_width": 64,
        "patches": 7,
        "embedding_rms": 9.5,
        "vocabulary": 50,
    }
    return Bridge(BridgeConfig(**(small | settings)), **sizes).eval()


def test_a_question_aware_bridge_reads_the_words_and_not_their_padding():
    made = aware()
    patches_NPD, ids_NL = torch.randn(3, 7, 24), torch.tensor([[5, 6, 7], [5, 6, 8], [5, 6, 0]])
    mask_NL = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    out_NQD = made(patches_NPD[:1].expand(3, -1, -1), ids_NL, mask_NL)
    assert out_NQD.shape == (3, 4, 64)
    assert not torch.allclose(out_NQD[0], out_NQD[1], atol=1e-3), "another last word"
    alone = made(patches_NPD[:1], ids_NL[2:, :2], mask_NL[2:, :2])
    torch.testing.assert_close(out_NQD[2:], alone, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"data.max_prompt_tokens: a prompt has 513 tokens"):
        made(
            patches_NPD[:1],
            torch.zeros(1, 513, dtype=torch.long),
            torch.ones(1, 513, dtype=torch.bool),
        )


def test_every_trained_parameter_of_a_question_aware_bridge_gets_a_gradient():
    made = aware()
    ids_NL = torch.arange(6).view(2, 3)
    made.calibrate(torch.randn(2, 7, 24), ids_NL, ids_NL > 0)
    made(torch.randn(2, 7, 24), ids_NL, ids_NL >= 0).pow(3).sum().backward()
    silent = [n for n, p in made.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []
    assert sum(not p.requires_grad for p in made.parameters()) == 6, (
        "the last layer's feed-forward of the words"
    )


@pytest.fixture(scope="module")
def aware_run(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    root = tmp_path_factory.mktemp("aware")
    config = make_config(root, tiny_clip_folder, tiny_t5_folder, max_steps=2)
    test = [{"path": dev.path} for dev in config.data.dev]
    config = changed(config, bridge={"question_aware": True}, data={"test": test})
    return config, train.run(config)


def test_a_run_with_a_question_aware_bridge_is_trained_saved_and_judged(aware_run):
    config, _ = aware_run
    report = evaluate_run(config.out_dir)
    known = report["tasks"]["vqa"]
    assert known["shuffled_loss_nats"] != known["true_loss_nats"]
    assert known.get("blank_loss_nats") is None, "its tokens are of one context each"


def test_each_context_has_its_own_tokens_and_another_image_leaves_it_its_question(aware_run):
    config, checkpoint = aware_run
    model = VisionLanguageModel.from_pretrained(checkpoint / "model")
    decode = ImageDecoder.of(config.model.vision, config.data.max_image_pixels)
    loader = Loader([config.data.train[0].path], global_batch=4, shuffle=False, decode=decode)
    batch = Collator(model.tokenizer, config.data, config.prompts, training=False)(
        next(loader.iterate())[1]
    )
    tokens = model.bridge_tokens(batch)
    contexts = len(batch.contexts)
    assert contexts > batch.images
    assert (len(tokens.tokens_NQD), tokens.token_row_of_C.tolist()) == (
        contexts,
        list(range(contexts)),
    )
    swapped = exchanged(model, batch, tokens, (batch.image_of_C + 1) % batch.images)
    patches = model.patch_tokens(batch)
    last = contexts - 1
    expected = model.bridge(
        patches[[(int(batch.image_of_C[last]) + 1) % batch.images]],
        batch.prompt_ids_CL[last:],
        batch.prompt_mask_CL[last:],
    )
    torch.testing.assert_close(swapped.tokens_NQD[last:], expected, atol=1e-4, rtol=1e-4)


# ---- started from others' weights ----------------------------------------------------------------


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(5)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    BertForMaskedLM(BertConfig(vocab_size=50, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def blip2(tmp_path_factory) -> Path:
    """A whole tiny BLIP-2, whose encoder is 24 wide."""
    folder = tmp_path_factory.mktemp("blip2")
    torch.manual_seed(6)
    sizes = {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
    }
    text = {
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 40,
    }
    qformer = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    config = Blip2Config(
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        qformer_config={**qformer, "encoder_hidden_size": 24, "cross_attention_frequency": 2},
        text_config={
            "model_type": "opt",
            **text,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 16,
        },
        num_query_tokens=4,
    )
    model = Blip2ForConditionalGeneration(config)
    torch.nn.init.normal_(model.query_tokens)
    model.save_pretrained(folder)
    return folder


def started(folder: Path, made: Bridge, **settings) -> str:
    small = {"query_tokens": 4, "layers": 2, "width": 32, "heads": 4, "init_from": str(folder)}
    return start_from(made, BridgeConfig(**(small | settings)), {})


def test_a_qformer_started_from_bert_has_its_attention_and_its_own_look_at_the_image(bert):
    made, before = bridge("qformer"), bridge("qformer").state_dict()
    said = started(bert, made)
    theirs = BertForMaskedLM.from_pretrained(bert).bert.encoder.layer
    for layer, source in zip(made.body.qformer.encoder.layer, theirs[:2], strict=True):
        assert torch.equal(
            layer.attention.attention.value.weight, source.attention.self.value.weight
        )
        assert torch.equal(layer.output_query.dense.weight, source.output.dense.weight)
        assert torch.equal(layer.output_query.LayerNorm.bias, source.output.LayerNorm.bias)
    same = [name for name, value in made.state_dict().items() if torch.equal(value, before[name])]
    kept = [name for name in same if name.endswith("dense.weight") or name.endswith("query_tokens")]
    assert kept == [
        "body.query_tokens",
        *(f"body.qformer.encoder.layer.{n}.crossattention.output.dense.weight" for n in (0, 1)),
    ]
    assert "weights come from" in said
    assert said.endswith(" start at random (cross-attention, query tokens)")


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin", "shards"])
def test_a_qformer_started_from_a_published_blip2_says_what_that_one_says(blip2, file, tmp_path):
    if file != "model.safetensors":
        blip2 = rewritten(blip2, tmp_path, sharded=file == "shards")
    made = bridge("qformer", cross_attention_frequency=2)
    assert started(blip2, made, cross_attention_frequency=2).endswith(" 0 start at random")
    theirs = Blip2ForConditionalGeneration.from_pretrained(blip2).eval()
    patches_IPD = torch.randn(2, 7, 24)
    expected = theirs.qformer(
        query_embeds=theirs.query_tokens.expand(2, -1, -1), encoder_hidden_states=patches_IPD
    ).last_hidden_state
    torch.testing.assert_close(made.eval().body(patches_IPD), expected)


def rewritten(folder: Path, out: Path, sharded: bool) -> Path:
    """The same model as pytorch_model.bin, or as two shards of which one holds nothing of the
    Q-Former.
    """
    model = Blip2ForConditionalGeneration.from_pretrained(folder)
    if sharded:
        model.save_pretrained(out, max_shard_size="60KB")
        assert len(list(out.glob("model-*.safetensors"))) > 1
    else:
        (out / "config.json").write_bytes((folder / "config.json").read_bytes())
        torch.save(model.state_dict(), out / "pytorch_model.bin")
    return out


def test_keys_for_an_encoder_of_another_width_stay_random_and_are_counted(blip2):
    torch.manual_seed(0)
    small = {
        "query_tokens": 4,
        "layers": 2,
        "width": 32,
        "heads": 4,
        "cross_attention_frequency": 2,
    }
    made = Bridge(BridgeConfig(**small), patch_width=20, lm_width=64, patches=7, embedding_rms=1.0)
    said = started(blip2, made, cross_attention_frequency=2)
    assert said.endswith(" 2 start at random (cross-attention)"), (
        "key and value of the one layer that looks at the image"
    )
    theirs = Blip2ForConditionalGeneration.from_pretrained(blip2)
    assert torch.equal(made.body.query_tokens, theirs.query_tokens)


def test_a_question_aware_qformer_starts_from_bert_but_for_the_words(bert):
    made = aware()
    started(bert, made, question_aware=True)
    theirs = BertForMaskedLM.from_pretrained(bert).bert
    assert torch.equal(
        made.body.qformer.embeddings.layernorm.weight, theirs.embeddings.LayerNorm.weight
    )
    layer, source = made.body.qformer.encoder.layer[1], theirs.encoder.layer[1]
    assert torch.equal(layer.intermediate_query.dense.weight, source.intermediate.dense.weight)
    assert not torch.equal(layer.intermediate.dense.weight, source.intermediate.dense.weight)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"query_tokens": 8}, "has 4 query tokens; set model.bridge.query_tokens=4"),
        ({"heads": 8}, "has 4 heads, this bridge 8; set model.bridge.heads=4"),
        ({"layers": 3}, "has 2 layers, this bridge 3; set model.bridge.layers=2"),
        (
            {"cross_attention_frequency": 1},
            "lacks encoder.layer.1.crossattention.attention.query.weight; set",
        ),
        ({"width": 64}, "this bridge's is (64,); set model.bridge.width=32"),
    ],
)
def test_what_does_not_fit_is_told_with_the_key_to_set(blip2, settings, sentence):
    settings = {"cross_attention_frequency": 2} | settings
    with pytest.raises(ConfigError) as raised:
        started(blip2, bridge("qformer", **settings), **settings)
    assert str(raised.value).startswith(f"model.bridge.init_from: {blip2} ")
    assert sentence in str(raised.value)


def test_a_folder_that_holds_neither_is_told(tmp_path, tiny_t5_folder):
    with pytest.raises(ConfigError, match="holds neither a BERT nor the Q-Former of a BLIP-2"):
        started(tiny_t5_folder, bridge("qformer"))
    with pytest.raises(ConfigError, match=r"holds no config.json: it is not a saved model"):
        started(tmp_path, bridge("qformer"))
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(ConfigError, match=r"holds neither model.safetensors nor pytorch_model.bin"):
        started(tmp_path, bridge("qformer"))


def test_a_run_starts_from_them_and_its_model_is_loaded_without_them(
    bert, tmp_path, tiny_clip_folder, tiny_t5_folder
):
    config = make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, dev=False, max_steps=1)
    folder = shutil.copytree(bert, tmp_path / "bert")
    built = VisionLanguageModel.build(changed(config, bridge={"init_from": str(folder)}))
    theirs = BertForMaskedLM.from_pretrained(folder).bert.encoder.layer[0]
    assert torch.equal(
        built.bridge.body.qformer.encoder.layer[0].attention.attention.key.weight,
        theirs.attention.self.key.weight,
    )
    built.save_pretrained(tmp_path / "saved")
    shutil.rmtree(folder)
    VisionLanguageModel.from_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("place", ["runs/nowhere", "/nowhere", "nobody/no-such-model"])
def test_start_weights_that_are_not_there_are_told_before_anything_is_started(
    place, tiny_t5_folder
):
    lm, bridge = LanguageModelConfig(id=str(tiny_t5_folder)), BridgeConfig(init_from=place)
    with pytest.raises(ConfigError, match=rf"^model.bridge.init_from: .*{place}"):
        check_models(Config(name="x", model=ModelConfig(lm=lm, bridge=bridge)), with_vision=False)
