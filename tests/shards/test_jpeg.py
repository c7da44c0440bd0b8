"""JPEGs decoded by simplejpeg are Pillow's to the bit, and Pillow alone says what is refused."""

import io
import random
import struct

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pictures import encoded
from shards import images
from shards.images import jpeg_pixels, on_white, rgb_pixels, upright

WAYS = {
    "baseline": {},
    "progressive": {"progressive": True},
    "colour at full size": {"subsampling": 0, "quality": 98},
    "colour at half width": {"subsampling": 1},
    "restart markers": {"restart_marker_blocks": 2, "quality": 20},
    "stored as RGB": {"keep_rgb": True},
}


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (9, 12, 4), np.uint8), "RGBA")
    return small.resize((width, height)).convert(mode)


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.fixture
def decoded(monkeypatch) -> list[bytes]:
    """What simplejpeg decoded."""
    asked: list[bytes] = []
    decode = simplejpeg.decode_jpeg

    def noted(data, *colours, **options):
        pixels = decode(data, *colours, **options)
        asked.append(data)
        return pixels

    monkeypatch.setattr(simplejpeg, "decode_jpeg", noted)
    return asked


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(97, 61), (64, 48), (1, 9)])
def test_every_kind_of_jpeg_has_pillows_pixels(decoded, way, mode, size):
    options = {k: v for k, v in WAYS[way].items() if mode == "RGB" or k in ("quality",)}
    data = encoded(noise(*size, mode), "JPEG", **options)
    image, form, changed = upright(data)
    assert (image.mode, form, changed) == (mode, "JPEG", [])
    assert np.array_equal(np.asarray(on_white(image)), by_pillow(data))
    assert np.array_equal(rgb_pixels(data), by_pillow(data))
    assert decoded[0] == data


def test_real_photographs_have_pillows_pixels(decoded, shared_data):
    originals = sorted((shared_data / "flickr8k" / "images_original_size").glob("*.jpg"))
    others = sorted((shared_data / "vqav2" / "images" / "train2014").glob("*.jpg"))[:100]
    files = originals + others
    for path in files:
        assert np.array_equal(rgb_pixels(path.read_bytes()), by_pillow(path.read_bytes())), path
    assert len(decoded) == len(files) >= 100


@pytest.mark.parametrize("mode", ["CMYK", "RGB", "L"])
def test_what_simplejpeg_is_not_asked_for_comes_from_pillow(decoded, monkeypatch, mode):
    data = encoded(noise(60, 40, mode), "JPEG")
    if mode != "CMYK":  # a Pillow that was built over another library
        monkeypatch.setattr(images, "_LIKE_PILLOW", False)
    assert np.array_equal(rgb_pixels(data), by_pillow(data))
    assert np.array_equal(np.asarray(on_white(upright(data)[0])), by_pillow(data))
    assert not decoded


def test_a_photograph_on_its_side_is_turned_and_a_png_stays_what_it_is(decoded):
    exif = Image.Exif()
    exif[0x0112] = 6
    image, _, changed = upright(encoded(noise(60, 40), "JPEG", exif=exif))
    assert (image.size, changed) == ((40, 60), ["EXIF rotation"])
    data = encoded(noise(60, 40, "RGBA"), "PNG")
    assert np.array_equal(rgb_pixels(data), np.asarray(on_white(upright(data)[0])))
    assert not decoded


def test_damaged_jpegs_are_taken_or_refused_exactly_as_by_pillow():
    whole = [encoded(noise(64, 48), "JPEG", **options) for options in WAYS.values()]
    draw = random.Random(0)
    taken = 0
    for _ in range(1500):
        data = bytearray(draw.choice(whole))
        if draw.random() < 0.4:
            del data[draw.randrange(2, len(data)) :]
        else:
            data[draw.randrange(len(data))] = draw.choice([0, 0xFF, 0xD9, draw.randrange(256)])
        try:
            opened = Image.open(io.BytesIO(data), formats=["JPEG"])
        except Exception:
            continue
        if opened.width * opened.height > 10**6:
            continue
        found = jpeg_pixels(bytes(data), opened)
        if found is not None:
            taken += 1
            assert np.array_equal(found, np.asarray(opened))  # Pillow does not refuse it either
    assert taken > 100


def test_a_size_is_refused_before_anything_is_decoded(decoded):
    data = bytearray(encoded(noise(64, 48), "JPEG"))
    place = data.index(b"\xff\xc0")
    data[place + 5 : place + 9] = struct.pack(">HH", 60_000, 60_000)

    def check_size(width: int, height: int) -> None:
        raise ValueError(f"{width} x {height}")

    for read in (upright, rgb_pixels):
        with pytest.raises(Exception, match=r"60000 x 60000|exceeds limit"):
            read(bytes(data), check_size)
    assert not decoded


def test_a_large_jpeg_may_be_decoded_at_a_part_of_its_size():
    data = encoded(noise(900, 700), "JPEG", quality=95)
    for least, shape in ((700, (700, 900)), (351, (700, 900)), (350, (350, 450)), (80, (88, 113))):
        assert rgb_pixels(data, least_side=least).shape == (*shape, 3)
    small = Image.open(io.BytesIO(data)).reduce(2)
    off = np.abs(rgb_pixels(data, least_side=350).astype(int) - np.asarray(small.convert("RGB")))
    assert off.mean() < 2
