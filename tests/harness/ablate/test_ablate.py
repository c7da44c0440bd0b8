"""Ablations: every shipped file at toy length, stopping and going on, failing variants, and what
the report says.
"""

import base64
import io
import json
import re
import shutil
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image
from transformers import BertConfig, BertModel, Blip2Config, Blip2ForConditionalGeneration
from typer.testing import CliRunner

from harness.ablate import experiment
from harness.ablate import runner as ablate
from harness.ablate.experiment import CONFIG, LOG, SCORES, children_of, load
from harness.ablate.observe import interval
from harness.cli.main import app
from harness.config.load import load as load_config
from harness.config.load import shipped
from harness.config.schema import EvaluationConfig
from harness.errors import ConfigError, explain
from harness.evaluate.run_on_disk import evaluate_run
from harness.machine.lock import RunLock
from harness.train import run as train
from toy_runs import make_shards

FILES = sorted((shipped("configs") / "ablations").glob("*.yaml"))
OFFLINE = [file for file in FILES if file.stem.endswith("_offline")]
# The others are alike, and take three minutes: docs/log.md.
ALWAYS_RUN = ("data_size_offline", "who_does_the_work_offline")
SMALL = {"name": "toy", "question": "Which?", "base": "demo", "seeds": [0]}
PLAIN = {"a": {"expected": "as good as any"}, "b": {"expected": "worse", "below": "a"}}


class InProcess:
    """A child in this process, which is quicker than a launch; what it dies of stands in its log,
    as there.
    """

    started: list = []  # noqa: RUF012

    def __init__(self, child, environment):
        self.started.append(child)
        try:
            train.run(load_config(child.out / CONFIG), "auto")
            evaluate_run(child.out)
            self.code = 0
        except Exception as error:
            (child.out / LOG).write_text(f"harness: {explain(error) or repr(error)}\n")
            self.code = 2

    def poll(self):
        return self.code

    def send_signal(self, number):
        raise AssertionError("it is over already")


@pytest.fixture(scope="session")
def toy_sets(tmp_path_factory) -> Path:
    """ROOT/{both,captions,questions}/{train,test}."""
    root = tmp_path_factory.mktemp("sets")
    for folder, kinds in (
        ("both", {}),
        ("captions", {"questions": False}),
        ("questions", {"captions": False}),
    ):
        for split, count, first in (("train", 10, 0), ("test", 5, 100)):
            make_shards(root / folder / split, count, split, first, **kinds)
    return root


def data(sets: Path) -> list[str]:
    return [f"data.{part}=[{{path: {sets / part}}}]" for part in ("train", "test")]


@pytest.fixture(scope="session")
def overrides(toy_sets, tiny_clip_folder, tiny_t5_folder) -> list[str]:
    """Overrides of every child: tiny sets and models, one step."""
    return [
        *data(toy_sets / "questions"),
        "data.dev=[]",
        f"model.vision={{id: {tiny_clip_folder}, image_size: 32}}",
        "model.bridge.width=32",
        "model.bridge.heads=4",
        "model.bridge.layers=1",
        f"model.lm.id={tiny_t5_folder}",
        "train.max_steps=1",
        "train.global_batch=4",
        "train.micro_batch=4",
        "train.precision=fp32",
        "train.log_every=1",
        "evaluation={batch_images: 5, counterfactual_texts: 4, bootstrap: 50}",
        "generate={vqa: {max_new_tokens: 3}, caption: {max_new_tokens: 3}}",
        "tracking.kind=none",
    ]


@pytest.fixture
def tiny(overrides) -> list[str]:
    InProcess.started.clear()
    return overrides


@pytest.fixture(scope="session")
def finished(tmp_path_factory, overrides, toy_sets) -> tuple[Path, list[str]]:
    """A finished ablation of both tasks, in FOLDER/out with its file in FOLDER, and the overrides
    it was run with; a test that goes on with it takes a copy.
    """
    folder = tmp_path_factory.mktemp("finished")
    given = [*overrides, *data(toy_sets / "both")]
    run(file_of(folder), given, folder / "out")
    return folder, given


