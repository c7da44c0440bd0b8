"""The language model's seam: a grouped batch gives what T5 itself gives row by row, and no more
work than that.
"""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

import toy_batch
from harness.config.schema import LanguageModelConfig
from harness.data import collate as batches
from harness.errors import ConfigError
from harness.model.language.t5 import T5Language, _scales_output


@pytest.fixture(scope="module")
def model(tiny_t5_folder):
    return toy_batch.model(tiny_t5_folder, tuning="full")


@pytest.fixture
def batch(model):
    return toy_batch.collator(model.tokenizer)(toy_batch.samples())


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
    loss, grads = toy_batch.gradients(model, batch)
    model.zero_grad(set_to_none=True)
    expected = toy_batch.loss_of_t5(model, batch)
    expected.backward()
    own = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert loss == pytest.approx(expected.item(), abs=1e-6)
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
