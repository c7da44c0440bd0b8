"""BLIP-2's first stage: one loss for any micro-batch, the masks, the text side of a BERT."""

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel

from first_stage_toy import captioned, first_stage
from harness.errors import ConfigError
from harness.model.first_stage import contrast, similarity
from harness.train.first_stage import pictures_of
from tiny_models import tiny_tokenizer
from toy_batch import ENCODER, TOKENS, WIDTH, collator, config, furthest


@pytest.fixture(scope="module")
def model(tiny_t5_folder):
    return first_stage(tiny_t5_folder)


def learnt(model, samples, size, *further):
    """The losses of the objectives over the samples as one global batch, and all gradients."""
    model.zero_grad(set_to_none=True)
    collate = collator(model.tokenizer)
    batches = [collate(samples[at : at + size]) for at in range(0, len(samples), size)]
    batches += further
    numbers = [pictures_of(batch) for batch in batches]
    weight = sum(batch.weight for batch in batches)
    embedded = [model.embedded(batch) for batch in batches]
    portions = model.portions(embedded, *zip(*numbers, strict=True), weight)
    parts = 0
    for batch, portion in zip(batches, portions, strict=True):
        out = model(batch, portion)
        out.sum.backward()
        parts = parts + out.sum_T
    return parts, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradients_are_the_same_for_any_micro_batch(model, size):
    parts, gradients = learnt(model, captioned(), 8)
    of_small, smaller = learnt(model, captioned(), size)
    assert of_small.tolist() == pytest.approx(parts.tolist(), abs=1e-5)
    assert furthest(gradients, smaller) < 1e-5


def test_the_gradients_are_those_of_the_loss_written_in_one_piece(model):
    batch = collator(model.tokenizer)(captioned())
    parts, gradients = learnt(model, captioned(), 4)
    model.zero_grad(set_to_none=True)
    image_IQE, text_TE = model.bridge.embed(
        model.patch_tokens(batch), model._words(model.lm.cls, batch)
    )
    sim_IT = model.bridge.log_scale.exp() * similarity(image_IQE, text_TE)
    own_IT = batch.image_of_C[batch.context_of_T] == torch.arange(8)[:, None]
    captions = [
        -sim_IT[i].log_softmax(0)[own_IT[i]].mean() for i in range(8)
    ]  # of each picture alike
    pictures = [-sim_IT[:, t].log_softmax(0)[own_IT[:, t]].mean() for t in range(len(text_TE))]
    loss = (torch.stack(captions).mean() + torch.stack(pictures).mean()) / 2
    assert loss.item() == pytest.approx(parts[0].item(), abs=1e-5)
    loss.backward()
    for name in ("bridge.log_scale", "bridge.projection.image.weight", "bridge.body.query_tokens"):
        grad = model.get_parameter(name).grad
        if name != "bridge.body.query_tokens":  # which lm moves too
            assert torch.allclose(grad, gradients[name], atol=1e-5)


def test_a_picture_that_is_there_twice_is_no_negative():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 2, 3, generator=generator)
    text = torch.randn(2, 3, generator=generator)
    scale = torch.tensor([1.0])
    same = torch.tensor([7, 7])
    twice = contrast((image[[0, 0]], text[[0, 0]], same, same), scale)
    assert twice.item() == pytest.approx(np.log(2))  # both are told alike: nothing to push apart
    others = torch.tensor([7, 8])
    apart = contrast((image[[0, 0]], text, others, others), scale)
    assert apart.item() != pytest.approx(np.log(2), abs=1e-3)


def test_a_filler_counts_for_nothing_and_gives_every_weight_a_gradient(model):
    parts, gradients = learnt(model, captioned(), 4)
    filler = collator(model.tokenizer).filler((TOKENS, WIDTH), is_features=True)
    with_filler, more = learnt(model, captioned(), 4, filler)
    assert with_filler.tolist() == pytest.approx(parts.tolist(), abs=1e-6)
    assert furthest(gradients, more) < 1e-5


