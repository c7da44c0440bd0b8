"""`harness unpack`: one file of a pretrained model becomes a folder, once, and only the file that
was meant.
"""

import hashlib
import importlib.util
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from harness.config.schema import BridgeConfig, LanguageModelConfig
from harness.errors import ConfigError
from harness.model.bridge import Bridge
from harness.model.language.decoder import DecoderLanguage
from harness.model.language.quantise import weights_hash
from harness.model.start import start_from
from harness.unpack import SOURCE, unpack

CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ m['content'] }}<|im_end|>{% endfor %}"


def tiny_gguf(file, missing=None):
    """Writes a GGUF as llama.cpp's of SmolLM2, with tied embeddings, at toy size."""
    gguf = pytest.importorskip("gguf", reason="the extra `smollm` is not installed")
    width, layers, heads, groups, inner = 32, 2, 4, 2, 64
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, *"abcdefghijklmnop", "Ġ", "ab", "Ġa"]
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(groups)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(width // heads)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT)
    draws = np.random.default_rng(0)

    def add(name, *shape):
        if name == missing:
            return None
        data = draws.normal(size=shape, scale=0.3).astype(np.float32)
        if len(shape) == 1:
            return writer.add_tensor(name, 1 + data)
        kind = gguf.GGMLQuantizationType.Q4_1
        writer.add_tensor(name, gguf.quants.quantize(data, kind), raw_dtype=kind)

    add("token_embd.weight", len(words), width)
    add("output_norm.weight", width)
    for layer in range(layers):
        add(f"blk.{layer}.attn_norm.weight", width)
        add(f"blk.{layer}.ffn_norm.weight", width)
        add(f"blk.{layer}.attn_q.weight", width, width)
        add(f"blk.{layer}.attn_output.weight", width, width)
        for name in ("attn_k", "attn_v"):
            add(f"blk.{layer}.{name}.weight", width * groups // heads, width)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{layer}.{name}.weight", inner, width)
        add(f"blk.{layer}.ffn_down.weight", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    return tiny_gguf(tmp_path_factory.mktemp("packed") / "tiny.gguf")


@pytest.fixture(scope="module")
def made(packed, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "lm"
    assert unpack(str(packed), out, sha256=sha256(packed)).is_new
    return out


def test_the_folder_says_what_transformers_says_of_the_gguf_itself(packed, made):
    theirs = AutoModelForCausalLM.from_pretrained(packed.parent, gguf_file=packed.name)
    ours = AutoModelForCausalLM.from_pretrained(made)
    ids = torch.tensor([[1, 3, 4, 20, 5, 2]])
    with torch.no_grad():
        assert torch.equal(ours(ids).logits, theirs(ids).logits)
    with safe_open(made / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # tied
    tokenizer = AutoTokenizer.from_pretrained(made)
    told = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
    message = [{"role": "user", "content": "ab a"}]
    ids = tokenizer.apply_chat_template(message, return_dict=False)
    assert ids == told.apply_chat_template(message, return_dict=False)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    config = json.loads((made / "config.json").read_text())
    assert config["model_type"] == "llama"
    assert config["num_key_value_heads"] == 2
    assert not {"quantization_config", "_name_or_path"} & set(config)


def test_a_finished_folder_is_left_and_a_damaged_one_made_again(packed, tmp_path):
    out = tmp_path / "lm"
    assert unpack(str(packed), out, dtype="bf16").is_new
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.get_tensor("model.embed_tokens.weight").dtype == torch.bfloat16
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert not unpack(str(packed), out, dtype="bf16").is_new
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    (out / "tokenizer.json").unlink()
    assert unpack(str(packed), out, dtype="bf16").is_new
    assert (out / "tokenizer.json").is_file()
    with pytest.raises(ConfigError, match=r"was unpacked from tiny\.gguf .*bf16.*: remove it"):
        unpack(str(packed), out)


def test_what_a_killed_process_left_is_no_folder_of_a_model(packed, tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("harness.unpack.write_whole", killed)
    out = tmp_path / "lm"
    with pytest.raises(KeyboardInterrupt):
        unpack(str(packed), out)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert unpack(str(packed), out).is_new


def test_another_file_is_refused_before_anything_is_made(packed, tmp_path):
    with pytest.raises(ConfigError, match=r"has the SHA-256 .*, expected 00ff: it is another"):
        unpack(str(packed), tmp_path / "lm", sha256="00FF")
    with pytest.raises(ConfigError, match="there is no such file, and no package no_such is"):
        unpack("no_such/tiny.gguf", tmp_path / "lm")
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(packed.read_bytes()[:2000])
    with pytest.raises(ConfigError, match="cannot be read"):
        unpack(str(broken), tmp_path / "lm")
    broken.write_bytes(b"text")
    with pytest.raises(ConfigError, match="neither a GGUF file nor a zip"):
        unpack(str(broken), tmp_path / "lm")
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="was not unpacked from a file"):
        unpack(str(packed), tmp_path / "own")
    assert (tmp_path / "own" / "notes.txt").is_file()
    assert not (tmp_path / "lm").exists()


def test_without_its_package_a_gguf_names_the_extra(packed, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "gguf" else real(name)
    )
    with pytest.raises(ConfigError, match=r"pip install .*\[smollm\]"):
        unpack(str(packed), tmp_path / "lm")


def test_a_bert_from_the_zip_of_a_package_starts_a_qformer(tmp_path, monkeypatch, capsys):
    bert = BertModel(
        BertConfig(
            vocab_size=50,
            hidden_size=24,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=96,
        )
    )
    bert.save_pretrained(tmp_path / "bert")
    package = tmp_path / "site" / "some_bert"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('a package is never imported')")
    with zipfile.ZipFile(package / "model.zip", "w") as zipped:
        for file in (tmp_path / "bert").iterdir():
            zipped.write(file, f"inside/{file.name}")
        zipped.writestr("inside/1_Pooling/config.json", "{}")
        zipped.writestr("inside/run.py", "raise SystemExit")
        zipped.writestr("../outside.json", "{}")
    monkeypatch.syspath_prepend(tmp_path / "site")
    out = tmp_path / "models" / "bert"
    made = unpack("some_bert/model.zip", out, sha256=sha256(package / "model.zip"))
    assert set(made.left_out) == {
        "inside/1_Pooling/config.json",
        "inside/run.py",
        "../outside.json",
    }
    assert {each.name for each in out.iterdir()} == {"config.json", "model.safetensors", SOURCE}
    assert not unpack("some_bert/model.zip", out).is_new
    with pytest.raises(ConfigError, match="is a zip, whose weights are taken as they are"):
        unpack("some_bert/model.zip", out, dtype="bf16")

    config = BridgeConfig(
        query_tokens=4, layers=2, width=24, heads=4, cross_attention_frequency=2, init_from=str(out)
    )
    bridge = Bridge(config, patch_width=16, lm_width=24, patches=4, embedding_rms=1.0)
    qformer = bridge.body
    told = start_from(bridge, config, {})
    layer = qformer.qformer.encoder.layer[1]
    theirs = bert.encoder.layer[1]
    assert torch.equal(layer.attention.attention.key.weight, theirs.attention.self.key.weight)
    assert torch.equal(layer.output_query.dense.weight, theirs.output.dense.weight)
    assert told.startswith("bridge: 34 of 45 weights come from ")


def test_a_zip_of_two_models_or_a_damaged_one_is_one_sentence(tmp_path):
    two = tmp_path / "two.zip"
    with zipfile.ZipFile(two, "w") as zipped:
        for name in ("b/config.json", "a/config.json", "a/model.safetensors"):
            zipped.writestr(name, "{}")
    with pytest.raises(ConfigError, match=r"two\.zip holds several models \(a, b\)"):
        unpack(str(two), tmp_path / "out")
    damaged = tmp_path / "damaged.zip"
    with zipfile.ZipFile(damaged, "w") as zipped:
        zipped.writestr("config.json", "0123456789")
    damaged.write_bytes(damaged.read_bytes().replace(b"0123456789", b"0123x56789"))
    with pytest.raises(ConfigError, match=r"damaged\.zip cannot be unpacked .*CRC"):
        unpack(str(damaged), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_gguf_that_lacks_a_layer_is_refused(packed, tmp_path):
    """As the first part of one that was split does."""
    file = tiny_gguf(tmp_path / "part.gguf", missing="blk.1.ffn_up.weight")
    config = LanguageModelConfig(
        kind="decoder", tuning="frozen", id=str(tmp_path), gguf_file=file.name
    )
    with pytest.raises(ConfigError, match="lacks 1 weights of a LlamaForCausalLM"):
        DecoderLanguage(config)


def test_the_verb_says_what_it_did_and_refuses_in_one_sentence(packed, tmp_path):
    def typed(*arguments):
        line = [sys.executable, "-m", "harness", "unpack", str(packed), *arguments]
        return subprocess.run(line, capture_output=True, text=True, check=False)

    out = tmp_path / "lm"
    ran = typed("--out", str(out))
    assert ran.returncode == 0, ran.stderr
    assert f"SHA-256 {sha256(packed)}, which nothing was compared with" in ran.stdout
    assert f"{out}: made, " in ran.stdout
    assert "Converting" not in ran.stderr
    ran = typed("--out", str(out), "--sha256", "0")
    assert ran.returncode == 2
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("tuning", ["frozen", "qlora"])
def test_a_run_may_read_the_gguf_itself_as_it_would_read_the_folder(packed, made, tuning):
    files = {"id": str(packed.parent), "gguf_file": packed.name}, {"id": str(made)}
    read = [
        DecoderLanguage(LanguageModelConfig(kind="decoder", tuning=tuning, **place))
        for place in files
    ]
    ids = torch.tensor([[1, 3, 4, 20, 5, 2]])
    with torch.no_grad():
        logits = [language.base(ids).logits for language in read]
    assert torch.equal(*logits)
    assert [language.tokenizer.eos_token for language in read] == ["<|im_end|>"] * 2
    hashes = {weights_hash(LanguageModelConfig(kind="decoder", **place)) for place in files}
    assert len(hashes) == 2
