"""The linter says the same of a tree in which something was run as of a fresh one."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MADE = ("runs", "data", "mlruns", "torch")  # the last one has the name of a module that is not ours


@pytest.fixture
def tree(tmp_path):
    """A copy of everything here that ruff looks at, without what runs leave."""
    left_out = shutil.ignore_patterns("__pycache__", ".*")
    for folder in ("benchmarks", "harness", "launch", "shards", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=left_out)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def test_folders_that_runs_leave_in_the_root_change_nothing_for_the_linter(tree):
    for folder in MADE:
        (tree / folder).mkdir()
        (tree / folder / "made.py").touch()
    command = [
        sys.executable,
        "-m",
        "ruff",
        "check",
        "--no-cache",
        "--output-format",
        "concise",
        ".",
    ]
    linted = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert (linted.returncode, linted.stdout) == (0, "All checks passed!\n")