@pytest.fixture
def own_copy(finished, tmp_path) -> tuple[Path, list[str]]:
    """The same in a folder of this test."""
    folder, given = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    InProcess.started.clear()
    return tmp_path, given


def file_of(folder: Path, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(SMALL | {"variants": PLAIN} | changes))
    return path


def run(file, overrides, out, **options):
    return ablate.run(file, overrides, out=out, start=InProcess, say=lambda line: None, **options)


def test_a_child_is_run_once_its_report_says_expectation_and_observation_and_a_new_seed_is_added(
    tmp_path, tiny
):
    file = file_of(tmp_path)
    first = run(file, tiny, tmp_path / "out")
    assert [(c.variant, c.seed) for c in InProcess.started] == [("a", 0), ("b", 0)]
    assert not first["failed"]
    rows = {(row["variant"], row["task"]): row for row in first["rows"]}
    assert set(rows) == {("a", "vqa"), ("b", "vqa")}
    told = json.loads(
        (tmp_path / "out" / "a" / "seed-0" / "evaluation" / "scores.json").read_text()
    )
    assert rows["a", "vqa"]["score"] == pytest.approx(told["tasks"]["vqa"]["accuracy"], abs=0.01)
    assert rows["a", "vqa"]["lost"] == told["tasks"]["vqa"]["accuracy_gap"]
    assert (
        rows["a", "vqa"]["score_low"] <= rows["a", "vqa"]["score"] <= rows["a", "vqa"]["score_high"]
    )
    assert rows["b", "vqa"]["observed"].startswith("cannot be told"), "the same model twice"

    InProcess.started.clear()
    both = run(file, tiny, tmp_path / "out", seeds=[0, 1])
    assert [(c.variant, c.seed) for c in InProcess.started] == [("a", 1), ("b", 1)]
    assert {tuple(row["per_seed"]) for row in both["rows"]} == {("0", "1")}
    with pytest.raises(
        ConfigError, match=r"begun with train.learning_rate=0.002, now it is 0.5: choose another"
    ):
        run(file, [*tiny, "train.learning_rate=0.5"], tmp_path / "out")


def test_a_child_that_was_killed_goes_on_from_its_checkpoint(tmp_path, tiny):
    file, out = file_of(tmp_path), tmp_path / "out"
    two_steps = [*tiny, "train.max_steps=2", "train.save_every=1"]
    run(file, two_steps, out)
    child = out / "a" / "seed-0"
    (child / SCORES).unlink()
    for name in ("checkpoints/step-000002", "evaluation/scores.json"):
        path = child / name
        if path.is_dir():
            (path / "files.json").unlink()  # the mark of a whole checkpoint
    InProcess.started.clear()
    report = run(file, two_steps, out)
    assert [c.variant for c in InProcess.started] == ["a"]
    assert not report["failed"]
    logged = [
        json.loads(line)["step"] for line in (child / "metrics.jsonl").read_text().splitlines()
    ]
    assert logged.count(1) >= 1
    assert sorted(set(logged)) == [1, 2]