def test_later_words_change_no_earlier_one_and_no_word_changes_a_picture(model):
    body = model.bridge.body
    patches = model.bridge.normed(torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0)))
    ids = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, -1, -1]])
    other = ids.clone()
    other[0, 3] = 11
    with torch.no_grad():
        causal, changed = body.words(ids, patches), body.words(other, patches)
        assert torch.allclose(causal[:, :3], changed[:, :3], atol=1e-6)
        assert not torch.allclose(causal[0, 3:], changed[0, 3:], atol=1e-3)
        assert not torch.allclose(causal, body.words(ids, patches + 1), atol=1e-3)
        # without patches each word sees all words, but no padding
        alone, differs = body.words(ids), body.words(other)
        assert not torch.allclose(alone[0, 0], differs[0, 0], atol=1e-3)
        assert torch.allclose(alone[1, :3], body.words(ids[1:, :3])[0], atol=1e-6)
        # the queries of the causal pass are those of the picture alone
        seen = {}
        hook = body.qformer.register_forward_hook(lambda _, __, out: seen.update(out=out[0]))
        body.words(ids, patches)
        hook.remove()
        assert torch.allclose(seen["out"][:, : body.tokens], body(patches), atol=1e-6)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"cls_token": "[CLS]", "sep_token": "[SEP]"})
    tokenizer.eos_token = None
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    made = BertModel(
        BertConfig(vocab_size=len(tokenizer), intermediate_size=128, **size),
        add_pooling_layer=False,
    )
    made.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, made.eval()


def test_the_text_side_that_starts_from_a_bert_is_that_bert(bert, tiny_t5_folder):
    folder, theirs = bert
    model = first_stage(tiny_t5_folder, init_from=str(folder)).eval()
    words = model._words(model.lm.cls, collator(model.tokenizer)(captioned()))
    assert words[0, 0] == model.tokenizer.cls_token_id
    assert set(words.max(dim=1).values.tolist()) == {model.tokenizer.sep_token_id}
    with torch.no_grad():
        expected = theirs(words.clamp(min=0), attention_mask=words >= 0).last_hidden_state
        found = model.bridge.body.words(words)
    kept = words >= 0
    assert torch.allclose(found[kept], expected[kept], atol=1e-5)


def test_eight_pictures_are_learnt_by_heart(tiny_t5_folder):
    model = first_stage(tiny_t5_folder)
    batch = collator(model.tokenizer)(captioned(texts=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(120):
        optimizer.zero_grad()
        model(batch).sum.backward()
        optimizer.step()
    made = model.embedded(batch)
    assert similarity(made.image_IQE, made.text_TE).argmax(dim=1).tolist() == list(range(8))
    itc, lm = model(batch).sum_T.tolist()
    assert itc < 0.1
    assert lm < 1.0  # from 5.3


def test_questions_are_refused_by_name(model):
    from toy_batch import samples

    with pytest.raises(ConfigError, match="0 of toy train holds a question"):
        pictures_of(collator(model.tokenizer)(samples()))


@pytest.mark.parametrize(
    ("bridge", "objective", "named"),
    [
        ({"kind": "mean_pool"}, ["itc"], "model.bridge.kind"),
        ({"question_aware": True}, ["itc"], "model.bridge.question_aware"),
        ({"trainable": "projection"}, ["itc"], "model.bridge.trainable"),
        ({}, ["lm"], "train.objective"),
        ({}, [], "train.objective"),
    ],
)
def test_what_does_not_go_with_a_first_stage_is_named(bridge, objective, named):
    with pytest.raises(ValueError, match=f"does not go with this {named}: "):
        config("none", bridge=bridge, train={"objective": objective})


def test_features_of_another_encoder_are_refused_by_the_second_stage(tmp_path, model):
    from harness.model.bridge import Bridge
    from harness.model.start import start_from

    model.save_pretrained(tmp_path)
    settings = config("none", bridge={"init_from": str(tmp_path)}).model.bridge
    bridge = Bridge(settings, 32, 64, 6, 1.0)
    start_from(bridge, settings, ENCODER)
    assert bridge.has_learnt_norm
    for part in ("patch_norm", "body.qformer.encoder.layer.1.crossattention"):
        theirs = dict(model.bridge.get_submodule(part).named_parameters())
        for name, value in bridge.get_submodule(part).named_parameters():
            assert value.equal(theirs[name]), name
    assert bridge.body.query_tokens.equal(model.bridge.body.query_tokens)
    with pytest.raises(ConfigError, match="learnt from another vision encoder"):
        start_from(bridge, settings, ENCODER | {"hash": "f" * 64})
