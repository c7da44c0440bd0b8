"""Faults of processes, injected into real runs: memory that is out, launchers that are killed,
signals in an evaluation, ranks that hang.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from harness import checkpoint as checkpoints
from harness.ablate.experiment import CONFIG, LOG
from harness.config.load import dump
from harness.config.schema import Config
from harness.errors import GuardError, explain
from harness.evaluate.predict import answers
from harness.machine.heartbeat import HUNG
from harness.model.vlm import VisionLanguageModel
from harness.train import failures
from harness.train.__main__ import main
from toy_runs import losses, make_config

ROOT = Path(__file__).parents[3]
SUPPORT = ROOT / "tests" / "support"


@pytest.fixture
def file_of(tmp_path, tiny_clip_folder, tiny_t5_folder):
    """Writes the config of a toy run into its output folder, and returns the file."""

    def make(name="run", dev=False, **settings) -> Path:
        config = make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, name, dev, **settings)
        config.out_dir.mkdir()
        (config.out_dir / CONFIG).write_text(dump(config))
        return config.out_dir / CONFIG

    return make


def wait_for(what, seconds=60):
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.05)
    return found


def environment() -> dict[str, str]:
    path = f"{ROOT}{os.pathsep}{SUPPORT}"
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}


# ---- memory --------------------------------------------------------------------------------------


def test_memory_that_is_out_is_one_sentence_with_what_the_plan_advises(file_of, monkeypatch, capfd):
    forward = VisionLanguageModel.forward
    raised = []

    def first_fails(*given, **named):
        if not raised:
            raised.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*given, **named)

    monkeypatch.setattr(VisionLanguageModel, "forward", first_fails)
    assert main([str(file_of())]) == 1
    said = capfd.readouterr().err
    sentence = next(line for line in said.splitlines() if line.startswith("harness: "))
    assert "GPU memory is out (CUDA out of memory. Tried to allocate 2.00 GiB.)" in sentence
    assert "train.micro_batch is 3; by the plan 1 fits, with the same global_batch" in sentence
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: out of memory"), "GPU memory is out"),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling x"), "GPU memory is out"),
        (MemoryError(), "main memory is out"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 B"), "main memory is out"),
        (RuntimeError("[/x/gloo/transport/tcp/pair.cc:5] Connection closed"), "to another rank"),
        (torch.distributed.DistBackendError("NCCL error in: x"), "to another rank broke"),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
        (KeyError("out of memory"), None),
        (GuardError("nothing is trainable: out of memory"), None),
    ],
)
def test_what_failed_is_told_by_its_kind(error, said):
    found = failures.explain_failure(error, None, "1")
    assert (said in found) if said else (found is None)


def test_memory_that_is_out_in_an_evaluation_is_told_with_its_own_key():
    error = torch.OutOfMemoryError("CUDA out of memory.")
    assert "lower evaluation.batch_images" in explain(error)  # as `harness evaluate` says it

    class Full:
        def generate(self, *given):
            raise error

    with pytest.raises(torch.OutOfMemoryError) as raised:
        answers(Full(), None, None, None)
    config = Config(name="x")
    assert "lower evaluation.batch_images, which is 64" in failures.explain_failure(
        raised.value, config, "0"
    )


# ---- launchers -----------------------------------------------------------------------------------


def test_when_an_ablation_is_killed_hard_its_run_saves_and_ends(file_of):
    """Through all levels: the runner, its child, accelerate's launcher, the run."""
    out = file_of(epochs=500, save_every=2000).parent
    program = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from types import SimpleNamespace\n"
        "from harness.ablate.runner import launched\n"
        f"launched(SimpleNamespace(out=Path({str(out)!r})), os.environ)\n"
        "time.sleep(600)\n"
    )
    runner = subprocess.Popen([sys.executable, "-c", program], env=environment())
    try:
        wait_for(lambda: (out / "metrics.jsonl").exists() and losses(out))
        run = psutil.Process(runner.pid).children(recursive=True)
    finally:
        runner.kill()
        runner.wait()
    assert len(run) == 3
    _, left = psutil.wait_procs(run, timeout=60)
    for process in left:
        process.kill()
    assert not left
    assert "stopped by SIGTERM after step" in (out / LOG).read_text()
    assert checkpoints.newest(out).step == max(losses(out))


# ---- ranks that hang -----------------------------------------------------------------------------

PROGRAM = """
import ctypes, os, signal, sys, time
from harness.config.load import load
from harness.machine import heartbeat
from harness.train import __main__ as program
from harness.train.run import run
from same_runs import AtStep

heartbeat.AFTER_STOP = 1
act = {
    "stopped": lambda: (time.sleep(0.6), os.kill(os.getpid(), signal.SIGSTOP)),  # after a beat
    # which keeps the interpreter's lock
    "stuck": lambda: (print("stuck now", file=sys.stderr), ctypes.PyDLL(None).sleep(600)),
    "busy": lambda: time.sleep(8),
}[sys.argv[2]]
observers = [AtStep(2, act)] if os.environ["RANK"] == sys.argv[3] else []
program.run = lambda config, resume, **named: run(config, resume, observers, **named)
os._exit(program.main([sys.argv[1], *sys.argv[4:]]))
"""


@pytest.fixture
def ranks(tmp_path):
    """Starts two ranks of PROGRAM with nobody above them, so that rank 0 has the store."""
    started = []
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def start(*arguments):
        for rank in "01":
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
            names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            with (tmp_path / f"said-{rank}").open("w") as said:
                line = [sys.executable, "-c", PROGRAM, *map(str, arguments)]
                started.append(subprocess.Popen(line, env=environment() | names, stderr=said))
        return started

    start.said = lambda rank: (tmp_path / f"said-{rank}").read_text()
    yield start
    for process in started:
        process.kill()
        process.wait()


LIMITS = ("train.rank_warning_seconds=2", "train.rank_timeout_seconds=5")


@pytest.mark.parametrize("hung", [0, 1])
def test_a_rank_that_is_stopped_is_told_of_and_the_others_end(file_of, ranks, hung):
    started = ranks(file_of(), "stopped", hung, *LIMITS)
    assert started[1 - hung].wait(180) == HUNG
    said = ranks.said(1 - hung)
    told = rf"rank {hung} on \S+ has been silent for \d+ s, last: takes step [12]"
    assert re.search(f"{told}; the others wait for it", said), said
    ended = rf"the run ends: rank {hung} on \S+ has been silent for \d+ s while the others wait"
    assert re.search(f"{ended}.*--resume auto", said), said
    assert "Traceback" not in said


def test_a_signal_ends_a_run_at_once_that_waits_for_a_rank_whose_interpreter_is_stuck(
    file_of, ranks
):
    started = ranks(file_of(), "stuck", 1)
    wait_for(lambda: "stuck now" in ranks.said(1))
    started[0].terminate()
    assert started[0].wait(90) == 128 + signal.SIGTERM
    assert "the run was asked to stop" in ranks.said(0)


def test_a_rank_that_is_busy_is_told_of_and_waited_for(file_of, ranks):
    started = ranks(file_of(max_steps=4), "busy", 1, *LIMITS)
    assert [process.wait(180) for process in started] == [0, 0]
    assert re.search(r"rank 1 on \S+ has been busy for \d s.*it lives", ranks.said(0))
    assert "the run ends" not in ranks.said(0) + ranks.said(1)
