"""What is asked of the machine, on systems that answer less than Linux."""

import os
from pathlib import Path

import pytest

import harness
from harness.ablate import report, runner
from harness.doctor import machine
from harness.machine import devices, launcher


@pytest.mark.usefixtures("as_on_macos")
def test_cores_are_counted_where_the_system_does_not_say_which_are_ours(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    environment = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""}
    assert devices.cores() == 6
    assert launcher.command([], 2, environment=environment)[1]["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert runner.environment(jobs=3, slot=0)["OMP_NUM_THREADS"] == "2"
    assert report.machine().startswith("6 CPU cores")
    assert "6 cores" in machine.threads(1).found
    assert devices.cpu().float32 == 6 * devices.CPU_TERAFLOPS_PER_CORE


@pytest.fixture
def as_on_macos(monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")


def test_one_function_asks_for_the_cores():
    package = Path(harness.__file__).parent
    asks = [
        path.name
        for folder in (package, package.parent / "shards")
        for path in folder.rglob("*.py")
        if "sched_getaffinity" in path.read_text(encoding="utf-8")
    ]
    assert asks == ["devices.py"]
