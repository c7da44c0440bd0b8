"""Launch files and how processes are started by them: what accelerate, DeepSpeed and the shell make of each."""

import os
import subprocess
import sys
import time

import pytest

from harness import launcher
from harness.config import ConfigError


def test_without_a_gpu_several_processes_are_started_the_one_way_that_starts_them():
    line, environment = launcher.command(
        ["x.yaml"], 2, environment={"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""}
    )
    assert line[line.index("--config_file") + 1].endswith("cpu.yaml")
    assert "--cpu" not in line
    assert environment["ACCELERATE_USE_CPU"] == "true"
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    line, environment = launcher.command(["x.yaml"], None, environment={"CUDA_VISIBLE_DEVICES": ""})
    assert line[line.index("--config_file") + 1].endswith("t4.yaml")
    assert line[-3:] == ["-m", "harness.train", "x.yaml"]


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA T4 (UUID: a)'\necho 'GPU 1: NVIDIA T4 (UUID: b)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


@pytest.mark.usefixtures("two_gpus")
def test_gpus_are_counted_and_all_of_them_used_unless_told_otherwise():
    assert launcher.gpus({}) == 2
    assert launcher.gpus({"CUDA_VISIBLE_DEVICES": "1"}) == 1
    assert launcher.gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    line, environment = launcher.command([], None, environment={})
    assert line[line.index("--num_processes") + 1] == "2"
    assert "ACCELERATE_USE_CPU" not in environment
    with pytest.raises(ConfigError, match="--processes 3: this machine has 2 GPUs; expected 1 to 2"):
        launcher.command([], 3, environment={})


def test_two_processes_really_start_and_the_exit_code_comes_back(tmp_path, monkeypatch):
    (tmp_path / "probe.py").write_text(
        "import os, sys, pathlib\n"
        "names = ['WORLD_SIZE', 'ACCELERATE_USE_CPU', 'OMP_WAIT_POLICY']\n"
        "path = pathlib.Path(sys.argv[1], 'rank' + os.environ['RANK'])\n"
        "path.write_text(' '.join(os.environ[n] for n in names))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert launcher.launch([str(tmp_path)], 2, module="probe") == 0
    assert {f.name: f.read_text() for f in tmp_path.glob("rank*")} == {
        "rank0": "2 true PASSIVE",
        "rank1": "2 true PASSIVE",
    }


def test_a_failed_run_gives_back_its_own_words_and_no_traceback_of_the_launcher(tmp_path, monkeypatch, capfd):
    (tmp_path / "probe.py").write_text("import sys\nprint('harness: no', file=sys.stderr)\nsys.exit(2)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert launcher.launch([], 1, module="probe") != 0
    assert capfd.readouterr().err == "harness: no\n"


def test_a_terminated_launch_lets_the_run_save_and_waits_for_it(tmp_path):
    (tmp_path / "probe.py").write_text(
        "import pathlib, signal, sys, time\n"
        "def stop(*_):\n    time.sleep(0.5)\n    pathlib.Path(sys.argv[1], 'saved').touch()\n    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path(sys.argv[1], 'started').touch()\n"
        "time.sleep(60)\n"
    )
    program = "import sys\nfrom harness.launcher import launch\nsys.exit(launch([sys.argv[1]], 1, module='probe'))"
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    started = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    started.terminate()
    assert started.wait(30) == 0
    assert (tmp_path / "saved").exists()