def test_one_failing_variant_does_not_end_the_others_and_its_error_is_in_the_report(
    tmp_path, tiny, toy_sets
):
    variants = {
        "a": {"expected": "fails at once", "overrides": ["data.train=[{path: nowhere}]"]},
        "b": {
            "expected": "starts from nothing",
            "overrides": ["model.init_from=<model>"],
            "after": "a",
        },
        "c": {
            "expected": "fails in training",
            "overrides": ["train.learning_rate=1e30", "train.max_steps=9"],
        },
        "d": {"expected": "<b>runs</b>", "below": "a"},
    }
    variants["c"]["overrides"] += ["train.max_skipped_in_a_row=1", "train.epochs=9"]
    tiny = [o for o in tiny if not o.startswith(("data.train", "train.max_steps"))]
    train_set = data(toy_sets / "questions")[0]
    for name in ("b", "c", "d"):
        variants[name]["overrides"] = [
            train_set,
            *variants[name].get("overrides", ["train.max_steps=1"]),
        ]
    report = run(file_of(tmp_path, variants=variants, seeds=[0, 1]), tiny, tmp_path / "out")
    assert {row["variant"] for row in report["rows"]} == {"d"}
    errors = {child["variant"]: child["error"] for child in report["failed"]}
    assert "nowhere" in errors["a"]
    assert "whose model it starts from, is not finished" in errors["b"]
    assert "loss or gradient that is not finite" in errors["c"]
    for name in ("report.md", "report.html"):
        assert errors["a"] in (tmp_path / "out" / name).read_text()
    assert "&lt;b&gt;runs" in (tmp_path / "out" / "report.html").read_text()
    assert report["rows"][0]["observed"] == "a has no seed in common with it on these images"


def test_what_no_variant_can_do_is_one_sentence_before_anything_is_started(tmp_path, tiny):
    with pytest.raises(ConfigError, match=r"model.lm.id: there is no folder /nowhere"):
        run(file_of(tmp_path), [*tiny, "model.lm.id=/nowhere"], tmp_path / "out")
    assert not InProcess.started


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"variants": {"a": {"expected": "x", "below": "b"}}},
            "variants.a.below is 'b', expected another variant",
        ),
        (
            {"variants": {"a": {"expected": "x", "after": "b"}, "b": {"expected": "y"}}},
            "expected an earlier variant",
        ),
        (
            {"variants": {"a": {"expected": "x", "override": []}}},
            "no key variants.a.override; did you mean",
        ),
        ({"variants": {"a": {}}}, "variants.a.expected is missing"),
        ({"variants": {}}, "expected at least one variant"),
        ({"offline": {"base": "demo"}}, "toy_offline.yaml, where --offline finds it"),
    ],
)
def test_a_wrong_file_is_told_in_one_sentence(tmp_path, changes, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)) as raised:
        load(file_of(tmp_path, **changes))
    assert str(tmp_path / "toy.yaml") in str(raised.value)


def test_an_ablation_that_is_not_there_is_told_with_those_that_are(tmp_path):
    told = CliRunner().invoke(app, ["ablate", "who_do_the_work"])
    assert "did you mean configs/ablations/who_does_the_work.yaml?" in str(told.exception)
    told = CliRunner().invoke(app, ["ablate", "who_does_the_work", "--seeds", "0,x"])
    assert "--seeds 0,x: expected whole numbers" in str(told.exception)


def test_children_run_side_by_side_and_a_signal_reaches_them_all(tmp_path):
    class Slow:
        """Ends when it gets a signal, or is finished at the third look."""

        def __init__(self, child, environment):
            self.child, self.looks, self.code = child, 0, None
            alive.append(self)
            most.append(sum(one.code is None for one in alive))
            threads.append(environment["OMP_NUM_THREADS"])

        def poll(self):
            self.looks += 1
            if self.looks == 3 and self.child.variant != "b":
                (self.child.out / "evaluation").mkdir()
                (self.child.out / SCORES).write_text('{"tasks": {}}')
                self.code = 0
            return self.code

        def send_signal(self, number):
            self.code = 128 + number

    alive, most, threads, said = [], [], [], []
    ablation = load(file_of(tmp_path, variants={name: {"expected": "-"} for name in "abcd"}))
    children = children_of(ablation, tmp_path / "out", (), [0])
    rounds = iter([0] * 12 + [15] * 99)
    errors = ablate.run_all(children, [], 2, Slow, said.append, lambda: next(rounds))
    assert max(most) == 2
    assert not errors
    assert alive[1].child.variant == "b"
    assert alive[1].code == 143
    assert sum("stopped" in line for line in said) >= 1


