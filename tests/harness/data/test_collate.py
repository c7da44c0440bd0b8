"""The Collator: which texts and answers are drawn, what a row points at, what counts, and what is
cut.
"""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch

import toy_batch
from harness.config.schema import DataConfig, PromptsConfig
from harness.data.collate import Collator, drawn, group_by_length, most_common
from shards.loader import Loader
from shards.read import Sample
from shards.record import Record, Text
from shards.write import write_shards


@pytest.fixture(scope="module")
def tokenizer():
    from tiny_models import tiny_tokenizer

    return tiny_tokenizer()


def collate(
    tokenizer, samples, *, seed: int = 0, eos_weight: float = 1.0, training: bool = True, **data
):
    return Collator(tokenizer, DataConfig(**data), PromptsConfig(), seed, eos_weight, training)(
        samples
    )


def words(tokenizer, batch) -> list[str]:
    return [tokenizer.decode(row, skip_special_tokens=True) for row in batch.labels_TL]


def test_each_row_points_at_what_it_was_made_from(tokenizer):
    batch = collate(tokenizer, toy_batch.samples())
    assert [c.text.id for c in batch.contexts] == ["c0", "q0", "q1", "c1", "q2"]
    assert batch.text_ids_T == ("c0",) * 5 + ("q0", "q1", "c1", "q2")
    for row, context in enumerate(batch.contexts):
        assert context.record.key == str(batch.image_of_C[row].item())
        ids = batch.prompt_ids_CL[row][batch.prompt_mask_CL[row]].tolist()
        assert ids == tokenizer(context.prompt)["input_ids"]
    assert words(tokenizer, batch) == [
        *toy_batch.CAPTIONS,
        "down",
        "yes",
        "a child in a pink dress",
        "no",
    ]
    for row, features in enumerate(s.payload for s in toy_batch.samples()):
        assert torch.equal(batch.features_IPD[row], torch.from_numpy(features))


def test_weight_is_1_on_words_and_that_of_the_config_on_the_end_and_0_on_padding(tokenizer):
    batch = collate(tokenizer, toy_batch.samples(), eos_weight=0.25)
    for ids, weight in zip(batch.labels_TL.tolist(), batch.weight_TL.tolist(), strict=True):
        length = ids.index(1) + 1
        assert ids[length:] == [0] * (len(ids) - length)
        assert weight == [1.0] * (length - 1) + [0.25] + [0.0] * (len(ids) - length)
    assert batch.weight == batch.weight_TL.sum()


def test_a_sets_loss_weight_multiplies_the_weights_of_its_targets_alone(tokenizer):
    first, second = toy_batch.samples()
    mixture = [first, replace(second, set_index=1)]
    plain = Collator(tokenizer, DataConfig(), PromptsConfig())
    before = plain(mixture)
    ones = replace(plain, loss_weights=(1.0, 1.0))(mixture)
    assert ones.weight_TL.equal(before.weight_TL), "the default is the same bits"
    after = replace(plain, loss_weights=(0.25, 1.0))(mixture)
    set_of_T = before.image_of_C[before.context_of_T]
    assert after.weight_TL[set_of_T == 0].equal(0.25 * before.weight_TL[set_of_T == 0])
    assert after.weight_TL[set_of_T == 1].equal(before.weight_TL[set_of_T == 1])
    assert after.labels_TL.equal(before.labels_TL)


def test_rows_are_grouped_by_length_where_that_saves_enough():
    assert group_by_length([3] * 1000) == ((list(range(1000)), 3),)
    assert group_by_length([9, 3, 27]) == (
        ([1, 0, 2], 27),
    )  # 24 + 18 positions of padding are not worth a cut
    lengths = [27, 10] * 40 + [12] * 40
    groups = group_by_length(lengths)
    assert [(len(rows), longest) for rows, longest in groups] == [(80, 12), (40, 27)]
    assert all(lengths[row] <= longest for rows, longest in groups for row in rows)
    assert sorted(row for rows, _ in groups for row in rows) == list(range(120))


def test_on_a_gpu_a_group_has_to_save_more_since_it_launches_every_kernel_anew(tokenizer):
    few, many = [27, 10] * 40, [27, 10] * 130  # 680 and 2,210 positions of padding
    assert [len(group_by_length(lengths)) for lengths in (few, many)] == [2, 2]
    assert [len(group_by_length(lengths, on_gpu=True)) for lengths in (few, many)] == [1, 2]
    config = toy_batch.config("t5")
    on_cpu = Collator.of(config, tokenizer)
    on_gpu = Collator.of(config, tokenizer, on_gpu=True)
    first = toy_batch.samples()[0]
    text = replace(first.record.texts[0], task="caption", targets=("a", "a dog " * 9) * 40)
    sample = replace(first, record=replace(first.record, texts=(text,)))
    made = on_cpu([sample]), on_gpu([sample])
    assert [len(batch.groups) for batch in made] == [2, 1]
    assert made[0].labels_TL.equal(made[1].labels_TL)


