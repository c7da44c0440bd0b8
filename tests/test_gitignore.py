"""Git hides what runs and tools leave in the root, and no source file, wherever it lies."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("benchmarks", "configs", "docs", "harness", "launch", "shards", "tests")
MADE = ("build", "data", "dist", "mlruns", "runs")


def git(*arguments: str, given: str = "") -> set[str]:
    command = [
        "git",
        "-c",
        "core.excludesFile=/dev/null",
        *arguments,
    ]  # not what the user hides elsewhere
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # 1: nothing is ignored
    return set(done.stdout.splitlines())


def ignored(paths: set[str]) -> set[str]:
    return git(
        "check-ignore", "--no-index", "--stdin", given="\n".join(paths)
    )  # --no-index: tracked files too


@pytest.fixture(autouse=True)
def _in_a_repository():
    if not (ROOT / ".git").exists():
        pytest.skip("this tree was exported: there is no .git")


def test_no_source_file_is_hidden():
    there = git("ls-files") | {
        str(path.relative_to(ROOT)) for folder in CODE for path in (ROOT / folder).rglob("*.py")
    }
    assert "harness/__init__.py" in there
    assert ignored(there) == set()


def test_no_source_file_to_come_is_hidden():
    inside = ("collate.py", "pictures/shown.py")
    to_come = {f"{code}/{folder}/{file}" for code in CODE for folder in MADE for file in inside}
    assert (
        ignored(to_come | {"harness/data/collate.py", "tests/support/old_run/mlflow.db"}) == set()
    )


def test_what_runs_and_tools_leave_is_hidden():
    left = {f"{folder}/demo/config.yaml" for folder in MADE} | {
        ".venv",
        "vl_harness.egg-info/PKG-INFO",
        "mlflow.db",
    }
    left |= {"harness/__pycache__/demo.pyc", ".ruff_cache/x", ".pytest_cache/x"}
    assert ignored(left) == left
