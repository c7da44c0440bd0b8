"""Pages that people look at: escaped, self-contained, in dark and in light, images with a name."""

import base64
import io
import re

import pytest
from jinja2 import UndefinedError
from PIL import Image

from harness.report.pages import predictions_html, write_page
from harness.report.pictures import Shown
from pictures import encoded


def jpeg(size=(64, 48), colour="teal") -> bytes:
    return encoded(Image.new("RGB", size, colour))


def test_everything_in_the_page_is_escaped_and_nothing_lies_outside_it(tmp_path):
    evil = '<script>alert("x")</script>'
    item = Shown(
        jpeg(), f"prompt {evil}", (f"truth {evil}",), f"said {evil}", False, note=f"note {evil}"
    )
    page = predictions_html(
        [item], tmp_path / "new" / "page.html", title=f"title {evil}"
    ).read_text()
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 6, "title twice, prompt, truth, prediction, note"
    assert not re.findall(r"""(?:src|href)=["'](?!data:)""", page)
    image = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    assert Image.open(io.BytesIO(image)).size == (160, 120), "the picture's own shape"


def test_the_page_counts_what_was_judged_and_names_an_empty_answer(tmp_path):
    items = [
        Shown(jpeg(), "q", ("a",), "a", True),
        Shown(Image.new("L", (8, 8)), "q", ("a", "b", "b"), " ", False),
        Shown(None, "describe", (), "a cat", None),
    ]
    page = predictions_html(items, tmp_path / "page.html").read_text()
    assert "1 of 2 right" in page
    assert "✗ (empty)" in page
    assert "b<br>a</td>" in page, "the answer most people gave comes first, each once"


def test_a_page_suits_a_telephone_and_a_dark_room_and_names_its_images(tmp_path):
    items = [Shown(jpeg(), "q", ("a",), "a"), Shown(None, "q", (), "")]
    page = predictions_html(items, tmp_path / "page.html").read_text()
    assert '<meta name="viewport" content="width=device-width' in page
    assert "@media (prefers-color-scheme: dark)" in page
    assert re.findall(r'alt="(.*?)"', page) == ["image 1 of 2", "image 2 of 2, missing"]
    assert page.count("<img") == 2


def test_a_damaged_image_is_a_grey_square_in_a_page(tmp_path):
    page = predictions_html([Shown(b"no jpeg", "q", (), "")], tmp_path / "page.html").read_text()
    image = Image.open(io.BytesIO(base64.b64decode(re.search(r'base64,([^"]+)', page)[1])))
    assert image.getpixel((9, 9)) == pytest.approx((208, 215, 222), abs=2)


def test_a_value_that_a_template_lacks_is_an_error(tmp_path):
    with pytest.raises(UndefinedError, match="count"):
        write_page(tmp_path / "page.html", "answers.html", title="t", rows=[], side=9)
