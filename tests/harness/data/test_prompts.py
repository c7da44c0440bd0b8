"""Templates: the words around a question, or the whole prompt of a caption."""

import pytest

from harness.data.prompts import prompt, template
from harness.errors import ConfigError


@pytest.mark.parametrize(
    ("task", "name", "question", "expected"),
    [
        ("caption", "photo", None, "a photo of"),
        ("caption", "describe", None, "Describe the image."),
        ("caption", "none", None, ""),
        ("vqa", "question", " Where is he? ", "Question: Where is he? Answer:"),
        (
            "vqa",
            "instruction",
            "Why?",
            "Based on the image, answer the question. Question: Why? Answer:",
        ),
        ("vqa", "none", "Why?", "Why?"),
        ("caption", "What is here?", None, "What is here?"),
        ("vqa", "{question} In one word:", "Why?", "Why? In one word:"),
    ],
)
def test_named_templates_and_templates_of_ones_own(task, name, question, expected):
    assert prompt(task, name, question) == expected


def test_braces_in_a_question_stay_as_they_are():
    assert (
        prompt("vqa", "question", "what is {0} or {question}?")
        == "Question: what is {0} or {question}? Answer:"
    )


@pytest.mark.parametrize(
    ("task", "name"), [("vqa", "instructions"), ("vqa", "Answer it."), ("caption", "foto")]
)
def test_a_name_that_is_no_template_is_answered_with_those_there_are(task, name):
    with pytest.raises(ConfigError, match=rf"prompts\.{task}: '{name}' .*none"):
        template(task, name)
