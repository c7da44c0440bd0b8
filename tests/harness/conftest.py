"""Tiny random models in the hub's own format, saved once a session; a test that changes one makes
its own.
"""

import shutil
import sys
import time
from http import HTTPStatus
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory) -> Path:
    """A full CLIP checkpoint, image 32, patch 8: 17 tokens of width 32, two layers."""
    from tiny_models import tiny_clip

    return tiny_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory) -> Path:
    """A T5 of d_model 64, 2 + 2 layers, 4 heads, its own `lm_head` and a tokenizer of 200 pieces at
    most.
    """
    from tiny_models import tiny_t5

    return tiny_t5(tmp_path_factory.mktemp("models") / "tiny-t5")


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory) -> Path:
    """A GPT-2 of width 64, 2 layers, 4 heads, 256 positions and a byte-level BPE tokenizer of 400
    pieces at most.
    """
    from tiny_models import tiny_gpt2

    return tiny_gpt2(tmp_path_factory.mktemp("models") / "tiny-gpt2")


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_clip_folder, tiny_t5_folder) -> Path:
    """A folder for the runs of one file, with models of its own in `clip` and `t5`."""
    folder = tmp_path_factory.mktemp("runs")
    shutil.copytree(tiny_clip_folder, folder / "clip")
    shutil.copytree(tiny_t5_folder, folder / "t5")
    return folder


@pytest.fixture
def harness(monkeypatch, capsys):
    """Runs `harness ...` in this process and gives (exit code, stdout, stderr)."""
    from harness.cli import main as cli

    def _harness(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["harness", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        said = capsys.readouterr()
        return left.value.code or 0, said.out, said.err

    return _harness


@pytest.fixture(scope="session", autouse=True)
def few_trees():
    """Puts ten trees into the shallow floor: a hundred take half the time of a toy's evaluation,
    whatever the number of texts. Tests of the floor name their number of trees; a process that is
    started, such as one of `harness evaluate`, has the hundred.
    """
    from harness.evaluate.gate_terms.shallow import shallow_answers

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(shallow_answers.__kwdefaults__, "trees", 10)
        yield


@pytest.fixture(autouse=True)
def no_secrets_of_other_tests():
    """A process remembers the secrets it was given: those of one test are words in the next."""
    from harness import redact

    redact._known.clear()


@pytest.fixture
def silent_hub(monkeypatch):
    """Makes a hub that gives no answer for a while; the list is of the times that it was asked."""
    from huggingface_hub import constants

    from harness.machine import network

    calls = []

    class Session:
        def head(self, *_, **__):
            calls.append(time.monotonic())
            time.sleep(1.0)
            return SimpleNamespace(status_code=HTTPStatus.OK)

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "get_session", Session)
    monkeypatch.setattr(network, "HUB_ANSWERS_WITHIN", 0.1)
    network._hub_answers.cache_clear()
    yield calls
    network._hub_answers.cache_clear()
