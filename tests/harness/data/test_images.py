"""The pixels are those of transformers' own processor, and what is no usable image is refused in
words.
"""

import io
import pickle
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from harness.config.load import load
from harness.config.schema import Config, VisionConfig
from harness.data.fast_resize import FastDecoder, training_decoder
from harness.data.images import ImageDecoder, ImageError, decode_image, reading
from shards.files import ShardError
from shards.read import Sample

LIMIT = 1_000_000


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(width * 10_000 + height)
    noise = Image.fromarray(
        rng.integers(0, 256, (max(2, height // 8), max(2, width // 8), 4), dtype=np.uint8), "RGBA"
    )
    return noise.resize((width, height)).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def processor_pixels(image: Image.Image, side: int) -> np.ndarray:
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        do_rescale=False,
        do_normalize=False,
    )
    return processor(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)


@pytest.mark.parametrize(
    "size", [(300, 200), (201, 333), (224, 224), (100, 61), (225, 224), (640, 223)]
)
@pytest.mark.parametrize("side", [224, 31])
def test_crop_is_bit_equal_to_clips_own_processor(size, side):
    data = encoded(picture(*size), "JPEG")
    ours = decode_image(data, side, max_pixels=LIMIT, mode="crop")
    assert ours.dtype == np.uint8
    assert ours.shape == (side, side, 3)
    assert np.array_equal(ours, processor_pixels(Image.open(io.BytesIO(data)), side))


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGBA", "PNG"),
        ("LA", "PNG"),
        ("P", "GIF"),
        ("P", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("1", "PNG"),
    ],
)
def test_every_colour_mode_becomes_the_rgb_that_clips_processor_makes(mode, kind):
    options = {"transparency": 3} if mode == "P" else {}
    data = encoded(picture(90, 60, mode), kind, **options)
    ours = decode_image(data, 48, max_pixels=LIMIT, mode="crop")
    assert np.array_equal(ours, processor_pixels(Image.open(io.BytesIO(data)), 48))


def test_crop_of_real_photographs_is_bit_equal_to_clips_own_processor(shared_data):
    photographs = sorted(path for path in (shared_data / "flickr8k").rglob("*.jpg"))[-6:]
    assert photographs
    for path in photographs:
        ours = decode_image(path.read_bytes(), 224, max_pixels=50_000_000, mode="crop")
        assert np.array_equal(ours, processor_pixels(Image.open(path), 224)), path.name


def test_squash_keeps_the_whole_image():
    image = Image.new("RGB", (400, 100), "black")
    image.paste("white", (0, 0, 20, 100))  # at the left edge, which a centre crop would cut off
    data = encoded(image)
    assert decode_image(data, 100, max_pixels=LIMIT, mode="squash")[50, 1].tolist() == [
        255,
        255,
        255,
    ]
    assert decode_image(data, 100, max_pixels=LIMIT, mode="crop").max() == 0


@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_photograph_taken_sideways_stands_upright(mode):
    image = Image.new(mode, (80, 40), "black")
    image.paste("white", (0, 0, 40, 40))
    exif = Image.Exif()
    exif[0x0112] = (
        6  # to be shown turned by 90 degrees clockwise: the left half becomes the upper one
    )
    data = encoded(image, "PNG", exif=exif)
    pixels_HW3 = decode_image(data, 40, max_pixels=LIMIT, mode="squash")
    assert pixels_HW3[5].min() == 255
    assert pixels_HW3[-5].max() == 0


def test_an_oversized_image_is_refused_before_it_is_decoded():
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = struct.pack(
        ">II", 30_000, 30_000
    )  # the header claims 900 million pixels, above Pillow's own limit
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(ImageError, match="above the limit of 1000000 pixels"):
        decode_image(bytes(data), 32, max_pixels=LIMIT, mode="squash")
    with pytest.raises(
        ImageError, match=r"1001 x 1000 pixels, .* limit of 1000000 \(data\.max_image_pixels\)"
    ):
        decode_image(encoded(Image.new("1", (1001, 1000))), 32, max_pixels=LIMIT, mode="crop")


def test_a_sliver_that_would_grow_beyond_the_limit_is_refused():
    data = encoded(Image.new("RGB", (1, 5000)))
    with pytest.raises(ImageError, match="1 x 5000 pixels, too many to resize"):
        decode_image(data, 224, max_pixels=LIMIT, mode="crop")
    assert decode_image(data, 224, max_pixels=LIMIT, mode="squash").shape == (224, 224, 3)


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", encoded(picture(64, 64), "JPEG")[:-200], encoded(picture(64, 64), "PCX")],
    ids=["empty", "text", "truncated", "a format that is not read"],
)
def test_what_cannot_be_decoded_is_refused_by_one_error(data):
    with pytest.raises(ImageError, match="bytes cannot be decoded as an image"):
        decode_image(data, 32, max_pixels=LIMIT, mode="crop")


