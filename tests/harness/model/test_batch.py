"""A batch brings lists of what counts in it along; they are those of its own weights, always."""

from dataclasses import replace

import pytest
import torch

import toy_batch
from harness.data import collate as batches
from harness.evaluate.predict import select


@pytest.fixture
def model(tiny_t5_folder, monkeypatch):
    monkeypatch.setattr(batches, "MIN_PADDING_SAVED", 1)
    return toy_batch.model(tiny_t5_folder)


@pytest.fixture
def batch(model):
    return toy_batch.collator(model.tokenizer)(toy_batch.samples()).to("cpu")


@pytest.mark.parametrize("whole", [True, False])
def test_the_lists_name_the_tokens_with_a_weight_each_once_with_its_target(batch, whole):
    seen_TL = torch.zeros_like(batch.weight_TL)
    groups = list(batch.target_groups(whole))
    assert (len(groups) == 1) == whole
    for rows, part in groups:
        kept_TL = part.weight_TL != 0
        assert rows.kept_K.tolist() == kept_TL.flatten().nonzero()[:, 0].tolist()
        assert rows.target_of_K.tolist() == rows.rows_T[kept_TL.nonzero()[:, 0]].tolist()
        seen_TL[rows.rows_T, : part.labels_TL.shape[1]] += part.weight_TL
    assert torch.equal(seen_TL, batch.weight_TL)


def test_rows_of_packed_targets_are_laid_out_beforehand_for_a_decoder_alone(batch):
    plain = replace(batch, packs=False, index=None).indexed()
    assert plain.index.packed == ()
    assert batch.index.packed
    for by_image in (True, False):
        laid_out = batch.packed(False, by_image)
        asked = plain.packed(False, by_image)
        assert torch.equal(laid_out.source_RW, asked.source_RW)
        assert torch.equal(laid_out.place_RW, asked.place_RW)


def test_weights_put_in_place_of_others_are_those_that_count(model, batch):
    half_TL = batch.weight_TL.clone()
    half_TL[:4] = 0
    for first, second in ((batch.weight_TL, half_TL), (half_TL, batch.weight_TL)):
        moved = replace(batch, weight_TL=first).to("cpu")
        out = model.loss(replace(moved, weight_TL=second))
        assert torch.equal(out.sum_T != 0, second.any(dim=1))


def test_contexts_that_are_selected_keep_the_losses_of_their_targets(model, batch):
    whole = model.eval().loss(batch).sum_T
    chosen = select(batch, [3, 1])
    kept_T = torch.tensor([5, 7])  # of context 1 and 3, in the order of the targets
    assert model.loss(chosen).sum_T == pytest.approx(whole[kept_T].tolist(), rel=1e-5)
