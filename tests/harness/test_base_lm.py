"""The text-only model: what the words alone give, learnt from each distinct prompt once."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from harness import base_lm
from harness.config.known_mistakes import KnownMistakesConfig
from harness.config.schema import Config, LanguageModelConfig, PromptsConfig
from harness.data.collate import Collator
from harness.model.language.t5 import T5Language
from shards.record import Record, Text
from shards.write import write_shards

# Of 40 questions "is it red?" 30 are answered yes, of 40 "what shape?" 25 circle: no model without
# images does better.
ANSWERS = {
    "is it red?": ["yes"] * 30 + ["no"] * 10,
    "what shape?": ["circle"] * 25 + ["square"] * 15,
}


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("texts") / "train"
    records = [
        Record(
            f"{i:02d}",
            "toy",
            "train",
            f"{i:02d}",
            tuple(Text(f"{i}-{q}", "vqa", (a[i],), q) for q, a in ANSWERS.items()),
        )
        for i in range(40)
    ]
    write_shards(
        [(r, b"no picture is ever decoded", "jpg") for r in records],
        out,
        dataset="toy",
        split="train",
    )
    return str(out)


@pytest.fixture(scope="module")
def config() -> Config:
    return Config(name="texts", prompts=PromptsConfig(vqa="question"))


@pytest.fixture(scope="module")
def folder(questions, config, tmp_path_factory):
    out = tmp_path_factory.mktemp("base") / "lm"
    return base_lm.make([questions], out, config, d_model=32, d_ff=64, steps=120, peak=1e-2)


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_it_learns_the_most_common_answer_to_each_question_and_no_more(
    folder, questions, config, kind, tmp_path
):
    if kind == "gpt2":
        mistaken = config.model_copy(
            update={"known_mistakes": KnownMistakesConfig(loss_on_padding=True)}
        )
        size = {"d_model": 32, "d_ff": 64, "layers": 1}
        folder = base_lm.make(
            [questions], tmp_path / "lm", mistaken, kind=kind, **size, steps=120, peak=1e-2
        )
        fields = json.loads((folder / "config.json").read_text())
        assert (fields["model_type"], fields["n_layer"], fields["n_inner"]) == ("gpt2", 2, 64)
    said = base_lm.answer(folder, [questions], config)
    assert len(said) == 80
    assert Counter(said.values()) == {"yes": 40, "circle": 40}


def test_distinct_prompts_weighted_by_their_counts_give_the_loss_of_all_questions(
    folder, questions, config
):
    language = T5Language(LanguageModelConfig(id=str(folder), tuning="frozen")).eval()
    collate = Collator(language.tokenizer, config.data, config.prompts)
    pairs = base_lm.pairs_of([questions], config)
    assert sorted(sum(targets.values()) for targets in pairs.values()) == [40, 40]
    grouped = base_lm._batch(
        collate, [(context, sorted(targets.items())) for context, targets in pairs.items()]
    )
    rows = [
        (c, target)
        for c, targets in pairs.items()
        for target, count in targets.items()
        for _ in range(count)
    ]
    single = collate.assemble(
        base_lm._NOTHING[None],
        [c for c, _ in rows],
        [0] * len(rows),
        [t for _, t in rows],
        list(range(len(rows))),
    )
    with torch.no_grad():
        one, all_of_them = (
            language.loss(base_lm.without_images(b, language.width), b) for b in (grouped, single)
        )
    assert (one.sum / one.weight).item() == pytest.approx(
        (all_of_them.sum / all_of_them.weight).item(), rel=1e-5
    )
    unweighted = replace(grouped, weight_TL=(grouped.weight_TL > 0).float())
    with torch.no_grad():
        wrong = language.loss(base_lm.without_images(unweighted, language.width), unweighted)
    assert (wrong.sum / wrong.weight).item() != pytest.approx(
        (one.sum / one.weight).item(), rel=1e-2
    )


def test_the_same_seed_makes_the_same_model_and_it_loads_in_four_bits(
    folder, questions, config, tmp_path
):
    again = base_lm.make(
        [questions], tmp_path / "lm", config, d_model=32, d_ff=64, steps=120, peak=1e-2
    )
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    wide = base_lm.make([questions], tmp_path / "wide", config, d_model=64, steps=1)
    language = T5Language(LanguageModelConfig(id=str(wide), tuning="qlora"))
    assert "Question:" in language.tokenizer.decode(
        language.tokenizer("Question: is it red? Answer:")["input_ids"]
    )