def test_the_decoder_reads_images_and_features_and_can_be_sent_to_a_process():
    decoder = pickle.loads(
        pickle.dumps(ImageDecoder.of(VisionConfig(kind="efficientnet_lite0", image_size=64), LIMIT))
    )
    data = encoded(picture(90, 60))
    pixels_HW3 = decoder(Sample(None, data, "png", 0, 0))
    assert np.array_equal(pixels_HW3, decode_image(data, 64, max_pixels=LIMIT, mode="squash"))
    features_PD = np.arange(6, dtype=np.float16).reshape(2, 3)
    payload = safetensors.numpy.save({"patches_PD": features_PD})
    assert np.array_equal(decoder(Sample(None, payload, "safetensors", 0, 0)), features_PD)
    with pytest.raises(ShardError, match="hold other, not patches_PD"):
        decoder(Sample(None, safetensors.numpy.save({"other": features_PD}), "safetensors", 0, 0))


def off(mode: str, data: bytes, reduced: bool = False) -> np.ndarray:
    """How far training's pixels are from the exact ones."""
    sample = Sample(None, data, "jpg", 0, 0)
    fast_HW3 = FastDecoder(224, mode, 10**7, reduced)(sample)
    exact_HW3 = ImageDecoder(224, mode, 10**7)(sample)
    assert (fast_HW3.dtype, fast_HW3.shape) == (exact_HW3.dtype, exact_HW3.shape)
    return np.abs(fast_HW3.astype(int) - exact_HW3)


@pytest.mark.parametrize("mode", ["crop", "squash"])
def test_fast_pixels_are_nearly_the_exact_ones(mode, shared_data):
    photographs = sorted((shared_data / "flickr8k" / "images_original_size").glob("*.jpg"))
    files = [path.read_bytes() for path in photographs]
    files += [encoded(picture(*size), "PNG") for size in ((300, 200), (100, 61), (224, 224))]
    files += [encoded(picture(300, 400, "RGBA"), "PNG"), encoded(picture(90, 300, "L"), "JPEG")]
    found = [off(mode, data) for data in files]
    if mode == "crop":
        assert max(each.max() for each in found) <= 2
    assert np.mean([each.mean() for each in found]) < 0.05
    # Pillow squashes some sizes in the other order, first the columns: nearly the same again.
    assert np.mean([(each > 2).mean() for each in found]) < 1e-4


def test_a_reduced_jpeg_is_near_and_one_that_is_small_is_as_before():
    large = encoded(picture(1400, 1000), "JPEG", quality=95)
    assert 0 < off("crop", large, reduced=True).mean() < 5
    small = encoded(picture(440, 400), "JPEG")
    assert np.array_equal(off("crop", small, reduced=True), off("crop", small))


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", encoded(picture(64, 64), "JPEG")[:-200], encoded(picture(1500, 1000))],
    ids=["empty", "text", "truncated", "too large"],
)
def test_what_is_refused_is_refused_in_the_same_words_by_every_way(data):
    said = []
    for decode in (ImageDecoder(32, "crop", LIMIT), FastDecoder(32, "crop", LIMIT)):
        with pytest.raises(ImageError) as refused:
            decode(Sample(None, data, "jpg", 0, 0))
        said.append(str(refused.value))
    assert said[0] == said[1]


def test_only_training_may_have_other_pixels_and_only_by_the_configs_word():
    config = Config(name="x")
    assert training_decoder(config) == reading(config)["decode"]
    for word, reduced in (("fast", False), ("reduced", True)):
        chosen = Config(name="x", data={"resize": word})
        assert training_decoder(chosen) == FastDecoder(224, "crop", 50_000_000, reduced)
        assert reading(chosen)["decode"] == ImageDecoder(224, "crop", 50_000_000)
    assert load("flickr8k_t4").data.resize == "fast"


def test_reading_processes_do_not_import_torch():
    program = (
        "import sys, harness.data.images, harness.data.features; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
