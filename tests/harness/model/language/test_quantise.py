"""NF4 as bitsandbytes does it here: exact gradients, before and after an evaluation, and what stays
whole.
"""

import json
import logging
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy_batch
from harness.config.schema import DecodingConfig, LanguageModelConfig
from harness.errors import ConfigError
from harness.model.language import quantise
from harness.model.language.t5 import T5Language

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit layers need bitsandbytes")
LINEAR = (
    "SelfAttention.q",
    "SelfAttention.k",
    "SelfAttention.v",
    "SelfAttention.o",
    "DenseReluDense.wi_0",
)


@pytest.fixture
def model(tiny_t5_folder):
    return toy_batch.model(tiny_t5_folder, tuning="qlora")


@pytest.fixture
def batch(model):
    return toy_batch.collator(model.tokenizer)(toy_batch.samples())


def dequantised_twin(model, folder):
    """The same model with LoRA on plain layers that hold what the 4-bit ones stand for."""
    twin = toy_batch.model(folder, tuning="lora")
    twin.load_state_dict(
        {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, strict=False
    )
    plain = dict(twin.named_modules())
    count = 0
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(
                layer.weight.data, layer.weight.quant_state
            )
            plain[name].weight.data.copy_(weight)
            count += 1
    assert count == len(quantise.quantised_layers(model)) > 0
    return twin


def test_gradients_equal_those_of_the_dequantised_weights_before_and_after_an_evaluation(
    model, batch, tiny_t5_folder
):
    twin = dequantised_twin(model, tiny_t5_folder)
    expected_loss, expected = toy_batch.gradients(twin, batch)
    before_loss, before = toy_batch.gradients(model, batch)
    with torch.no_grad():
        evaluated = model.eval().loss(batch)
        said = model.generate(batch, DecodingConfig(max_new_tokens=3))
        alone = model.generate(batch, DecodingConfig(max_new_tokens=3, beams=2))
    after_loss, after = toy_batch.gradients(model.train(), batch)

    assert all(g is not None and g.isfinite().all() for g in after.values()), (
        "an evaluation stopped the learning"
    )
    assert sum("lora" in name and bool(g.any()) for name, g in after.items()) > 40
    assert before_loss == expected_loss == after_loss
    for name, gradient in expected.items():
        assert torch.equal(gradient, before[name]), name
        assert torch.equal(gradient, after[name]), name
    assert (evaluated.sum / evaluated.weight).item() == before_loss
    with torch.no_grad():
        twin_said = twin.eval().generate(batch, DecodingConfig(max_new_tokens=3))
    assert said.token_ids == twin_said.token_ids
    assert len(alone.texts) == 5


def test_the_kernel_without_autograd_is_barred_from_every_layer(model, batch):
    """bitsandbytes takes it where the CPU has avx512_bf16; the test above fails there without the
    guard.

    Where the CPU lacks it, that test cannot fail, and only what the guard sets is checked here.
    """
    layers = quantise.quantised_layers(model)
    assert layers
    assert all(layer.support_avx512bf16_for_cpu is False for layer in layers)
    with torch.no_grad():
        model.eval().loss(batch)
    assert not any(
        getattr(layer.weight.quant_state, "packing_format_for_cpu", False) for layer in layers
    )


def test_attention_and_gates_are_in_4_bits_and_embeddings_wo_and_lm_head_are_not(model):
    t5 = model.lm.t5
    layers = set(quantise.quantised_layers(t5))
    quantised = {
        name.removesuffix(".base_layer") for name, module in t5.named_modules() if module in layers
    }
    assert all(
        f"encoder.block.{b}.layer.0.{part}" in quantised for b in (0, 1) for part in LINEAR[:4]
    )
    assert all(
        f"decoder.block.{b}.layer.1.EncDecAttention.{part}" in quantised
        for b in (0, 1)
        for part in "qkvo"
    )
    assert all(
        f"{side}.block.{b}.layer.{at}.DenseReluDense.{part}" in quantised
        for side, at in (("encoder", 1), ("decoder", 2))
        for b in (0, 1)
        for part in ("wi_0", "wi_1")
    )
    assert len(quantised) == 2 * (4 + 2) + 2 * (8 + 2)
    for whole in (
        t5.shared.weight,
        t5.lm_head.weight,
        t5.encoder.block[0].layer[1].DenseReluDense.wo.weight,
    ):
        assert whole.dtype == torch.float32
    layer = quantise.quantised_layers(t5)[0]
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested, "double quantisation"
    assert layer.weight.numel() * 2 == layer.in_features * layer.out_features


@pytest.mark.parametrize("targets", ["all_linear", ["q", "v"]])
def test_lora_sits_where_the_config_says_in_fp32(tiny_t5_folder, targets):
    lora = {"r": 4, "targets": targets}
    language = T5Language(LanguageModelConfig(id=str(tiny_t5_folder), tuning="qlora", lora=lora))
    trained = {name for name, p in language.named_parameters() if p.requires_grad}
    adapted = {name.partition(".lora_")[0].rpartition(".")[2] for name in trained}
    assert adapted == (
        {"q", "v"} if targets != "all_linear" else {"q", "k", "v", "o", "wi_0", "wi_1", "wo"}
    )
    assert all(p.dtype == torch.float32 for p in language.parameters() if p.requires_grad)


def test_a_target_that_no_layer_has_is_named(tiny_t5_folder):
    with pytest.raises(ConfigError, match=r"model\.lm\.lora\.targets.*nowhere"):
        T5Language(
            LanguageModelConfig(
                id=str(tiny_t5_folder), tuning="lora", lora={"targets": ["nowhere"]}
            )
        )


def test_a_base_is_told_by_the_bytes_of_its_weights_alone(tiny_t5_folder, tmp_path):
    def told(folder, **kwargs):
        return quantise.weights_hash(LanguageModelConfig(id=str(folder), **kwargs))

    moved = shutil.copytree(tiny_t5_folder, tmp_path / "moved")
    assert told(moved) == told(tiny_t5_folder) == told(tiny_t5_folder, tuning="frozen")
    weights = load_file(moved / "model.safetensors")
    weights["shared.weight"][0, 0] += 1e-3
    save_file(weights, moved / "model.safetensors", metadata={"format": "pt"})
    assert told(moved) != told(tiny_t5_folder)


def damaged(folder, out, name, data):
    shutil.copytree(folder, out)
    if data is None:
        (out / name).unlink()
    else:
        (out / name).write_bytes(data)
    return LanguageModelConfig(id=str(out), tuning="frozen")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("model.safetensors", b"\x10" * 64),
        ("model.safetensors", None),
        ("config.json", b"{"),
        ("config.json", None),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", None),
    ],
)
def test_a_missing_or_damaged_file_of_a_base_is_one_sentence(tiny_t5_folder, tmp_path, name, data):
    config = damaged(tiny_t5_folder, tmp_path / "lm", name, data)
    with pytest.raises(ConfigError, match=r"model\.lm\.id") as error:
        T5Language(config)
    assert str(tmp_path / "lm") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_came_out_empty_is_refused(tiny_t5_folder, monkeypatch):
    # What transformers 5 makes of T5Tokenizer(vocab_file=...), in silence.
    monkeypatch.setattr(
        quantise.AutoTokenizer, "from_pretrained", lambda *_, **__: ["<pad>", "</s>", "<unk>"]
    )
    with pytest.raises(ConfigError, match=r"the tokenizer of .* knows 3 tokens"):
        T5Language(LanguageModelConfig(id=str(tiny_t5_folder), tuning="frozen"))


