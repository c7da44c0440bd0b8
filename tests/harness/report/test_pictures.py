"""Pictures and tables that people look at: readable whatever the text and the image are."""

import pytest
from PIL import Image

from harness.report.pictures import (
    RIGHT,
    WRONG,
    Shown,
    loss_curves,
    markdown_table,
    predictions_picture,
    thumbnail,
)
from pictures import encoded


def jpeg(size=(64, 48), colour="teal") -> bytes:
    return encoded(Image.new("RGB", size, colour))


def pixels_near(picture: Image.Image, colour: str) -> int:
    """How many pixels are of this very colour: the text drawn in it."""
    wanted = tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return sum(
        count for count, found in picture.convert("RGB").getcolors(1 << 24) if found == wanted
    )


def test_a_markdown_table_aligns_numbers_and_keeps_pipes_and_newlines_inside_their_cell():
    table = markdown_table([["a|b\nc", 1.23456], ["d", 99]], ["name", "score"])
    assert table.splitlines() == [
        "| name   | score |",
        "|--------|------:|",
        "| a\\|b c | 1.235 |",
        "| d      |    99 |",
    ]


def test_right_is_green_and_wrong_is_red_in_the_picture(tmp_path):
    for right, there, absent in ((True, RIGHT, WRONG), (False, WRONG, RIGHT)):
        item = Shown(jpeg(), "What colour?", ("teal",), "teal", right)
        picture = Image.open(predictions_picture([item], tmp_path / "one.png"))
        assert pixels_near(picture, there) > 20
        assert pixels_near(picture, absent) == 0


def test_a_dozen_cards_of_any_text_and_image_fit_their_grid(tmp_path):
    images = [
        jpeg((10, 400)),
        jpeg((400, 10)),
        Image.new("RGBA", (3, 3)),
        Image.new("P", (9, 9)),
        None,
    ]
    texts = ["x" * 500, "", "many words " * 60, "Où est-il ? — là"]
    items = [
        Shown(images[i % 5], texts[i % 4], (texts[i % 4],) * 3, texts[-i % 4], None)
        for i in range(12)
    ]
    picture = Image.open(predictions_picture(items, tmp_path / "dozen.png"))
    assert picture.width < 1200
    assert picture.height < 2000


@pytest.mark.parametrize(
    "series", [{}, {"train": [(1, 2.0), (2, float("nan")), (3, 1.0)], "dev": []}]
)
def test_curves_are_drawn_with_gaps_and_even_with_nothing_to_draw(tmp_path, series):
    assert Image.open(loss_curves(series, tmp_path / "curve.png")).width > 600


def test_a_missing_image_is_a_grey_square():
    assert thumbnail(None, 32).size == (32, 32)
