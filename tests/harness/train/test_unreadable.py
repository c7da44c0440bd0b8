"""What cannot be read costs itself, up to `data.max_unreadable`; beyond that a run saves and stops.

Each fault is put into the shards of a real run.
"""

import json
import math
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from safetensors.torch import load_file

from harness import checkpoint as checkpoints
from harness.config.load import dump
from harness.config.schema import Config
from harness.data.encode import encode_set
from harness.errors import GuardError
from harness.evaluate.run_on_disk import evaluate_run
from harness.machine.launcher import launch
from harness.train import prepare
from harness.train import run as train
from harness.train.__main__ import main
from pictures import make_tar
from shards.files import ShardError
from shards.index import index_shards
from shards.loader import Loader
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record
from shards.sidecar import write_index
from shards.verify import verify
from shards.write import write_shards
from toy_runs import losses, make_config, picture, texts

IMAGES = 60  # of which 20 may be unreadable
NO_PICTURE = b"no picture"
FEW = {"texts_per_image": 1}


def shards_of(out: Path, count: int, damaged, first: int = 0) -> Path:
    """Writes `count` pictures, of which those that `damaged` names by their number are none."""
    samples = (
        (
            Record(f"{i:04d}", "toy", out.name, str(i), texts(i, captions=False)),
            NO_PICTURE[: 4 + i % 2] if i - first in damaged else picture(i),
            "png",
        )
        for i in range(first, first + count)
    )
    write_shards(samples, out, dataset="toy", split=out.name, max_shard_samples=15)
    return out


@pytest.fixture
def config_of(tmp_path, tiny_clip_folder, tiny_t5_folder):
    """Makes a config over `tmp_path`/train and /dev, which a test may have made itself."""

    def make(damaged=(), dev_damaged=(), data=(), **settings):
        shards_of(tmp_path / "train", IMAGES, damaged)
        shards_of(tmp_path / "dev", 50, dev_damaged, first=100)
        settings = {"global_batch": 10, "micro_batch": 10, "save_every": 100, **settings}
        settings = {"evaluate_every": 100, "image_use_every": None, **settings}
        config = make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, **settings)
        return config.model_copy(update={"data": config.data.model_copy(update=FEW | dict(data))})

    return make


def trained_on(config: Config, folder: Path) -> Config:
    document = config.model_dump(mode="json")
    document["data"]["train"] = [{"path": str(folder)}]
    return Config(**document)


def quarantined(out: Path) -> Counter:
    rows = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    return Counter(row["key"] for row in rows)


def test_a_run_beyond_the_share_saves_and_stops_and_an_override_goes_on(config_of, tmp_path, capfd):
    damaged = range(0, IMAGES, 2)
    config = config_of(damaged, dev=False)
    file = tmp_path / "run.yaml"
    file.write_text(dump(config))
    assert main([str(file)]) == 2
    said = capfd.readouterr().err
    newest = checkpoints.newest(config.out_dir)
    sets = str(tmp_path / "train")
    assert f"stopped after step {newest.step}, which is saved: too many images" in said
    count = sum(newest.state["train"]["unreadable"])
    assert count > 20
    assert f"{count} of 60 in {sets}, 20 may be (data.max_unreadable=0.001" in said
    # By kind: the bytes differ from picture to picture, the fault does not.
    assert f"found: {sets}: {count} x ImageError: N bytes cannot be decoded" in said
    assert newest.step < 6, "it would have stopped at the end of the epoch at the latest"

    # Resumed as it was it stops at the next one that is unreadable; it goes on where it is told to.
    assert main([str(file), "--resume", "auto"]) == 2
    assert checkpoints.newest(config.out_dir).step == newest.step + 1
    assert main([str(file), "data.max_unreadable=1", "--resume", "auto"]) == 0
    assert list(losses(config.out_dir)) == list(range(1, 13))
    assert quarantined(config.out_dir) == {f"{i:04d}": 1 for i in damaged}


def test_the_count_begins_anew_with_each_epoch_and_outlives_a_restart(config_of):
    config = config_of(range(15), dev=False, max_steps=4)
    train.run(config)
    before = checkpoints.newest(config.out_dir).state["train"]["unreadable"][0]
    assert 0 < before < 15
    longer = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": 6})})
    train.run(longer, "auto")
    assert checkpoints.newest(config.out_dir).state["train"]["unreadable"] == [15]
    whole = config.model_copy(update={"train": config.train.model_copy(update={"max_steps": None})})
    train.run(whole, "auto")  # 15 in each of two epochs are not 30
    assert checkpoints.newest(config.out_dir).state["train"]["unreadable"] == [15]
    assert set(quarantined(config.out_dir).values()) == {1}


