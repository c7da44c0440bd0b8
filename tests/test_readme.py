"""What the README names exists: files, verbs, configs; and nothing in it waits to be filled in."""

import re
from pathlib import Path

import pytest

from harness.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    named = set(
        re.findall(r"\b(?:configs|launch|docs|benchmarks|tests)/[\w./-]*\w", page.read_text())
    )
    assert sorted(name for name in named if not (ROOT / name).exists()) == []


def test_every_verb_that_the_readme_names_is_one():
    verbs = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
    }
    verbs |= {group.name for group in app.registered_groups} | {"shards"}
    named = set(re.findall(r"`harness ([a-z][a-z-]+)", (ROOT / "README.md").read_text()))
    assert named
    assert named <= verbs


def test_nothing_waits_to_be_filled_in():
    pages = [*PAGES, *(ROOT / "configs").glob("*.yaml")]
    waiting = {
        page.name: re.findall(
            r"\b[A-Z]{3,}_(?:VERIFIED|OUTPUT|TABLE)\b|^FLICKR$|^SPEED$", page.read_text(), re.M
        )
        for page in pages
    }
    assert {name: words for name, words in waiting.items() if words} == {}