def test_weights_that_a_base_lacks_are_refused_and_not_drawn_at_random(tiny_t5_folder, tmp_path):
    config = damaged(tiny_t5_folder, tmp_path / "lm", "none", b"")
    weights = load_file(tmp_path / "lm" / "model.safetensors")
    del weights["decoder.block.1.layer.0.SelfAttention.q.weight"]
    save_file(weights, tmp_path / "lm" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"lacks 1 weights .*decoder\.block\.1\.layer\.0\.SelfAttention\.q"
    ):
        T5Language(config)


def test_an_id_that_is_nowhere_is_one_sentence():
    for load in (T5Language, quantise.weights_hash):
        with pytest.raises(
            ConfigError, match=r"model\.lm\.id: 'no-one/no-such-t5' cannot be loaded"
        ):
            load(LanguageModelConfig(id="no-one/no-such-t5"))


def test_a_folder_without_weights_is_named(tiny_t5_folder, tmp_path):
    config = damaged(tiny_t5_folder, tmp_path / "lm", "model.safetensors", None)
    with pytest.raises(ConfigError, match=r"no model\.safetensors and no pytorch_model\.bin"):
        quantise.weights_hash(config)


def test_loading_in_4_bits_writes_nothing_to_the_terminal(tiny_t5_folder):
    """In a process of its own: these lines are written at the first import, and once alone."""
    code = (
        "from harness.config.schema import LanguageModelConfig\n"
        "from harness.model.language.t5 import T5Language\n"
        f"T5Language(LanguageModelConfig(id={json.dumps(str(tiny_t5_folder))}))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_other_warnings_of_the_silenced_places_still_come_through(caplog):
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")
    with caplog.at_level(logging.WARNING, logger=log.name):
        log.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "x")
        log.warning("another matter")
    assert [record.message for record in caplog.records] == ["another matter"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("is_gradient_checkpointing is old", FutureWarning, stacklevel=1)
    assert caught, "the filter holds only while peft builds its model"