def test_what_cannot_be_read_and_fillers_are_left_out(tokenizer):
    good, other = toy_batch.samples()
    filler = Sample(None, None, "", -1, -1, weight=0.0)
    broken = Sample(None, None, "", 0, 5, weight=0.0, error="damaged")
    batch = collate(tokenizer, [filler, good, broken, replace(other, weight=0.0)])
    assert batch.images == 1
    assert {c.record.key for c in batch.contexts} == {"0"}
    assert collate(tokenizer, [filler, broken]) is None
    assert collate(tokenizer, []) is None


def test_a_filler_has_the_shape_of_a_batch_and_no_weight(tokenizer):
    made = Collator(tokenizer, DataConfig(), PromptsConfig())
    pixels, features = made.filler((8, 8, 3), False), made.filler((6, 32), True)
    assert pixels.pixels_IHW3.shape == (1, 8, 8, 3)
    assert pixels.features_IPD is None
    assert features.features_IPD.dtype == torch.float16
    assert pixels.weight == features.weight == 0
    assert not made.truncated


@pytest.mark.parametrize("count", [1, 3, 50])
def test_texts_are_drawn_per_image_and_come_in_their_own_order(tokenizer, count):
    batch = collate(tokenizer, toy_batch.samples(), texts_per_image=count)
    per_image = np.bincount(batch.image_of_C[batch.context_of_T].numpy())
    assert per_image.tolist() == [min(count, 7), min(count, 2)]
    order = [
        words(tokenizer, collate(tokenizer, toy_batch.samples())).index(w)
        for w in words(tokenizer, batch)
    ]
    assert order == sorted(order)
    scored = collate(tokenizer, toy_batch.samples(), texts_per_image=count, training=False)
    assert len(scored.labels_TL) == 9, "an evaluation draws nothing"


def test_every_text_has_its_turn_over_the_epochs_and_all_equally(tokenizer):
    seen = [
        word
        for epoch in range(350)
        for word in words(
            tokenizer, collate(tokenizer, toy_batch.samples(epoch)[:1], texts_per_image=1)
        )
    ]
    counts = [seen.count(word) for word in (*toy_batch.CAPTIONS, "down", "yes")]
    assert sum(counts) == 350
    assert all(25 <= count <= 75 for count in counts), counts


def test_what_is_drawn_depends_on_seed_epoch_and_text_and_not_on_the_company(tokenizer):
    def drawn_of(samples, **kwargs):
        batch = collate(tokenizer, samples, texts_per_image=2, **kwargs)
        image_of_T = batch.image_of_C[batch.context_of_T].tolist()
        keys = [batch.contexts[c].record.key for c in batch.context_of_T.tolist()]
        assert len(image_of_T) == len(keys)
        return {
            key: [w for k, w in zip(keys, words(tokenizer, batch), strict=True) if k == key]
            for key in keys
        }

    both = drawn_of(toy_batch.samples())
    assert drawn_of(toy_batch.samples()[::-1]) == both
    assert drawn_of(toy_batch.samples()[:1]) | drawn_of(toy_batch.samples()[1:]) == both
    assert len({str(drawn_of(toy_batch.samples(epoch)[:1])) for epoch in range(12)}) > 3
    assert len({str(drawn_of(toy_batch.samples()[:1], seed=seed)) for seed in range(12)}) > 3


def test_two_records_whose_texts_have_the_same_ids_are_drawn_apart(tokenizer):
    def pick(key: str, epoch: int) -> str:
        record = Record(key, "own", "train", key, (Text("caption", "caption", toy_batch.CAPTIONS),))
        sample = replace(toy_batch.samples(epoch)[0], record=record)
        return words(tokenizer, collate(tokenizer, [sample], texts_per_image=1))[0]

    assert sum(pick("a", epoch) == pick("b", epoch) for epoch in range(40)) < 20


def test_answers_are_drawn_by_how_many_annotators_gave_them_or_the_most_common_is_taken(tokenizer):
    text = Text("q", "vqa", ("yes", "no", "yes", "", "yes", "red"), "is it?")
    record = Record("0", "toy", "train", "0", (text,))

    def answers(epochs: int, **kwargs) -> list[str]:
        samples = [replace(toy_batch.samples(epoch)[0], record=record) for epoch in range(epochs)]
        return [words(tokenizer, collate(tokenizer, [sample], **kwargs))[0] for sample in samples]

    given = answers(500, answer="drawn")
    assert set(given) == {"yes", "no", "red"}
    assert 250 < given.count("yes") < 350
    assert 65 < given.count("no") < 135
    assert set(answers(5)) == set(answers(5, answer="drawn", training=False)) == {"yes"}
    assert most_common(("b", "a", "a", "b", " ")) == "b"


