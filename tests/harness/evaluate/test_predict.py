"""The generation loop and the scoring of a run, on a tiny T5 of the hub's format and sets of real
shards.
"""

import json
import os
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image

from harness import checkpoint as checkpoints
from harness.config.encoder import encoder_name
from harness.config.schema import Config, DecodingConfig, GenerateConfig
from harness.data import collate as batches
from harness.data.collate import Collator
from harness.errors import ConfigError
from harness.evaluate import compare
from harness.evaluate.ask import ask
from harness.evaluate.captions import read_caption_results, score
from harness.evaluate.predict import answers, by_stratum, results, select
from harness.evaluate.report import page, table
from harness.evaluate.run import evaluate_model
from harness.evaluate.run_on_disk import evaluate_run
from harness.evaluate.vqa import read_results
from harness.model.vision import load_vision
from harness.model.vlm import VisionLanguageModel
from shards.read import Sample
from shards.record import Record, Text
from shards.write import write_shards

COLOURS = ("red", "green", "blue")


def records(count: int, captions: bool = True) -> list[Record]:
    """Images with two questions and, every second one, two captions."""
    return [
        Record(
            f"{i:04d}",
            "toy",
            "test",
            str(100 + i),
            (
                Text(
                    str(10 * i),
                    "vqa",
                    (COLOURS[i % 3],) * 10,
                    "what colour is it?",
                    {"answer_type": "other"},
                ),
                Text(
                    str(10 * i + 1), "vqa", ("yes", "no"), "is it red?", {"answer_type": "yes/no"}
                ),
                *(
                    [Text(f"c{i}", "caption", ("a red dog", "a dog"))]
                    if captions and i % 2 == 0
                    else []
                ),
            ),
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def setting(tiny_t5_folder, tiny_clip_folder, tmp_path_factory):
    """A feature set of 12 images, a config, and an untrained run on it."""
    root = tmp_path_factory.mktemp("evaluated")
    config = Config(
        name="toy",
        out=str(root / "run"),
        data={"train": [{"path": str(root / "test")}], "test": [{"path": str(root / "test")}]},
        model={
            "vision": {"kind": "clip", "id": str(tiny_clip_folder), "image_size": 32},
            "bridge": {"query_tokens": 4, "width": 32, "heads": 4, "layers": 1},
            "lm": {"id": str(tiny_t5_folder), "tuning": "lora", "lora": {"r": 4}},
        },
        generate={"vqa": {"max_new_tokens": 3}, "caption": {"max_new_tokens": 5}},
        evaluation={
            "batch_images": 5,
            "counterfactual_texts": 12,
            "show_images": 3,
            "bootstrap": 50,
        },
        tracking={"kind": "none"},
    )
    encoder = load_vision(config.model.vision).identity()
    rng = np.random.default_rng(0)

    def features(*shape: int) -> np.ndarray:
        return rng.normal(size=(*shape, encoder["tokens"], encoder["width"])).astype(np.float16)

    controls = safetensors.numpy.save({"blank_PD": features(), "noise_KPD": features(2)})
    write_shards(
        (
            (r, safetensors.numpy.save({"patches_PD": features()}), "safetensors")
            for r in records(12)
        ),
        root / "test",
        dataset="toy",
        split="test",
        kind="features",
        encoder=encoder,
        extra_files={"controls.safetensors": controls},
    )
    model = VisionLanguageModel.build(config, encoder).eval()
    state = {"step": 7, "config": config.model_dump(mode="json"), "run_id": None}
    state["train"] = {"stream": {"epoch": 1, "position": 0}}
    checkpoints.write(config.out_dir, 7, model.save_pretrained, {"step/x": torch.zeros(1)}, state)
    return config, model, root


def batch_of(setting, count: int = 4):
    config, model, _ = setting
    shape = (model.config.encoder["tokens"], model.config.encoder["width"])
    rng = np.random.default_rng(1)
    samples = [
        Sample(r, rng.normal(size=shape).astype(np.float16), "safetensors", 0, i)
        for i, r in enumerate(records(count))
    ]
    return Collator(model.tokenizer, config.data, config.prompts, training=False)(samples)


def test_there_is_one_prediction_per_context_of_a_task_in_order(setting):
    config, model, _ = setting
    batch = batch_of(setting)
    tokens, tasks = model.bridge_tokens(batch), set()
    for (_, task), part, rows in by_stratum(batch):
        part_tokens = tokens.with_rows(tokens.token_row_of_C[rows])
        said = answers(model, part, getattr(config.generate, task), part_tokens)
        assert [p.text_id for p in said] == [
            c.text.id for c in batch.contexts if c.text.task == task
        ]
        assert {p.task for p in said} == {task}
        assert all(0 <= p.p_eos_first <= 1 for p in said)
        tasks.add(task)
    assert tasks == {"vqa", "caption"}
    first = said[0]
    assert first.prompt == "Question: what colour is it? Answer:"
    assert first.question == "what colour is it?"
    assert first.references == ("red",) * 10


def test_each_task_is_decoded_by_its_own_settings(setting):
    config, model, root = setting
    lengths = {}
    for tokens in (1, 4):
        decoding = GenerateConfig(
            vqa=DecodingConfig(max_new_tokens=1, min_new_tokens=1),
            caption=DecodingConfig(max_new_tokens=tokens, min_new_tokens=tokens),
        )
        given = config.model_copy(update={"generate": decoding})
        found = evaluate_model(
            model, [str(root / "test")], given, limit=4, counterfactual_texts=0
        ).tasks
        lengths[tokens] = {
            task: max(len(model.tokenizer(p.answer)["input_ids"]) for p in found[task].predictions)
            for task in ("vqa", "caption")
        }
    assert lengths[1]["vqa"] == lengths[4]["vqa"]
    assert lengths[1]["caption"] < lengths[4]["caption"]


def test_the_answer_is_to_the_image_tokens_that_are_given(setting):
    config, model, _ = setting
    vqa = next(part for stratum, part, _ in by_stratum(batch_of(setting)) if stratum.task == "vqa")
    tokens = model.bridge_tokens(vqa)
    given = answers(model, vqa, config.generate.vqa, tokens.with_rows(vqa.image_of_C.flip(0)))
    own = answers(model, vqa, config.generate.vqa, tokens)
    assert any(a.p_eos_first != b.p_eos_first for a, b in zip(given, own, strict=True))


@pytest.mark.parametrize("worth_a_cut", [1, 10**6])
def test_selected_contexts_lose_the_same_nats_as_in_the_whole_batch(
    setting, monkeypatch, worth_a_cut
):
    monkeypatch.setattr(batches, "MIN_PADDING_SAVED", worth_a_cut)
    _, model, _ = setting
    batch = batch_of(setting)
    with torch.no_grad():
        tokens = model.bridge_tokens(batch)
        whole = model.loss(batch, tokens)
        total = 0.0
        for (_, task), part, rows in by_stratum(batch):
            assert {c.text.task for c in part.contexts} == {task}
            total += model.loss(part, tokens.with_rows(tokens.token_row_of_C[rows])).sum.item()
        assert total == pytest.approx(whole.sum.item(), rel=1e-5)
        backwards = select(batch, list(range(len(batch.contexts)))[::-1])
        assert model.loss(
            backwards, tokens.with_rows(tokens.token_row_of_C.flip(0))
        ).sum.item() == pytest.approx(whole.sum.item(), rel=1e-5)


def test_a_run_is_scored_and_its_files_have_the_official_form(setting, tmp_path):
    config, _, _ = setting
    seen = []
    told = {}  # about which part of the gate -> how far

    def progress(done, total, about=None):
        seen.append((done, total)) if about is None else told.update({about: (done, total)})

    report = evaluate_run(config.out_dir, out=tmp_path, text_only_accuracy=40.0, progress=progress)
    assert json.loads((tmp_path / "scores.json").read_text()) == json.loads(json.dumps(report))
    assert seen[-1] == (12, 12)
    assert {"with other images", "without their image"} <= told.keys()
    assert all(done == total for done, total in told.values())
    assert (report["step"], report["images"], report["unreadable"]) == (7, 12, 0)
    known = report["tasks"]["vqa"]
    assert (known["texts"], known["text_only_accuracy"]) == (24, 40.0)
    assert 12 <= known["gate_texts"] < 12 + 2 * 5, (
        "the last batch of five images may be one too many"
    )
    assert report["tasks"]["caption"]["gate_texts"] == 4, "a quarter as many, by whole batches"
    assert (
        known["majority_accuracy"] == 25.0
    )  # a third of the colours, and a sixth of yes against (yes, no)
    for name in ("shuffled", "blank", "noise", "no_image"):
        assert known[f"{name}_accuracy"] is not None
        assert known[f"{name}_loss_nats"] > 0
        assert report["tasks"]["caption"][f"{name}_loss_nats"] > 0
    assert known["verdict"] in ("not enough evidence", "EOS collapse")
    said = read_results(tmp_path / "toy_test_answers.json")
    assert list(said) == [t.id for r in records(12) for t in r.texts if t.task == "vqa"]
    told = read_caption_results(tmp_path / "toy_test_captions.json")
    assert list(told) == [str(100 + i) for i in range(0, 12, 2)]
    official = score(told, dict.fromkeys(told, ("a red dog", "a dog"))).corpus
    assert {name: report["tasks"]["caption"][name] for name in official} == pytest.approx(official)
    assert (
        report["tasks"]["caption"]["CIDEr_low"]
        <= official["CIDEr"]
        <= report["tasks"]["caption"]["CIDEr_high"]
    )
    assert known["accuracy_low"] <= known["accuracy"] <= known["accuracy_high"]
    assert known["accuracy"] == pytest.approx(
        compare.runs(tmp_path, tmp_path)["vqa"]["accuracy"].a, abs=0.01
    )
    assert known["verdict"] in table(report)
    pixels = load_vision(config.model.vision).identity()["preprocessing"]
    assert report["pixels"] == pixels
    assert f"| pixels | {pixels} |" in " ".join((tmp_path / "report.md").read_text().split())
    older = {key: value for key, value in report.items() if key != "pixels"}
    assert "| pixels" not in page(older, [])


def test_a_rare_task_has_its_own_texts_in_the_gate(setting):
    """Every second image has captions; with one image a batch none could be exchanged."""
    config, model, root = setting
    settings = config.evaluation.model_copy(update={"batch_images": 1})
    alone = config.model_copy(update={"evaluation": settings})
    for given, count in ((config, 5), (alone, 5), (config, 0)):
        found = evaluate_model(model, [str(root / "test")], given, counterfactual_texts=count)
        assert found.images == 12
        assert len(found.tasks["vqa"].predictions) == 24
        uses = [found.tasks[task].image_use for task in ("vqa", "caption")]
        if not count:
            assert uses == [None, None]
        else:
            assert uses[0].contexts >= count
            assert uses[1].contexts >= 2  # a quarter as many captions
            assert uses[0].contexts + uses[1].contexts < 30


def test_other_data_and_older_checkpoints_leave_the_test_result_alone(setting, tmp_path):
    config, _, root = setting
    shutil.copytree(config.out_dir, out := tmp_path / "run")
    shutil.copytree(root / "test", moved := tmp_path / "moved")
    evaluate_run(out, limit=2)
    newest = out / "checkpoints" / "step-000007"
    shutil.copytree(newest, older := out / "checkpoints" / "step-000003")
    evaluate_run(out, [str(moved)], limit=2)
    evaluate_run(older, limit=2)
    evaluate_run(newest, limit=2)
    assert {folder.name for folder in (out / "evaluation").iterdir()} == {
        *("first-2", "toy_test+first-2", "step-000003+first-2")
    }


def test_decoding_can_be_chosen_on_the_dev_set_without_training_again(setting):
    config, _, root = setting
    given = ["generate.caption.max_new_tokens=1", "evaluation.counterfactual_texts=4"]
    report = evaluate_run(config.out_dir, [str(root / "test")], overrides=given)
    folder = config.out_dir / "evaluation" / "+".join(given)
    assert json.loads((folder / "scores.json").read_text()) == json.loads(json.dumps(report))
    said = read_caption_results(folder / "toy_test_captions.json")
    assert all(len(caption.split()) <= 1 for caption in said.values())
    assert 4 <= report["tasks"]["vqa"]["gate_texts"] < 4 + 2 * 5
    for wrong, expected in (
        ("model.lm.id=x", "scored as it was trained"),
        ("generate.caption.beam=2", "beams"),
    ):
        with pytest.raises(ConfigError, match=expected):
            evaluate_run(config.out_dir, overrides=[wrong])


def test_the_same_run_gives_the_same_report_twice_and_in_training(setting, tmp_path):
    config, model, root = setting
    first = evaluate_run(config.out_dir, out=tmp_path / "a")
    again = evaluate_run(config.out_dir, [str(root / "test")], out=tmp_path / "b")
    for figures in (*first["tasks"].values(), *again["tasks"].values()):
        assert (
            figures.pop("beside_seconds")["toy_test"].keys() == figures["beside"]["toy_test"].keys()
        )
    assert again == first
    within = evaluate_model(model, [str(root / "test")], config)
    assert within.tasks["vqa"].loss == pytest.approx(first["tasks"]["vqa"]["loss_nats"], rel=1e-6)
    metrics = within.metrics()
    assert {
        "vqa/loss",
        "vqa/accuracy",
        "vqa/loss_gap_nats",
        "caption/loss",
        "caption/CIDEr",
        "caption/Bleu_4",
    } <= metrics.keys()
    assert all(np.isfinite(value) for value in metrics.values())
    assert len(within.shown) == len(within.shown_images) == 3
    assert len({p.key for p in within.shown}) == 3


def test_a_limit_counts_for_each_set_and_each_has_its_own_verdict(setting, tmp_path):
    """Captions of a mixture once rested on the few images that its larger set left them."""
    config, model, root = setting
    shape = (model.config.encoder["tokens"], model.config.encoder["width"])
    features = safetensors.numpy.save({"patches_PD": np.ones(shape, np.float16)})
    write_shards(
        ((replace(r, split="large"), features, "safetensors") for r in records(40)),
        tmp_path,
        dataset="toy",
        split="large",
        kind="features",
        encoder=model.config.encoder,
    )
    paths = [str(tmp_path), str(root / "test")]
    found = evaluate_model(model, paths, config, limit=4, counterfactual_texts=8)
    images = {p.picture for p in found.tasks["vqa"].predictions}
    assert found.images == len(images) == 8
    assert Counter(f"{dataset}_{split}" for dataset, split, _ in images) == {
        "toy_large": 4,
        "toy_test": 4,
    }
    assert set(found.tasks["vqa"].uses) == {"toy_large", "toy_test"}
    report = found.tasks["vqa"].to_dict()
    assert report["sets"]["toy_large"]["verdict"].startswith("not enough evidence")
    assert "pooled_exchange_points" in report
    assert (
        "pooled_exchange_points"
        not in evaluate_model(model, paths[:1], config, limit=4, counterfactual_texts=8)
        .tasks["vqa"]
        .to_dict()
    )


def test_a_limit_takes_the_same_images_whatever_the_seed_of_the_run(setting):
    config, model, root = setting
    chosen = [
        [
            p.key
            for p in evaluate_model(model, [str(root / "test")], c, limit=4, counterfactual_texts=0)
            .tasks["vqa"]
            .predictions
        ]
        for c in (config, config.model_copy(update={"seed": 5}))
    ]
    assert chosen[0] == chosen[1]
    assert len(set(chosen[0])) == 4


def test_a_picture_can_be_asked_about(setting, tmp_path):
    config, _, _ = setting
    picture = tmp_path / "picture.png"
    Image.new("RGB", (40, 30), "red").save(picture)
    assert isinstance(ask(config.out_dir, picture, "what colour is it?"), str)
    assert isinstance(ask(config.out_dir, picture), str)
    picture.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"picture\.png"):
        ask(config.out_dir, picture)
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(OSError, match=r"pipe\.png is no plain file"):
        ask(config.out_dir, tmp_path / "pipe.png")


def test_what_cannot_be_scored_is_refused_by_name(setting, tmp_path):
    config, _, _ = setting
    with pytest.raises(ConfigError, match="nowhere is not a folder"):
        evaluate_run(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        evaluate_run(tmp_path)
    other = encoder_name(config.model.vision) | {
        "hash": "0" * 64,
        "tokens": 17,
        "width": 32,
        "preprocessing": "crop",
    }
    write_shards(
        [
            (
                records(1)[0],
                safetensors.numpy.save({"patches_PD": np.zeros((17, 32), np.float16)}),
                "safetensors",
            )
        ],
        tmp_path / "foreign",
        dataset="toy",
        split="test",
        kind="features",
        encoder=other,
    )
    with pytest.raises(ConfigError, match="made by"):
        evaluate_run(config.out_dir, [str(tmp_path / "foreign")], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_results_of_two_sets_go_into_two_files():
    from harness.evaluate.predict import Prediction

    made = [
        Prediction(name, "val", "k", "1", "1", "vqa", "p", "q", ("a",), "a", 0.0)
        for name in ("vqav2", "easy-vqa")
    ]
    assert results(made).keys() == {"vqav2_val_answers.json", "easy-vqa_val_answers.json"}
