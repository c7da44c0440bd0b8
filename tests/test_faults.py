"""The programs that break runs: a few faults here, the whole table and the soak by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def rows(*arguments: str) -> list[dict]:
    line = [sys.executable, str(BENCHMARKS / "faults.py"), "--json", *arguments]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.stdout, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_some_faults_end_as_promised():
    found = rows("--only", "torn", "two runs")
    assert len(found) == 2
    assert all(row["kept"] for row in found), found


@pytest.mark.long
def test_every_fault_ends_as_promised():
    broken = [row for row in rows() if not row["kept"]]
    assert not broken


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_soak_of_five_minutes_ends_bit_equal():
    line = [sys.executable, str(BENCHMARKS / "soak.py"), "--minutes", "5", "--json"]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
