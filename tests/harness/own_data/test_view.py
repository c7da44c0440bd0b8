"""The contact sheet: what the records hold, and what a run of a config makes of them."""

import re
from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoTokenizer

from harness.data.collate import Collator
from harness.own_data.as_seen import AsSeen
from harness.own_data.view import write_sheets
from shards.manifest import Manifest
from shards.read import Reader
from toy_runs import make_config, make_shards


@pytest.fixture(scope="module")
def config(root):
    made = make_config(root, root / "clip", root / "t5")
    data = made.data.model_copy(update={"max_target_tokens": 6, "max_prompt_tokens": 4})
    train = made.train.model_copy(update={"eos_loss_weight": 0.5})
    prompts = made.prompts.model_copy(update={"caption": "<what> is this"})
    return made.model_copy(update={"data": data, "train": train, "prompts": prompts})


def test_a_sample_is_shown_as_the_collator_and_the_decoder_of_a_run_make_it(config):
    manifest = Manifest.open(config.data.train[0].path)
    as_seen = AsSeen(config, manifest)
    tokenizer = AutoTokenizer.from_pretrained(config.model.lm.id)
    for index in range(manifest.samples):
        sample = Reader(manifest).read(index)
        seen = as_seen(sample)
        pixels = np.asarray(seen.picture)
        batch = Collator.of(config, tokenizer)([replace(sample, payload=pixels)])
        shown = [target for asked in seen.asked for target in asked.targets]
        weights = [[weight for _, weight in target.tokens] for target in shown]
        expected = [[weight for weight in row if weight] for row in batch.weight_TL.tolist()]
        assert weights == expected
        assert [asked.prompt.words for asked in seen.asked] == [c.prompt for c in batch.contexts]
        for target in shown:
            assert target.tokens[-1] == ("</s>", 0.5)
            whole = tokenizer(target.words, add_special_tokens=False)["input_ids"]
            assert target.cut == tokenizer.decode(whole[5:])
        assert pixels.shape == (32, 32, 3)
        assert seen.left_out == max(0, sum_of(sample.record) - 2)  # data.texts_per_image


def sum_of(record):
    return sum(len(text.targets) if text.task == "caption" else 1 for text in record.texts)


def test_a_scored_set_is_seen_whole_and_without_weights_of_training(config):
    manifest = Manifest.open(config.data.dev[0].path)
    seen = AsSeen(config, manifest)(Reader(manifest).read(1))
    assert seen.left_out == 0
    assert {w for asked in seen.asked for t in asked.targets for _, w in t.tokens} == {1.0}


def test_the_page_needs_nothing_beside_it_and_shows_what_cannot_be_read(config, tmp_path, harness):
    make_shards(tmp_path / "set" / "train", 6, unreadable=(4,))
    make_shards(tmp_path / "set" / "dev", 3, "dev", 50)
    page = tmp_path / "page.html"
    code, said, _ = harness("shards", "view", tmp_path / "set", "--out", page)
    assert code == 0, said
    assert "9 records of" in said
    assert "1 of them with a problem" in said
    html = page.read_text()
    assert html.index("6 of 6 records") < html.index("3 of 3 records")  # train first
    assert "the picture cannot be decoded" in html
    assert html.count("<img") == 8 == len(re.findall(r'<img[^>]*\n alt="The picture of', html))
    assert "a red picture of a square" in html
    assert "× 6" in html  # the answer that six of ten gave
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", html)
    sheets = write_sheets([str(tmp_path / "set" / "train")], page, config=config, count=3, seed=1)
    other = write_sheets([str(tmp_path / "set" / "train")], page, config=config, count=3, seed=2)
    keys = [[card.key for card in found[0].cards] for found in (sheets, other)]
    assert len(keys[0]) == 3
    assert keys[0] != keys[1]
    html = page.read_text()
    assert "&lt;what&gt; is this" in html  # the template
    assert "<what>" not in html
    assert '<span class="counts">&lt;/s&gt;<small>0.5</small></span>' in html
    assert '<strong class="wrong">cut</strong>' in html
    assert "The same as the model gets it" in html


def test_keys_without_a_config_and_a_place_without_shards_are_refused(harness, tmp_path):
    assert harness("shards", "view", tmp_path, "train.epochs=2")[0] == 2
    code, _, error = harness("shards", "view", tmp_path)
    assert (code, "holds no shards" in error) == (2, True)
