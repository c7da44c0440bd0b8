"""What the pages name exists: files, links, verbs, configs; and nothing waits to be filled in."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")


def linked(page: Path) -> list[Path]:
    """Returns the files that a page's links lead to, as far as they are files of ours."""
    places = [place.partition("#")[0] for place in LINK.findall(page.read_text(encoding="utf-8"))]
    return [page.parent / place for place in places if place and "://" not in place]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere_and_every_file_that_is_named_is_there(page):
    assert [place for place in linked(page) if not place.exists()] == []
    folders = "configs|launch|docs|benchmarks|tests"
    named = re.findall(rf"(?<![\w/])(?:{folders})/[\w./-]*\w", page.read_text(encoding="utf-8"))
    assert sorted(name for name in set(named) if not (ROOT / name).exists()) == []


def test_every_page_of_docs_is_reached_from_the_readme():
    reached, waiting = set(), [README]
    while waiting:
        page = waiting.pop().resolve()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        waiting += [place for place in linked(page) if place.exists()]
    assert [page for page in PAGES if page.resolve() not in reached] == []


def test_the_readme_is_short_and_its_table_fits_a_screen():
    lines = README.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 120] == []


def test_no_page_speaks_of_documents_that_its_readers_do_not_have():
    absent = re.compile(r"\b(?:DESIGN|STACK|MOVES|STYLE)\.md\b|\bissue \d|\.\./shared")
    assert [page.name for page in PAGES if absent.search(page.read_text(encoding="utf-8"))] == []


def test_every_verb_that_the_readme_names_is_one():
    verbs = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
    }
    verbs |= {group.name for group in app.registered_groups} | {"shards"}
    named = set(re.findall(r"(?:`|^)harness ([a-z][a-z-]+)", README.read_text(), re.M))
    assert named
    assert named <= verbs


def test_the_lines_of_python_run(tmp_path):
    """On a run that an earlier version left, in place of the demo's."""
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    assert len(code.strip().splitlines()) <= 10
    shutil.copytree(ROOT / "tests" / "data" / "formats" / "version_1", tmp_path / "made")
    code = code.replace("runs/demo", "t5_run").replace("photo.jpg", "picture.jpg")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    folder = tmp_path / "made"
    line = [sys.executable, "-c", code]
    ran = subprocess.run(
        line, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout != "") == (0, True), ran.stderr


def test_nothing_waits_to_be_filled_in():
    pages = [*PAGES, *(ROOT / "configs").glob("*.yaml")]
    waiting = re.compile(
        r"\b[A-Z]{3,}_(?:VERIFIED|OUTPUT|TABLE|LINES)\b|^FLICKR$|^SPEED$|\b(?:MINUTES|SECONDS) "
        r"|: VERIFIED$",
        re.M,
    )
    found = {page.name: waiting.findall(page.read_text(encoding="utf-8")) for page in pages}
    assert {name: words for name, words in found.items() if words} == {}


def test_no_text_names_the_package_as_something_that_an_index_has():
    """Anybody could register the name. A direct reference (NAME @ git+...) is fine."""
    kinds = ("*.md", "*.py", "*.sh", "*.sbatch", "*.ipynb", "*.yaml")
    folders = ("benchmarks", "configs", "docs", "harness", "launch", "shards")
    files = [file for folder in folders for kind in kinds for file in (ROOT / folder).rglob(kind)]
    named = re.compile(r"pip install [^\n]*(?<![\w-])vl-harness|vl-harness\[[\w,]+\](?! @ )")
    found = [file for file in [*files, *PAGES] if named.search(file.read_text(encoding="utf-8"))]
    assert [str(file.relative_to(ROOT)) for file in found] == []