def test_the_interval_covers_images_and_seeds():
    settings = EvaluationConfig(bootstrap=2000)
    rng = np.random.default_rng(1)
    images_SI = np.tile(rng.normal(50, 10, 400), (3, 1))
    seeds_SI = np.repeat(np.array([[40.0], [50.0], [60.0]]), 400, axis=1)
    same = interval(np.full((3, 400), 50.0), np.ones(400), settings)
    assert (same.value, same.low, same.high) == (50, 50, 50)
    of_images, of_seeds = (
        interval(scores, np.ones(400), settings) for scores in (images_SI, seeds_SI)
    )
    assert of_images.high - of_images.low == pytest.approx(2 * 1.96 * 10 / 20, rel=0.15)
    assert of_seeds.high - of_seeds.low > 15, "three seeds that differ by 10 points"
    twice = interval(2 * images_SI, 2 * np.ones(400), settings)
    assert twice.value == pytest.approx(of_images.value), (
        "a mean over texts, whatever their number an image"
    )


def test_an_interval_of_three_seeds_holds_the_truth_as_often_as_it_says():
    settings, rng, held = EvaluationConfig(bootstrap=200), np.random.default_rng(2), 0
    for _ in range(200):
        scores_SI = rng.normal(0, 5, (3, 1)) + rng.normal(0, 5, 100) + rng.normal(0, 1, (3, 100))
        found = interval(scores_SI, np.ones(100), settings)
        held += found.low < 0 < found.high
    assert 0.9 < held / 200 <= 1.0


def test_texts_whose_image_could_not_be_read_are_left_out_and_counted(own_copy):
    folder, given = own_copy
    rows = json.loads((folder / "out" / "report.json").read_text())["rows"]
    assert [row["left_out"] for row in rows] == [0, 0, 0, 0]
    (answers,) = (folder / "out" / "a" / "seed-0" / "evaluation").glob("*_answers.json")
    entries = json.loads(answers.read_text())
    answers.write_text(json.dumps(entries[2:]))
    report = run(folder / "toy.yaml", given, folder / "out")
    assert not InProcess.started
    left_out = {(row["variant"], row["task"]): row["left_out"] for row in report["rows"]}
    assert [left_out[variant, "vqa"] for variant in "ab"] == [2, 2], (
        "for all variants, or they are no pairs"
    )
    assert [left_out[variant, "caption"] for variant in "ab"] == [0, 0]
    assert "vqa: 2 texts left out" in (folder / "out" / "report.md").read_text()
    assert "(unreadable)" in (folder / "out" / "report.html").read_text() or len(entries) > 12


def test_a_child_failed_for_what_it_said_last(tmp_path):
    log = tmp_path / "log.txt"
    said = {
        "harness: configs.yaml: lr is no key\n": "configs.yaml: lr is no key",
        "harness: saving\nTraceback (most recent call last):\n  File\nMemoryError: 8 GB\n": (
            "MemoryError: 8 GB"
        ),
        "Traceback (most recent call last):\nKeyError: 1\nharness: it was the shard\n\n": (
            "it was the shard"
        ),
        "": "no output",
    }
    for text, expected in said.items():
        log.write_text(text)
        assert ablate.last_words(log) == expected


def test_the_report_is_one_page_with_the_same_images_for_every_variant(finished):
    out = finished[0] / "out"
    report = json.loads((out / "report.json").read_text())
    page = (out / "report.html").read_text()
    assert len(page) < 2_000_000
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    images = [
        Image.open(io.BytesIO(base64.b64decode(data)))
        for data in re.findall(r'base64,([^"]+)', page)
    ]
    assert [image.format for image in images] == ["PNG"] + ["JPEG"] * 10, (
        "curves; five images for each task"
    )
    assert page.count("<th>a</th><th>b</th>") == 2
    first = np.asarray(images[1].convert("RGB")).mean((0, 1))
    assert first.argmax() == 100 % 3 == 1, "the first test image is the green one"
    scores = json.loads((out / "b" / "seed-0" / SCORES).read_text())["tasks"]["caption"]
    row = next(row for row in report["rows"] if (row["variant"], row["task"]) == ("b", "caption"))
    assert row["score"] == pytest.approx(scores["CIDEr"]), "as harness evaluate has it"
    assert row["lost"] == pytest.approx(scores["CIDEr_gap"] / 100), (
        "the gate's, in the score's own unit"
    )
    table = (out / "report.md").read_text()
    assert "| a " in table
    assert "as good as any" in table


