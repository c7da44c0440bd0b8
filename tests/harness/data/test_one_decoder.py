"""A grey of more than 8 bits is the picture that a viewer shows, wherever it is decoded."""

import numpy as np
import pytest
from PIL import Image

from harness.config.schema import Config
from harness.data.images import ImageDecoder, ImageError, decode_image, reading
from harness.report.pictures import thumbnail
from pictures import encoded, make_tar
from shards.build import build
from shards.index import index_shards
from shards.loader import Loader
from shards.verify import stats, verify

SIDE = 16
RAMP = np.arange(SIDE * SIDE).reshape(SIDE, SIDE)  # 0 to 255: what must be seen


def of(values, dtype, form="TIFF", **options) -> bytes:
    return encoded(Image.fromarray(values.astype(dtype)), form, **options)


GREYS = {
    "16 bits, PNG": of(RAMP * 257, np.uint16, "PNG"),
    "16 bits, TIFF": of(RAMP * 257, np.uint16),
    "16 bits, white is 0": of(65535 - RAMP * 257, np.uint16, tiffinfo={262: 0}),
    "32 bits that hold 8": of(RAMP, np.int32),
    "32 bits that hold 16": of(RAMP * 257, np.int32),
    "32 bits below 0": of(RAMP * 1000 - 9000, np.int32),
    "floats to 1": of(RAMP / 255, np.float32),
    "floats to 255": of(RAMP, np.float32),
    "floats to 65535": of(RAMP * 257, np.float32),
    "floats below 0": of(RAMP / 10 - 3, np.float32),
    "floats above all": of(RAMP * 1e6, np.float32),
}


@pytest.mark.parametrize("name", GREYS)
def test_every_road_shows_the_picture_that_a_viewer_shows(tmp_path, name):
    data = GREYS[name]
    extension = "png" if "PNG" in name else "tiff"
    config = Config(
        name="x",
        model={"vision": {"kind": "efficientnet_lite0", "image_size": SIDE}},
    )
    source = tmp_path / "images"
    source.mkdir()
    (source / f"a.{extension}").write_bytes(data)
    (tmp_path / "t.jsonl").write_text(f'{{"image": "a.{extension}", "text": "a ramp"}}')
    build("image-folder", tmp_path / "built", images=source, jsonl=tmp_path / "t.jsonl")
    indexed = make_tar(tmp_path / "indexed" / "x.tar", [(f"a.{extension}", data), ("a.txt", b"x")])
    index_shards(indexed, "mine", "train")
    seen = {}
    for road, folder in (("build", tmp_path / "built" / "train"), ("index", indexed)):
        assert verify(folder) == []
        assert stats(folder)["image_sizes"] == {"16x16": 1}
        ((_, samples),) = Loader([str(folder)], global_batch=1, **reading(config)).iterate(epochs=1)
        seen[road] = samples[0].payload
    whole = ImageDecoder(image_size=1, mode="whole", max_pixels=1000)
    ((_, samples),) = Loader([str(indexed)], global_batch=1, decode=whole).iterate(epochs=1)
    seen["published"] = samples[0].payload
    seen["shown"] = np.asarray(thumbnail(data, SIDE))
    for road, pixels_HW3 in seen.items():
        off = np.abs(pixels_HW3.astype(int) - RAMP[..., None]).max()
        assert off <= 1, (road, off)


def test_a_transparent_grey_of_16_bits_lies_on_white_and_no_number_is_black():
    values = np.array([[5, 65535], [0, 32768]])
    seen = np.asarray(thumbnail(of(values, np.uint16, "PNG", transparency=5), 2))[..., 0]
    assert seen.tolist() == [[255, 255], [0, 128]]
    holes = np.array([[np.nan, 1.0], [0.5, np.inf]])
    assert np.asarray(thumbnail(of(holes, np.float32), 2))[..., 0].tolist() == [[0, 255], [128, 0]]


def test_a_picture_without_any_number_is_refused_and_an_even_one_is_not():
    with pytest.raises(ImageError, match="no pixel is a number"):
        decode_image(of(np.full((2, 2), np.nan), np.float32), 2, max_pixels=9, mode="squash")
    for value in (-7.0, 0.0, 1e9):
        pixels = decode_image(
            of(np.full((2, 2), value), np.float32), 2, max_pixels=9, mode="squash"
        )
        assert pixels.max() == 0
