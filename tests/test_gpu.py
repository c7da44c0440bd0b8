"""benchmarks/gpu.py, every line of it, on a CPU with tiny models: on a GPU it must not trip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def program(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    return gpu


def test_a_section_that_fails_keeps_its_rows_and_one_that_lacks_a_package_says_so(
    program, monkeypatch
):
    def fails(bench):
        yield program.Row("a figure", 1.5, "GB")
        raise RuntimeError("CUDA out of memory.\nmore")

    def lacks(bench):
        program.need("no_such_package")
        yield program.Row("nothing", 0.0)

    monkeypatch.setattr(program, "SECTIONS", {"fails": fails, "lacks": lacks})
    found = program.measured("fails", None)
    assert [row["value"] for row in found["rows"]] == [1.5]
    assert found["error"] == "failed: RuntimeError: CUDA out of memory"
    found = program.measured("lacks", None)
    assert found["rows"] == []
    assert found["error"] == "needs no_such_package, which is not installed"


def test_the_time_in_kernels_counts_what_runs_at_once_once(program):
    assert program.covered([(0, 2), (1, 3), (5, 6), (5.5, 5.8)]) == 4


@pytest.mark.slow
def test_every_section_runs_on_a_cpu_with_tiny_models():
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("deepspeed")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    asked = ["--device", "cpu", "--tiny", "--minutes", "0.01", "--json"]
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu.py", *asked],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    sections = [json.loads(line) for line in done.stdout.splitlines()]
    assert {s["section"]: s["error"] for s in sections if s["error"]} == {}, done.stderr
    rows = {row["what"]: row["value"] for section in sections for row in section["rows"]}
    assert {s["section"] for s in sections} >= {"memory", "speed", "profile", "resume", "offload"}
    assert rows["4 steps, resumed after half of them"] == "same bits"
    assert rows["grouped against unrolled"] > 0
    assert rows["scale, zero2_offload: planned"] > 0