def test_a_second_ablation_in_one_folder_is_refused_by_the_name_of_the_first(tmp_path, tiny):
    lock = RunLock.take(tmp_path / "out", "harness ablate")
    with pytest.raises(ConfigError, match=r"out is in use by harness ablate, process \d+ on"):
        ablate.run(file_of(tmp_path), tiny, out=tmp_path / "out", start=InProcess)
    assert not InProcess.started
    lock.release()


def test_children_copy_their_checkpoints_to_places_of_their_own(tmp_path, tiny):
    away = tmp_path / "away"
    overrides = [*tiny, f"train.copy_to={away}/"]
    ablate.run(file_of(tmp_path), overrides, out=tmp_path / "out", start=InProcess)
    copied = {path.relative_to(away).parts[:2] for path in away.rglob("files.json")}
    assert copied == {("a", "seed-0"), ("b", "seed-0")}
    InProcess.started.clear()
    ablate.run(file_of(tmp_path), overrides, out=tmp_path / "out", start=InProcess)
    assert not InProcess.started, "it went on, and nothing was left"


def test_children_are_launched_as_processes_and_are_children_of_one_run_in_mlflow(tmp_path, tiny):
    variants = {
        "a": {"expected": "-"},
        "b": {"expected": "-", "overrides": ["model.bridge.query_tokens=7"]},
    }
    variants["b"]["overrides"].append("train.learning_rate=1e30")
    tracked = [
        *tiny[:-1],
        f"tracking.uri=sqlite:///{tmp_path / 'runs.db'}",
        "train.max_skipped_in_a_row=1",
    ]
    tracked = [o for o in tracked if not o.startswith("train.max_steps")]
    file, out = file_of(tmp_path, variants=variants, overrides=["train.epochs=1"]), tmp_path / "out"
    report = ablate.run(file, tracked, out=out, jobs=2, say=lambda line: None)
    assert [child["variant"] for child in report["failed"]] == ["b"]
    assert (
        "1 steps in a row had a loss or gradient that is not finite" in report["failed"][0]["error"]
    )
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs.db'}")
    experiment = client.get_experiment_by_name("harness").experiment_id
    runs = {run.info.run_name: run for run in client.search_runs([experiment])}
    assert set(runs) == {"toy", "a-0", "b-0"}
    parent = runs["toy"]
    assert parent.info.status == "FINISHED"
    assert {runs[name].data.tags["mlflow.parentRunId"] for name in ("a-0", "b-0")} == {
        parent.info.run_id
    }
    assert (runs["a-0"].info.status, runs["b-0"].info.status) == ("FINISHED", "FAILED")
    assert parent.data.metrics["a/vqa/score"] == report["rows"][0]["score"]
    assert {"report.html", "report.md", "report.json"} <= {
        file.path for file in client.list_artifacts(parent.info.run_id)
    }


