"""Tiny random models in the hub's own format, saved once a session; a test that changes one makes its own."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_clip_folder(tmp_path_factory) -> Path:
    """A full CLIP checkpoint, image 32, patch 8: 17 tokens of width 32, two layers."""
    from tiny import tiny_clip

    return tiny_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


@pytest.fixture(scope="session")
def tiny_t5_folder(tmp_path_factory) -> Path:
    """A T5 of d_model 64, 2 + 2 layers, 4 heads, its own `lm_head` and a tokenizer of 200 pieces at most."""
    from tiny import tiny_t5

    return tiny_t5(tmp_path_factory.mktemp("models") / "tiny-t5")


@pytest.fixture(scope="session")
def tiny_gpt2_folder(tmp_path_factory) -> Path:
    """A GPT-2 of width 64, 2 layers, 4 heads, 256 positions and a byte-level BPE tokenizer of 400 pieces at most."""
    from tiny import tiny_gpt2

    return tiny_gpt2(tmp_path_factory.mktemp("models") / "tiny-gpt2")