def test_two_ranks_stop_alike_and_name_each_sample_once(config_of, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    config = config_of(range(0, IMAGES, 2), dev=False)
    file = tmp_path / "run.yaml"
    file.write_text(dump(config))
    assert launch([str(file)], 2) != 0
    said = capfd.readouterr().err
    newest = checkpoints.newest(config.out_dir)
    count = sum(newest.state["train"]["unreadable"])
    assert f"stopped after step {newest.step}, which is saved" in said
    assert f"{count} x ImageError: N bytes cannot be decoded" in said, "of both ranks"
    assert launch([str(file), "data.max_unreadable=1", "--resume", "auto"], 2) == 0
    assert quarantined(config.out_dir) == {f"{i:04d}": 1 for i in range(0, IMAGES, 2)}


def test_a_dev_set_of_which_too_much_is_unreadable_is_not_scored(config_of, tmp_path):
    config = config_of(dev_damaged=range(0, 50, 2), evaluate_every=2)
    with pytest.raises(ShardError, match=r"of 50 in .*dev, 20 may be .*ImageError"):
        train.run(config)
    assert checkpoints.newest(config.out_dir).step == 2, "saved before it stopped"
    assert "dev/" not in (config.out_dir / "metrics.jsonl").read_text()
    with pytest.raises(ShardError, match="too many images cannot be read"):
        evaluate_run(config.out_dir, [str(tmp_path / "dev")])
    with open(config.out_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "val')  # torn by a kill: the curves are drawn without it
    report = evaluate_run(
        config.out_dir, [str(tmp_path / "dev")], overrides=["data.max_unreadable=1"]
    )
    assert (report["images"], report["unreadable"]) == (25, 25)


def test_a_set_without_any_text_is_refused_by_name(config_of, tmp_path, capfd):
    config = config_of(dev=False)
    manifest = Manifest.open(tmp_path / "train")
    shards = tuple(replace(shard, texts=0) for shard in manifest.shards)
    write_index(replace(manifest, shards=shards), tmp_path / "train")
    file = tmp_path / "run.yaml"
    file.write_text(dump(config))
    assert main([str(file)]) == 2
    said = capfd.readouterr().err
    assert f"data.train.0.path: {tmp_path / 'train'}: none of its 60 records has a text" in said
    assert not config.out_dir.exists()


NOT_FEATURES = {
    "NaN": lambda made_PD: {"patches_PD": np.full_like(made_PD, np.nan)},
    "one infinity": lambda made_PD: {
        "patches_PD": np.where(made_PD == made_PD[3, 3], np.inf, made_PD)
    },
    "too large for float16": lambda made_PD: {"patches_PD": made_PD.astype(np.float32) + 1e6},
    "a patch more": lambda made_PD: {"patches_PD": np.vstack([made_PD, made_PD[:1]])},
    "flat": lambda made_PD: {"patches_PD": made_PD.reshape(-1)},
    "whole numbers": lambda made_PD: {"patches_PD": np.zeros(made_PD.shape, np.int8)},
    "another name": lambda made_PD: {"features": made_PD},
}


def test_features_that_are_none_cost_their_samples_and_never_the_weights(config_of, tmp_path):
    config = config_of(dev=False, max_steps=6)
    made = encode_set(tmp_path / "train", tmp_path / "features", config.model.vision)
    reader = Reader(made)
    spoils = list(NOT_FEATURES.values())

    def samples():
        for n in range(made.samples):
            sample = reader.read(n)
            payload = sample.payload
            if n in odd:
                features_PD = safetensors.numpy.load(payload)["patches_PD"]
                payload = safetensors.numpy.save(spoils[odd.index(n)](features_PD))
            yield sample.record, payload, "safetensors"

    # Into the first batch, from which the bridge takes its start values.
    order = Loader([made.folder], global_batch=10, seed=config.seed, window_shards=2)
    odd = [sample.index for sample in next(order.iterate())[1]][: len(spoils)]
    write_shards(
        samples(),
        tmp_path / "spoilt",
        dataset="toy",
        split="train",
        kind="features",
        encoder=made.encoder,
        extra_files={"controls.safetensors": made.read_file("controls.safetensors")},
    )
    config = trained_on(config, tmp_path / "spoilt")
    train.run(config)
    assert all(math.isfinite(loss) for loss in losses(config.out_dir).values())
    newest = checkpoints.newest(config.out_dir)
    weights = load_file(newest.path / "model" / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert newest.state["train"]["skipped"] == 0
    keys = {f"{made.key(n)}" for n in odd}
    assert set(quarantined(config.out_dir)) == keys
    problems = verify(tmp_path / "spoilt")
    assert len(problems) == len(odd)


def test_a_first_batch_without_anything_readable_does_not_leave_the_bridge_uncalibrated(
    config_of, monkeypatch
):
    config = config_of(dev=False)
    order = prepare.make_loader(config, None)
    first = [sample.index for sample in next(order.iterate())[1]]
    shutil.rmtree(config.data.train[0].path)
    shards_of(Path(config.data.train[0].path), IMAGES, first)
    model = prepare.build_model(config)
    seen = []
    monkeypatch.setattr(model.bridge, "calibrate", lambda *given: seen.append(given))
    prepare.calibrate(model, config)
    assert len(seen) == 1


def test_an_encoder_that_makes_nan_of_the_first_images_is_told_before_anything_is_saved(
    config_of, monkeypatch
):
    config = config_of(dev=False)
    model = prepare.build_model(config)
    monkeypatch.setattr(
        model, "patch_tokens", lambda batch: torch.full((batch.images, 17, 32), float("nan"))
    )
    with pytest.raises(GuardError, match="of the first images is not finite"):
        prepare.calibrate(model, config)


def test_odd_captions_links_and_pipes_in_shards_of_others_do_not_stop_a_run(config_of, tmp_path):
    odd = [
        b'{"caption": 5}',
        b'{"caption": {"en": "x"}}',
        b"[" * 100_000,
        b'{"caption": "\\ud800"}',
    ]
    files = []
    for n in range(24):
        content = odd[n] if n < len(odd) else b'{"caption": "a red thing"}'
        files += [(f"{n:04d}.png", picture(n)), (f"{n:04d}.json", content)]
    folder = make_tar(tmp_path / "theirs" / "x.tar", files)
    manifest = index_shards(folder, "theirs", "train")
    assert (manifest.samples, manifest.skipped) == (20, 4)
    config = config_of(dev=False, epochs=1)
    train.run(trained_on(config, folder))
    assert len(losses(config.out_dir)) == 2
