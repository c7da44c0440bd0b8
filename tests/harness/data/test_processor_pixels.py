"""Pixels for an encoder of `vision.kind: auto` are, bit for bit, those of its own image processor
in transformers, and what its file says that is not known here is refused in one sentence.
"""

import io
import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from harness.config.schema import Config, VisionConfig
from harness.data.fast_resize import training_decoder
from harness.data.images import ImageDecoder, fitted
from harness.errors import ConfigError
from harness.model.preprocessing import Fit, from_fields, own_preprocessing, preprocessing_of
from harness.model.vision.load import load_vision
from shards.read import Sample
from tiny_models import tiny_tower

LIMIT = 10_000_000
PIL = {
    "Bit": BitImageProcessorPil,
    "CLIP": CLIPImageProcessorPil,
    "DeiT": DeiTImageProcessorPil,
    "Siglip": SiglipImageProcessorPil,
    "ViT": ViTImageProcessorPil,
}
ENDS = ("ImageProcessor", "ImageProcessorFast", "ImageProcessorPil", "FeatureExtractor")
# As they stand in files on the hub; {}: what a file leaves out is the class's own.
FILES = {
    "siglip, bicubic": ("Siglip", {"size": {"height": 224, "width": 224}, "resample": 3}),
    "siglip 2, bilinear": ("Siglip", {"size": {"height": 256, "width": 256}, "resample": 2}),
    "dinov2": ("Bit", {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224}}),
    "clip, of before": ("CLIP", {"size": 224, "crop_size": 224}),
    "vit, of before": ("ViT", {"size": 224}),
    "deit": ("DeiT", {"size": 256, "crop_size": 224, "resample": 3}),
    "siglip, no sizes": ("Siglip", {}),
    "vit, no sizes": ("ViT", {}),
    "deit, no sizes": ("DeiT", {}),
    "bit, no sizes": ("Bit", {}),
    "vit, not rescaled": ("ViT", {"do_rescale": False, "image_mean": [127.0] * 3}),
    "vit, not normalised": ("ViT", {"do_normalize": False}),
}


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Returns something like a photograph: broad shades, edges and grain."""
    rng = np.random.default_rng(width * 10_000 + height)
    coarse = rng.integers(0, 256, (7, 9, 4), dtype=np.uint8)
    shades = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = shades.astype(int) + rng.normal(0, 12, shades.shape).astype(int)
    grain[height // 3 : height // 2, width // 4 : width // 2] //= 3
    return Image.fromarray(grain.clip(0, 255).astype(np.uint8)).convert(mode)


SHAPES = {
    "wide": picture(500, 213),
    "tall": picture(201, 333),
    "square": picture(224, 224),
    "small": picture(61, 100),
    "one pixel more": picture(225, 224),
    "grey": picture(300, 200, "L"),
    "transparent": picture(180, 240),
}
SHAPES["transparent"].putalpha(picture(180, 240, "L"))


def sample(image: Image.Image) -> Sample:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return Sample(None, buffer.getvalue(), "png", 0, 0)


@pytest.mark.parametrize("name", FILES)
def test_pixels_are_bit_for_bit_those_of_the_models_own_processor(name):
    kind, fields = FILES[name]
    processor = PIL[kind](**fields, do_convert_rgb=True)
    for ending in ENDS:
        said = from_fields("m", {**fields, "image_processor_type": f"{kind}{ending}"})
        assert said == from_fields("m", {**fields, "feature_extractor_type": f"{kind}{ending}"})
    for shape, image in SHAPES.items():
        decode = ImageDecoder(said.fit.side, None, LIMIT, said=said.fit)
        ours_HW3 = decode(sample(image))
        plain = {"do_rescale": False, "do_normalize": False}
        theirs = processor(image, return_tensors="np", **plain)["pixel_values"][0]
        assert ours_HW3.dtype == np.uint8
        assert np.array_equal(ours_HW3, theirs.transpose(1, 2, 0)), (name, shape)
        normed = (torch.from_numpy(ours_HW3).float() * said.scale - torch.tensor(said.mean)) / (
            torch.tensor(said.std)
        )
        theirs = processor(image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(normed.permute(2, 0, 1), theirs, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("kind", ["siglip", "dinov2", "deit"])
def test_a_saved_models_processor_is_found_and_its_pixels_are_what_the_tower_takes(kind, tmp_path):
    folder = tiny_tower(kind, tmp_path / kind)
    side = 28 if kind == "dinov2" else 32
    vision = VisionConfig(kind="auto", id=str(folder), image_size=side)
    decode = pickle.loads(pickle.dumps(ImageDecoder.of(vision, LIMIT)))
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    tower = load_vision(vision)
    assert tower.identity()["preprocessing"].startswith(decode.fit.words)
    for image in (SHAPES["wide"], SHAPES["small"]):
        ours_HW3 = decode(sample(image))
        theirs = processor(image, return_tensors="pt")["pixel_values"]
        normed = (torch.from_numpy(ours_HW3).float() * tower.scale - tower.mean_3) / tower.std_3
        torch.testing.assert_close(normed.permute(2, 0, 1)[None], theirs, atol=1e-6, rtol=1e-6)
        tower(torch.from_numpy(ours_HW3)[None])


def test_at_another_size_as_much_of_the_picture_is_cut_off(tmp_path):
    folder = tiny_tower("dinov2", tmp_path / "dinov2")
    larger = VisionConfig(kind="auto", id=str(folder), image_size=56)
    assert preprocessing_of(larger).fit == Fit(56, "crop", 64, "bicubic")
    theirs = BitImageProcessorPil(
        size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, do_rescale=False
    )(SHAPES["wide"], return_tensors="np", do_normalize=False)["pixel_values"][0]
    assert np.array_equal(
        ImageDecoder.of(larger, LIMIT)(sample(SHAPES["wide"])), theirs.transpose(1, 2, 0)
    )


def test_the_fast_way_makes_nearly_the_same_pixels(tmp_path):
    for kind, side in {"siglip": 32, "dinov2": 28}.items():
        folder = tiny_tower(kind, tmp_path / kind)
        vision = VisionConfig(kind="auto", id=str(folder), image_size=side)
        config = Config(name="fast", model={"vision": vision}, data={"resize": "fast"})
        fast = training_decoder(config)(sample(SHAPES["wide"])).astype(int)
        exact = ImageDecoder.of(vision, LIMIT)(sample(SHAPES["wide"]))
        assert fast.shape == exact.shape == (side, side, 3)
        assert 0 < np.abs(fast - exact).sum() < 0.02 * fast.size
        assert np.abs(fast - exact).max() <= 2


def test_a_decoder_of_features_asks_for_no_processor(tmp_path):
    gone = VisionConfig(kind="auto", id=str(tmp_path / "gone"))
    decode = ImageDecoder.of(gone, LIMIT)
    assert decode.pixels == "exact"
    with pytest.raises(ConfigError, match=r"/gone holds no preprocessor_config\.json|cannot"):
        decode(sample(SHAPES["small"]))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "SigLIP 2 of the NaFlex kind"),
        (
            {"image_processor_type": "DINOv3ViTImageProcessorFast"},
            "is DINOv3ViTImageProcessorF",
        ),
        ({"image_processor_type": "ConvNextImageProcessor"}, "known are those called Bit, CLIP"),
        ({}, "processor of m is None"),
        (
            {"do_resize": False},
            "do_resize in .* of m is False, expected true",
        ),
        ({"resample": 1}, r"resample .* is 1, expected 2 \(bilinear\) or 3"),
        ({"size": {"height": 224, "width": 196}}, "size .* expected a square"),
        ({"size": {"shortest_edge": 224, "longest_edge": 300}}, "size .* expected a square"),
        ({"size": {"shortest_edge": 224}}, "crop_size .* is None, expected a square of at most"),
        ({"do_center_crop": True, "crop_size": 256}, "crop_size .* is 256, expected .* 224"),
        ({"do_center_crop": True, "crop_size": {"height": 2, "width": 3}}, "expected a square"),
    ],
)
def test_what_is_not_known_here_is_refused_in_one_sentence(fields, words):
    known = {"image_processor_type": "SiglipImageProcessor"} if fields else {}
    with pytest.raises(ConfigError, match=words) as caught:
        from_fields("m", known | fields)
    assert str(caught.value).startswith("model.vision.id: ")
    assert "\n" not in str(caught.value)


def test_the_file_of_transformers_5_goes_before_the_older_one(tmp_path):
    older = {"image_processor_type": "ViTImageProcessor", "size": 192}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(older))
    assert own_preprocessing(str(tmp_path), None).fit == Fit(192, "squash", 192, "bilinear")
    newer = {"image_processor_type": "ViTImageProcessor", "size": 160}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": newer}))
    own_preprocessing.cache_clear()
    assert own_preprocessing(str(tmp_path), None).fit.side == 160
    (tmp_path / "processor_config.json").write_text("{")
    own_preprocessing.cache_clear()
    with pytest.raises(ConfigError, match=r"preprocessor_config.json of .* cannot be read"):
        own_preprocessing(str(tmp_path), None)


def test_a_picture_of_an_exports_processor_is_fitted_so_too():
    fit = Fit(28, "crop", 32, "bicubic")
    image = SHAPES["tall"]
    expected = ImageDecoder(28, None, LIMIT, said=fit)(sample(image))
    assert np.array_equal(fitted(image, fit), expected)
