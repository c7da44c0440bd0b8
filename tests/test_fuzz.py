"""Any bytes give a value or the reader's own error, in bounded time: a few examples of what
benchmarks/fuzz.py runs for long.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "fuzz.py"


def _loaded():
    spec = importlib.util.spec_from_file_location("fuzz", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    sys.modules["fuzz"] = module  # dataclasses look it up
    spec.loader.exec_module(module)
    return module


fuzz = _loaded()


@pytest.mark.parametrize("name", fuzz.targets())
def test_any_bytes_give_a_value_or_the_readers_own_error(name):
    assert fuzz.run_round(fuzz.targets()[name], number=7, examples=150) >= 150


def test_a_reader_that_raises_anything_else_is_found():
    def reader(data, folder):
        if len(data) > 3:
            raise KeyError("not its own")

    with pytest.raises(KeyError):
        fuzz.run_round(fuzz.Target(fuzz.st.binary(), reader, (ValueError,)), 7, 100)
