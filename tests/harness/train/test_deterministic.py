"""`train.deterministic` is asked for before the engine starts CUDA, holds while the run learns, and
takes no bit from a run on a CPU.

On a GPU nothing of it was run: what is tested is what torch is told.
"""

import os

import pytest
import torch

from harness.config.schema import TrainConfig
from harness.train import engines
from harness.train import run as train
from harness.train.state import Observer
from same_runs import final, same_bits
from toy_runs import losses, make_config


@pytest.fixture(autouse=True)
def torch_as_it_was(monkeypatch):
    """What is asked for holds for a process, and the other tests live in this one."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is restored
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    cudnn = torch.backends.cudnn
    before = (cudnn.benchmark, cudnn.deterministic)
    yield
    torch.use_deterministic_algorithms(False)
    cudnn.benchmark, cudnn.deterministic = before


def asked_for():
    cudnn = torch.backends.cudnn
    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        cudnn.deterministic and not cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )


class Asked(Observer):
    """Keeps what torch is asked for while each step is taken."""

    def __init__(self):
        self.steps = []

    def batches_made(self, run, samples, batches):
        self.steps.append(asked_for())


def test_it_is_asked_for_before_the_engine_is_made(monkeypatch):
    seen = []
    monkeypatch.setattr(engines, "Engine", lambda config: seen.append(asked_for()))
    engines.make_engine(TrainConfig(deterministic=False))
    engines.make_engine(TrainConfig(deterministic=True))
    assert seen == [(False, False, False, None), (True, False, True, ":4096:8")]


def test_a_work_space_that_the_environment_names_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(engines, "Engine", lambda config: None)
    engines.make_engine(TrainConfig(deterministic=True))
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_run_on_a_cpu_has_the_same_bits_with_it_and_without(root):
    """Evaluations included: none of their operations is one that torch would have to refuse."""
    finals, logged = [], []
    for name, deterministic in (("without", False), ("with", True), ("again", True)):
        config = make_config(root, root / "clip", root / "t5", name, deterministic=deterministic)
        asked = Asked()
        train.run(config, observers=[asked])
        assert len(asked.steps) == 8
        assert {step[0] for step in asked.steps} == {deterministic}
        finals.append(final(config.out_dir))
        logged.append(losses(config.out_dir))
    for other in (1, 2):
        same_bits(finals[0], finals[other])
        assert logged[0] == logged[other]
