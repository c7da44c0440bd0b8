"""The demo at toy length: 40 images a split, three steps, every file and every figure it promises."""

import functools
import json

import pytest

from harness import base_lm, demo
from harness.errors import ConfigError
from shards.sources import SOURCES

PROMISED = {
    *("accuracy", "text_only_accuracy", "majority_accuracy", "shuffled_accuracy", "blank_accuracy"),
    *("no_image_accuracy", "loss_gap_nats", "answers_changed_where_truth_differs", "empty_rate", "verdict"),
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
        train = config.train.model_copy(update={"max_steps": 3, "log_every": 1})
        evaluation = config.evaluation.model_copy(update={"dev_images": 4, "counterfactual_texts": 300})
        return config.model_copy(update={"train": train, "evaluation": evaluation})

    monkeypatch.setattr(demo, "demo_config", short)


def test_the_whole_demo_writes_what_it_promises(toy, tmp_path, capfd):
    out = tmp_path / "demo"
    demo.run(out)
    report = json.loads((out / "report.json").read_text())
    assert [key for key in PROMISED if report.get(key) is None] == []
    assert report["verdict"] in ("image used", "image ignored", "EOS collapse", "not enough evidence")
    assert report["quantized_modules"] == 32
    assert 0 < report["trainable_parameters"] < report["total_parameters"]
    assert set(report["seconds"]) >= {"shards", "training", "evaluation", "all"}
    assert report["cpu_seconds"] > 0
    assert 100 < report["peak_rss_mb"] < 3 * 1024
    for name in ("predictions.png", "loss.png", "mlflow.db", "base_lm/model.safetensors", "features/test/index.json"):
        assert (out / name).stat().st_size > 0, name
    assert "mlflow ui" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="is not empty"):  # a report is never overwritten
        demo.run(out)


def test_a_folder_that_is_not_a_demos_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(ConfigError, match="is not empty: remove it, or choose another"):
        demo.make_folder(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_a_demo_that_was_broken_off_begins_anew(tmp_path):
    out = tmp_path / "demo"
    demo.make_folder(out)
    (out / "config.yaml").write_text("half")
    demo.make_folder(out)
    assert not (out / "config.yaml").exists()


def test_the_demo_keeps_everything_in_its_own_folder(tmp_path):
    config = demo.demo_config(tmp_path / "a b", 7)
    places = [s.path for part in ("train", "dev", "test") for s in getattr(config.data, part)]
    assert all(place.startswith(str(tmp_path / "a b")) for place in [*places, config.model.lm.id, str(config.out_dir)])
    assert config.seed == 7