def toy_copy(file: Path, folder: Path, sets: Path, models: dict[str, Path]) -> Path:
    """A file with every set and every id of a model replaced by a tiny one of its kind."""
    shipped_one = load(file)
    form = shipped_one.model_dump(mode="json")
    for child in children_of(shipped_one, folder, (), [0]):
        variant = form["variants"][child.variant]
        kind = "captions" if "flickr" in child.config().data.train[0].path else "questions"
        variant["overrides"] += data(sets / kind)
        kinds = [o for o in variant["overrides"] if o.startswith("model.lm.kind=")]
        kind = kinds[-1].partition("=")[2] if kinds else "t5"
        variant["overrides"] = [o for o in variant["overrides"] if not o.startswith("model.lm.id=")]
        variant["overrides"] = [
            re.sub(r"(bridge.init_from)=.*(bert|blip2).*", lambda m: f"{m[1]}={models[m[2]]}", o)
            for o in variant["overrides"]
        ]
        variant["overrides"] = [
            re.sub(r"(train_images=\d)00", r"\1", o) for o in variant["overrides"]
        ]
        variant["overrides"].append(f"model.lm.id={models[kind]}")
    path = folder / file.name
    path.write_text(yaml.safe_dump(form))
    return path


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory) -> dict[str, Path]:
    """A tiny BERT and a tiny BLIP-2 that fit the bridge of the tests."""
    root = tmp_path_factory.mktemp("pretrained")
    size = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    BertModel(BertConfig(vocab_size=50, **size)).save_pretrained(root / "bert")
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text = {
        "model_type": "opt",
        "hidden_size": 16,
        "ffn_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    text |= {"vocab_size": 50, "word_embed_proj_dim": 16}
    qformer = {**size, "encoder_hidden_size": 32}
    config = Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=8
    )
    Blip2ForConditionalGeneration(config).save_pretrained(root / "blip2")
    return {"bert": root / "bert", "blip2": root / "blip2"}


@pytest.mark.parametrize(
    "file",
    [
        pytest.param(f, id=f.stem, marks=() if f.stem in ALWAYS_RUN else pytest.mark.long)
        for f in OFFLINE
    ],
)
def test_every_shipped_ablation_runs_in_its_offline_form(
    file, tmp_path, tiny, tiny_t5_folder, tiny_gpt2_folder, pretrained, toy_sets
):
    own = [o for o in tiny if not o.startswith(("model.lm.id", "data.test", "data.train"))]
    models = {"t5": tiny_t5_folder, "gpt2": tiny_gpt2_folder, **pretrained}
    toy = toy_copy(file, tmp_path, toy_sets, models)
    report = run(toy, own, tmp_path / "out", seeds=[0])
    assert not report["failed"]
    assert not report["unfinished"]
    assert {row["variant"] for row in report["rows"]} == set(load(file).variants)


def test_an_offline_form_is_the_same_question_in_a_file_beside_and_is_found_by_its_name():
    for file in OFFLINE:
        name = file.stem.removesuffix("_offline")
        form = load(name, offline=True)
        assert form == load(file)
        assert form.name == file.stem
        assert form.question == load(name).question
        assert list(form.variants) == list(load(name).variants)
    assert len(OFFLINE) == 8


def test_the_file_that_the_documentation_shows_is_read(tmp_path):
    shown = textwrap.dedent(experiment.__doc__.partition("A file in full:\n\n")[2])
    (tmp_path / "bridges.yaml").write_text(shown)
    ablation = load(tmp_path / "bridges.yaml")
    assert ablation.variants["linear"].below == "qformer"
    assert len(children_of(ablation, tmp_path, (), ablation.seeds)) == 6


def test_a_file_without_an_offline_form_is_told_where_it_would_be(tmp_path):
    file = file_of(tmp_path)
    with pytest.raises(ConfigError, match=rf"{file}: --offline runs {tmp_path}/toy_offline.yaml"):
        load(file, offline=True)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_variant_of_both_forms_is_a_valid_config_and_differs_from_every_other(file):
    comment = file.read_text().partition("\nname:")[0]
    assert "Verified" in comment or "ever run with real weights" in comment
    configs = [child.config() for child in children_of(load(file), Path("out"), (), [0])]
    plain = [
        config.model_copy(update={"name": "", "out": ""}).model_dump_json() for config in configs
    ]
    assert len(set(plain)) == len(plain)
    assert all(config.data.test for config in configs)
