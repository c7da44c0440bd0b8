"""The tokeniser against what Stanford's own program said, in the order in which it was asked
(tests/data/ptb).
"""

import json
from pathlib import Path

import pytest

from harness.evaluate.ptb import tokenise

GOLDEN = Path(__file__).parents[2] / "data" / "ptb" / "tokens.json"


def test_every_caption_of_the_golden_file_has_the_tokens_of_the_original():
    captions, expected = zip(*json.loads(GOLDEN.read_text(encoding="utf-8")), strict=True)
    wrong = [
        pair
        for pair in zip(captions, tokenise(captions), expected, strict=True)
        if pair[1] != pair[2]
    ]
    assert not wrong, f"{len(wrong)}, the first: {wrong[:3]}"


@pytest.mark.parametrize(
    ("captions", "expected"),
    [
        (["it's"], ["it 's"]),  # the end of the text is no letter
        (["class of '95"], ["class of 95"]),  # nor a space
        (["class of '95", "a"], ["class of '95", "a"]),
        (["Inc.m"], ["inc.m"]),
        (
            ["200 N.", "A dog."],
            ["200 n", "a dog"],
        ),  # an initial before a word that begins sentences
        (["200 N.", "Two dogs."], ["200 n.", "two dogs"]),
        ([], []),
        ([""], [""]),
        (["", "...", ""], ["", "", ""]),
        (
            ["a\nb\r\nc\u2028d", "e"],
            ["a b c d", "e"],
        ),  # a caption stays one line, so none moves to another image
    ],
)
def test_the_end_of_a_caption_is_read_as_the_original_reads_it(captions, expected):
    assert tokenise(captions) == expected


def test_the_jar_agrees_with_a_fraction_over_its_space():
    assert tokenise(["1 1/2 cups"]) == ["1\xa01/2 cups"]
