"""A share is the same wherever it is collated: in the process, by one worker or by several."""

import pickle
from collections import Counter
from contextlib import closing
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory

import toy_batch
from harness.config.schema import DataConfig, PromptsConfig
from harness.data import collate as batches
from harness.data.collate import Collator
from harness.data.images import ImageDecoder
from harness.data.share import Share, ShareMaker
from harness.model.batch import Batch
from shards.files import ShardError
from shards.loader import Loader, Step
from shards.read import Sample
from shards.record import Record, Text
from toy_runs import make_shards

DECODE = ImageDecoder(32, "crop", 10**6)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards") / "set", 22)


@pytest.fixture
def collate(tiny_t5_folder, monkeypatch):
    monkeypatch.setattr(batches, "MIN_PADDING_SAVED", 1)
    tokenizer = toy_batch.model(tiny_t5_folder).tokenizer
    return Collator(tokenizer, DataConfig(max_target_tokens=10), PromptsConfig(), training=True)


def shares(shards, make, workers, decode=DECODE, **settings):
    loader = Loader([str(shards)], global_batch=8, workers=workers, decode=decode, **settings)
    with closing(loader.collated(make, epochs=2)) as found:
        yield from found


def tensors(batch: Batch):
    found = []
    batch.mapped(lambda tensor: found.append(tensor) or tensor)
    return found


def alike(one: Batch, other: Batch) -> bool:
    rest = [f.name for f in fields(Batch) if f.name in ("groups", "text_ids_T")]
    return (
        all(map(torch.equal, tensors(one), tensors(other)))
        and [t.dtype for t in tensors(one)] == [t.dtype for t in tensors(other)]
        and all(getattr(one, name) == getattr(other, name) for name in rest)
        and [c.record for c in one.contexts] == [c.record for c in other.contexts]
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_what_workers_collate_is_what_the_process_itself_does_bit_for_bit(shards, collate, workers):
    make = ShareMaker(collate, 3)
    here = list(shares(shards, make, 0))
    there = list(shares(shards, make, workers))
    assert len(here) == len(there) == 6
    assert any(len(batch.groups) > 1 for _, share in here for batch in share.batches)
    for (state, one), (other_state, other) in zip(here, there, strict=True):
        assert state == other_state
        assert len(one.batches) == len(other.batches)
        assert all(map(alike, one.batches, other.batches))
        assert one.cut == other.cut
        for sample, same in zip(one.samples, other.samples, strict=True):
            assert np.array_equal(sample.payload, same.payload)
            assert replace(sample, payload=None) == replace(same, payload=None)


@pytest.mark.parametrize("pictures", [(), (0,), (3, 4)], ids=str)
def test_batches_without_a_picture_come_from_a_worker_too(collate, monkeypatch, pictures):
    def sample(n):
        text = Text("t", "vqa", ("four",), "what is two and two?")
        record = Record(f"k{n}", "toy", "train", "", (text,), has_picture=n in pictures)
        payload = np.full((32, 32, 3), n, np.uint8) if n in pictures else None
        return Sample(record, payload, "png" if n in pictures else "", 0, n)

    here = ShareMaker(collate, 2)([sample(n) for n in range(6)])
    monkeypatch.setattr("harness.data.share.get_worker_info", lambda: "a worker's")
    sent = ShareMaker(collate, 2)([sample(n) for n in range(6)])
    there = pickle.loads(pickle.dumps(sent))
    assert len(there.batches) == 3
    assert all(map(alike, here.batches, there.batches))
    assert [batch.images for batch in there.batches] == [batch.images for batch in here.batches]
    for one, other in zip(here.samples, there.samples, strict=True):
        assert np.array_equal(one.payload, other.payload)


def test_the_index_of_a_batch_from_a_worker_holds_for_its_weights(shards, collate):
    for _, share in shares(shards, ShareMaker(collate, 3), 1):
        assert all(batch.indexed() is batch for batch in share.batches)


def test_texts_cut_by_workers_are_counted_and_told_once_by_whoever_hears_of_them(
    shards, collate, caplog
):
    for _, share in shares(shards, ShareMaker(collate, 3), 2):
        for kind, texts in share.cut:
            collate.note_cut(kind, texts)
    counts = Counter(collate.truncated)
    assert counts["target"] > 0
    assert sum("max_target_tokens=10" in message for message in caplog.messages) == 1

    alone = replace(collate, truncated=Counter())
    loader = Loader([str(shards)], global_batch=8, decode=DECODE)
    for _, samples in loader.iterate(epochs=2):
        for start in range(0, 8, 3):
            alone(samples[start : start + 3])
    assert alone.truncated == counts


class Raises:
    def __call__(self, samples):
        raise ShardError("its question q has no answer to learn")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_collating_raises_is_one_sentence_also_from_a_worker(shards, workers):
    with pytest.raises(ShardError, match=r"^its question q has no answer to learn$"):
        list(shares(shards, Raises(), workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_the_next_batch_can_be_had_ahead_and_comes_all_the_same_and_the_end_is_none(
    shards, collate, workers
):
    loader = Loader([str(shards)], global_batch=8, workers=workers, decode=DECODE)
    seen, ahead = [], []
    with closing(loader.collated(ShareMaker(collate, 3), epochs=1)) as found:
        for _, share in found:
            seen.append(share)
            ahead.append(loader.coming())
    assert ahead[-1] is None
    assert ahead[:-1] == seen[1:]
    assert all(isinstance(share, Share) for share in seen)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_cannot_be_read_is_named_and_the_rest_is_learnt(tmp_path, collate, workers):
    folder = make_shards(tmp_path / "set", 8)
    found = next(shares(folder, ShareMaker(collate, 3), workers, only_the_third))
    assert found[0].position == 8
    assert sum(batch.images for batch in found[1].batches) == 1
    errors = [sample.error for sample in found[1].samples]
    assert sum(error is None for error in errors) == 1
    assert sum(str(error).endswith("ValueError: no picture") for error in errors) == 7


def only_the_third(sample):
    if sample.index != 3:
        raise ValueError("no picture")
    return DECODE(sample)


def test_what_torchs_loader_pins_is_the_share_and_its_index_stays_that_of_its_weights(
    monkeypatch, collate
):
    record = Record("0", "d", "s", "0", (Text("c", "caption", ("a dog", "a black and white dog")),))
    sample = toy_batch.samples()[0]
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.clone)
    share = ShareMaker(collate, 2)([replace(sample, record=record)])
    step, pinned, samples = pin_memory((Step(0, 0, 1), share, [sample]))
    assert (step, samples) == (Step(0, 0, 1), [sample])
    assert all(map(alike, share.batches, pinned.batches))
    assert pinned.batches[0].indexed() is pinned.batches[0]
    assert pinned.batches[0].labels_TL is not share.batches[0].labels_TL