def test_a_draw_is_a_hash_of_all_its_arguments():
    assert drawn(0, 1, "a", "b") == drawn(0, 1, "a", "b")
    others = [
        drawn(1, 1, "a", "b"),
        drawn(0, 2, "a", "b"),
        drawn(0, 1, "ab", ""),
        drawn(0, 1, "a", "c"),
    ]
    assert len({drawn(0, 1, "a", "b"), *others}) == 5


def test_texts_that_are_cut_end_in_eos_are_counted_and_named_once(tokenizer, caplog):
    made = toy_batch.collator(tokenizer, max_prompt_tokens=6, max_target_tokens=4)
    with caplog.at_level(logging.WARNING, logger="harness.data.collate"):
        batch, _ = made(toy_batch.samples()), made(toy_batch.samples())
    whole = collate(tokenizer, toy_batch.samples())
    prompts, targets = (
        (whole.prompt_mask_CL.sum(dim=1) > 6).sum(),
        (whole.weight_TL.sum(dim=1) > 4).sum(),
    )
    assert made.truncated == {"prompt": 2 * prompts, "target": 2 * targets}
    assert batch.labels_TL.shape[1] == 4
    assert batch.prompt_ids_CL.shape[1] == 6
    assert ((batch.labels_TL == 1).sum(dim=1) == 1).all()
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2
    assert "data.max_target_tokens=4" in messages[1]
    assert repr(toy_batch.CAPTIONS[0]) in messages[1] or repr(toy_batch.CAPTIONS[1]) in messages[1]


def test_a_text_that_just_fits_is_not_cut(tokenizer):
    length = int(collate(tokenizer, toy_batch.samples()).weight_TL.sum(dim=1).max())
    made = toy_batch.collator(tokenizer, max_target_tokens=length)
    made(toy_batch.samples())
    assert not made.truncated["target"]
    shorter = toy_batch.collator(tokenizer, max_target_tokens=length - 1)
    shorter(toy_batch.samples())
    assert shorter.truncated["target"] >= 1


@pytest.fixture(scope="module")
def two_sets(tmp_path_factory):
    """20 and 4 pictures, each with five captions."""
    root = tmp_path_factory.mktemp("mixture")
    for name, count in (("large", 20), ("small", 4)):
        texts = (Text("c", "caption", toy_batch.CAPTIONS),)
        records = [Record(f"{name}{i}", name, "train", str(i), texts) for i in range(count)]
        write_shards(((r, b"x", "jpg") for r in records), root / name, dataset=name, split="train")
    return [str(root / "large"), str(root / "small")]


def captions_by_step(
    tokenizer, sets, *, world: int, workers: int = 0, epochs: int = 1
) -> list[list[tuple[str, str]]]:
    """(key, caption) of every global batch, all ranks together."""
    steps: dict[tuple[int, int], list[tuple[str, str]]] = {}
    made = toy_batch.collator(tokenizer, texts_per_image=1)
    for rank in range(world):
        loader = Loader(
            sets,
            [1, 10],
            global_batch=4,
            seed=3,
            rank=rank,
            world_size=world,
            workers=workers,
            decode=nothing,
        )
        for state, samples in loader.iterate(epochs=epochs):
            batch = made(samples)
            step = steps.setdefault((state.epoch, state.position), [])
            if batch is not None:
                keys = [batch.contexts[c].record.key for c in batch.context_of_T.tolist()]
                step += zip(keys, words(tokenizer, batch), strict=True)
    return [sorted(step) for step in steps.values()]


def nothing(sample: Sample) -> np.ndarray:
    return np.zeros((2, 2, 3), np.uint8)


def test_a_heavy_set_that_passes_several_times_in_an_epoch_draws_other_captions_each_time(
    tokenizer, two_sets
):
    steps = captions_by_step(tokenizer, two_sets, world=1)
    taken: dict[str, list[str]] = {}
    for key, caption in (pair for step in steps for pair in step):
        taken.setdefault(key, []).append(caption)
    small = [captions for key, captions in taken.items() if key.startswith("small")]
    assert min(map(len, small)) >= 4, (
        "the weights make the small set pass several times in the first epoch"
    )
    assert all(len(set(captions)) > 1 for captions in small), small


def test_captions_are_the_same_whatever_the_ranks_and_workers(tokenizer, two_sets):
    alone = captions_by_step(tokenizer, two_sets, world=1, epochs=2)
    assert captions_by_step(tokenizer, two_sets, world=3, epochs=2) == alone
    assert captions_by_step(tokenizer, two_sets, world=1, workers=2, epochs=2) == alone
