"""The shell blocks of the pages: each says behind ```bash whether it runs as it stands, or what it
needs; those that run are run, in a folder with a user's own pictures.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.S | re.M)
RUN = "run"
MARKERS = (RUN, "needs-network", "needs-gpu", "needs-data", "needs-time")
SHELLS = ("bash", "sh", "shell", "console", "zsh")
LOOKS_LIKE_SHELL = re.compile(
    r"^\s*(?:\$ )?(?:[A-Z_]+=\S+ )*(?:harness|bash|python|pip|accelerate|torchrun|sbatch) [\w./-]",
    re.M,
)


class Block(NamedTuple):
    page: Path
    words: list[str]  # behind ```
    text: str

    @property
    def is_shell(self) -> bool:
        """A block of no language counts too where it looks like one: to leave the language out is
        no way round the marker.
        """
        return self.words[:1] in [[shell] for shell in SHELLS] or (
            not self.words and bool(LOOKS_LIKE_SHELL.search(self.text))
        )

    @property
    def first_line(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.partition(chr(10))[0]}"


BLOCKS = [
    Block(page, words.split(), text)
    for page in PAGES
    for words, text in BLOCK.findall(page.read_text(encoding="utf-8"))
]


def test_every_shell_block_says_whether_it_runs_or_what_it_needs():
    shell = [block for block in BLOCKS if block.is_shell]
    assert len(shell) >= 10
    unmarked = [b.first_line for b in shell if not b.words[1:] or set(b.words[1:]) - set(MARKERS)]
    assert unmarked == []


def drawings(folder: Path, count: int) -> None:
    """Draws a user's pictures, with a text of captions beside each."""
    folder.mkdir()
    for number in range(count):
        colour = ("red", "green", "blue")[number % 3]
        shape = ("circle", "square")[number % 2]
        image = Image.new("RGB", (96, 64), "white")
        draw = ImageDraw.Draw(image)
        box = (16 + number, 8, 60 + number, 52)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=colour)
        image.save(folder / f"{number:04d}.jpg")
        texts = f"a {colour} {shape}\na {shape} that is {colour}\n"
        (folder / f"{number:04d}.txt").write_text(texts)


@pytest.mark.slow
@pytest.mark.parametrize(
    "page",
    sorted({block.page for block in BLOCKS if RUN in block.words}),
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_blocks_of_a_page_that_are_marked_run_as_they_stand(page, tmp_path):
    """In their order, in an empty folder beside `photos`, as somebody would type them."""
    drawings(tmp_path / "photos", 12)
    command = tmp_path / "bin" / "harness"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m harness "$@"\n')
    command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",  # what needs it is marked otherwise
    }
    lines = [block.text for block in BLOCKS if block.page == page and RUN in block.words]
    ran = subprocess.run(
        ["bash", "-ex", "-o", "pipefail", "-c", "".join(lines)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-3000:]
    if page.name == "your-own-data.md":
        assert "0 errors" in ran.stdout  # the doctor passes what `harness init` wrote
        named = ("view.html", "as_seen.html", "runs/mine/report.html", "0001-look.png")
        assert [name for name in named if not (tmp_path / name).is_file()] == []
        assert "a " in ran.stdout.splitlines()[-2]  # the caption of the last command
