"""The demo at toy length: 40 images a split, three steps, every file and every figure it
promises.
"""

import functools
import json
import shutil

import pytest
from rich.progress import Progress

from harness import base_lm, demo
from harness.errors import ConfigError
from shards.sources import SOURCES

PROMISED = {
    *("accuracy", "text_only_accuracy", "majority_accuracy", "shuffled_accuracy", "blank_accuracy"),
    *(
        "no_image_accuracy",
        "loss_gap_nats",
        "answers_changed_where_truth_differs",
        "empty_rate",
        "verdict",
    ),
    *("quantized_modules", "trainable_parameters", "total_parameters", "seconds", "cpu_seconds"),
    *("samples_per_second", "peak_rss_mb"),
}


@pytest.fixture
def toy(monkeypatch):
    pytest.importorskip("easy_vqa", reason="the extra `demo` is not installed")
    pytest.importorskip("efficientnet_lite_pytorch", reason="the extra `demo` is not installed")
    load = SOURCES["easy-vqa"]

    def few():
        source = load()
        for split, items in source.splits.items():
            source.splits[split] = items[:40]
        return source

    monkeypatch.setitem(SOURCES, "easy-vqa", few)
    monkeypatch.setattr(base_lm, "make", functools.partial(base_lm.make, steps=3))
    whole = demo.demo_config

    def short(out, seed):
        config = whole(out, seed)
        train = config.train.model_copy(update={"max_steps": 3, "log_every": 1, "save_every": 1})
        evaluation = config.evaluation.model_copy(
            update={"dev_images": 4, "counterfactual_texts": 300}
        )
        return config.model_copy(update={"train": train, "evaluation": evaluation})

    monkeypatch.setattr(demo, "demo_config", short)


def test_the_whole_demo_writes_what_it_promises(toy, tmp_path, capfd):
    out = tmp_path / "demo"
    demo.run(out)
    report = json.loads((out / "report.json").read_text())
    assert [key for key in PROMISED if report.get(key) is None] == []
    assert report["verdict"] in (
        "image used",
        "image ignored",
        "EOS collapse",
        "not enough evidence",
    )
    assert report["quantized_modules"] == 32
    # The frozen encoder counts, though the run reads features: it alone has 3.37 million.
    assert report["trainable_parameters"] + 3_370_000 < report["total_parameters"]
    assert set(report["seconds"]) >= {"shards", "training", "evaluation", "all"}
    assert report["cpu_seconds"] > 0
    assert 100 < report["peak_rss_mb"] < 3 * 1024
    for name in (
        "predictions.png",
        "loss.png",
        "mlflow.db",
        "base_lm/model.safetensors",
        "features/test/index.json",
    ):
        assert (out / name).stat().st_size > 0, name
    told = capfd.readouterr().err
    *_, picture, page, look = told.rstrip().splitlines()
    assert picture.split() == ["picture", str(out / "predictions.png")]
    assert page.split() == ["report", str(out / "report.html")]
    assert look.endswith(f"harness ui {out}")
    written = [line for line in told.splitlines() if str(tmp_path) not in line]
    assert max(map(len, written)) <= 100, "a line that a log can hold"
    assert "evaluating on 4 dev images with" in told
    assert "vqa: accuracy" in told
    assert "kept" not in told

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert demo.run(out) == report
    again = capfd.readouterr().err
    assert f"{out} is a finished demo, these are its results" in again
    assert again.endswith(told[told.index("| easy-VQA") :])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    with pytest.raises(
        ConfigError, match="is a demo with seed 0, and 1 is asked for: remove it, or choose another"
    ):
        demo.run(out, seed=1)  # a report is never overwritten


def test_a_demo_that_was_broken_off_in_training_goes_on_with_what_is_whole(
    toy, tmp_path, capfd, monkeypatch
):
    out = tmp_path / "demo"

    def broken_off(out, text_only, bar):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(demo, "evaluate", broken_off)
        with pytest.raises(KeyboardInterrupt):
            demo.run(out)
    shutil.rmtree(out / "checkpoints" / "step-000003")
    shutil.move(out, tmp_path / "moved")
    out = tmp_path / "moved"
    parts = ("shards", *(f"features/{split}" for split in demo.SPLITS), "base_lm")
    before = {path: path.stat().st_mtime_ns for part in parts for path in (out / part).rglob("*")}
    words_alone = json.loads((out / "base_lm" / demo.WORDS_ALONE).read_text())["accuracy"]

    capfd.readouterr()
    report = demo.run(out)
    told = capfd.readouterr().err
    assert [line for line in told.splitlines() if line.startswith("   kept: ")] == [
        f"   kept: {out / part}" for part in (*parts, "checkpoints/step-000002")
    ]
    assert "going on after step 2" in told
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert report["text_only_accuracy"] == words_alone
    assert (out / "checkpoints" / "step-000003").is_dir()
    assert [line["step"] for line in demo.journal(out) if "train/loss" in line["values"]] == [
        1,
        2,
        3,
    ]
    assert "time, CPU time since it went on" in told


def test_a_part_that_is_missing_or_damaged_is_made_again_with_all_that_was_made_of_it(
    toy, tmp_path, capfd
):
    config = demo.demo_config(tmp_path, 0)
    with Progress(disable=True) as bar:
        demo.build_shards(tmp_path, config, bar)
        assert "kept" not in capfd.readouterr().err
        indexes = {path: path.read_bytes() for path in tmp_path.rglob("index.json")}
        assert len(indexes) == 6
        for later in ("base_lm", "checkpoints"):
            (tmp_path / later).mkdir()
        (tmp_path / "features" / "dev" / "dev-000000.tar").write_bytes(b"half")
        demo.build_shards(tmp_path, config, bar)
    told = capfd.readouterr().err
    for part, kept in {
        "shards": True,
        "features/train": True,
        "features/dev": False,
        "features/test": False,
    }.items():
        assert (f"kept: {tmp_path / part}\n" in told) is kept
    assert f"made again: {tmp_path}/features/dev/dev-000000.tar" in told
    assert {path: path.read_bytes() for path in indexes} == indexes
    assert not (tmp_path / "base_lm").exists()
    assert not (tmp_path / "checkpoints").exists()


def test_a_base_model_counts_as_made_when_it_was_written_whole(toy, tmp_path, monkeypatch):
    config = demo.demo_config(tmp_path, 0)

    def broken_off(sets, out, *rest, **options):
        (out / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(base_lm, "make", broken_off)
    with Progress(disable=True) as bar, pytest.raises(KeyboardInterrupt):
        demo.make_base(tmp_path, config, bar)
    assert not (tmp_path / "base_lm").exists()


def test_a_folder_that_is_not_a_demos_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is not empty: remove it, or choose another"):
        demo.make_folder(tmp_path, demo.demo_config(tmp_path, 0))
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_demo_that_was_broken_off_begins_anew(tmp_path):
    out = tmp_path / "demo"
    config = demo.demo_config(out, 0)
    assert not demo.make_folder(out, config)
    (out / "config.yaml").write_text("half")
    assert not demo.make_folder(out, config)
    assert not (out / "config.yaml").exists()


def test_the_demo_keeps_everything_in_its_own_folder(tmp_path):
    config = demo.demo_config(tmp_path / "a b", 7)
    places = [s.path for part in ("train", "dev", "test") for s in getattr(config.data, part)]
    assert all(
        place.startswith(str(tmp_path / "a b"))
        for place in [*places, config.model.lm.id, str(config.out_dir)]
    )
    assert config.seed == 7
