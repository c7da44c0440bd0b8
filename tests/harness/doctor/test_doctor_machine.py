"""Each check of the machine, once where its trouble is really there and once where it is not."""

import os
import time

import pytest
import torch
from bitsandbytes.functional import has_avx512bf16
from bitsandbytes.nn import Linear4bit

from harness.doctor import machine
from harness.doctor.findings import Finding, failed, run
from harness.doctor.machine import Gpu

T4 = Gpu("Tesla T4", (7, 5), 16 * 2**30)
A100 = Gpu("A100", (8, 0), 40 * 2**30)


def test_a_check_that_raises_is_an_error_line_and_keeps_what_it_had_found():
    def check():
        yield Finding("a", "OK", "fine")
        raise ValueError("an unexpected\nthing")

    assert run("b", check) == [
        Finding("a", "OK", "fine"),
        Finding("b", "error", "ValueError: an unexpected thing"),
    ]
    assert failed(run("b", check))
    assert run("b", lambda: None) == []


def test_an_old_python_is_an_error(monkeypatch):
    assert machine.python().state == "OK"
    monkeypatch.setattr(machine, "PYTHON", (99, 0))
    assert machine.python().state == "error"


def test_gpus_that_torch_does_not_see_are_an_error(monkeypatch):
    assert machine.torch_build(0, None).state == "OK"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    without = machine.torch_build(2, "535.1")
    assert without.state == "error"
    assert "from the CUDA index" in without.fix
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "update the driver" in machine.torch_build(2, "535.1").fix


@pytest.mark.parametrize(
    ("gpu", "kernels", "state", "words"),
    [
        (T4, ["sm_75", "sm_80"], "OK", "no native bf16"),
        (A100, ["sm_75", "sm_80"], "OK", ", bf16"),
        (T4, ["sm_80", "sm_90a", "compute_120"], "error", "no kernels for it"),
        (Gpu("RTX 3090", (8, 6), 24 * 2**30), ["sm_80"], "OK", "8.6"),
        (Gpu("V100", (7, 0), 16 * 2**30), ["sm_75"], "error", "no kernels"),
        (Gpu("B200", (10, 0), 180 * 2**30), ["sm_90"], "error", "no kernels"),
        (Gpu("B200", (10, 0), 180 * 2**30), ["compute_90"], "OK", "10.0"),
    ],
)
def test_a_gpu_without_kernels_is_an_error_and_bf16_is_told(gpu, kernels, state, words):
    (found,) = machine.graphics([gpu], kernels)
    assert found.state == state
    assert words in found.found


def test_no_gpu_is_fine():
    (found,) = machine.graphics([])
    assert found.state == "OK"


def test_four_bit_layers_learn_before_and_after_an_evaluation():
    assert machine.four_bit().state == "OK"


@pytest.mark.skipif(not has_avx512bf16(), reason="this CPU lacks the kernel without autograd")
def test_the_kernel_without_autograd_is_found_where_its_guard_is_removed(monkeypatch):
    monkeypatch.setattr("harness.doctor.machine.keep_autograd", lambda lm: None)
    found = machine.four_bit()
    assert found.state == "error"
    assert "after an evaluation" in found.found


def test_a_4_bit_layer_without_gradient_is_an_error_on_any_machine(monkeypatch):
    forward = Linear4bit.forward
    monkeypatch.setattr(Linear4bit, "forward", lambda layer, x: forward(layer, x.detach()))
    found = machine.four_bit()
    assert found.state == "error"
    assert "at once" in found.found


def test_deepspeed_that_is_absent_is_told_with_its_extra(monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    assert "pip install -e '.[deepspeed]'" in machine.deepspeed().fix


def test_two_processes_add_up_their_numbers():
    assert machine.all_reduce(0) == Finding(
        "all-reduce (gloo)", "OK", "2 processes added up their numbers"
    )


def waits_for_ever(*_: object) -> None:
    time.sleep(600)


def fails(*_: object) -> None:
    raise ZeroDivisionError("division by zero")


def test_processes_that_wait_for_ever_are_ended_and_those_that_fail_are_quoted():
    waiting = machine.all_reduce(0, seconds=1, rank_program=waits_for_ever)
    assert (waiting.state, "did not find each other in 1 s" in waiting.found) == ("error", True)
    failing = machine.all_reduce(0, rank_program=fails)
    assert (failing.state, "ZeroDivisionError" in failing.found) == ("error", True)


def test_a_wrong_sum_is_an_error(monkeypatch):
    monkeypatch.setattr(machine.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(machine.distributed, "all_reduce", lambda total: None)
    with pytest.raises(ValueError, match=r"the sum is 1\.0, expected 3"):
        machine.add_up_ranks(0, 2, "gloo", "nowhere")


@pytest.mark.parametrize(
    ("threads", "policy", "processes", "state"),
    [
        ("1", "PASSIVE", 1, "OK"),
        ("", "passive", 2, "OK"),
        ("4", "PASSIVE", 1, "OK"),
        ("4", "PASSIVE", 2, "warning"),
        ("1", "PASSIVE", 5, "warning"),
        ("1", "ACTIVE", 1, "warning"),
    ],
)
def test_more_threads_than_cores_and_threads_that_spin_are_warned_of(
    monkeypatch, threads, policy, processes, state
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    assert machine.threads(processes).state == state


def test_small_shared_memory_matters_to_several_gpus(monkeypatch, tmp_path):
    usage = type(machine.shutil.disk_usage("/"))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage(0, 0, int(64e6)))
    assert machine.shared_memory(0, folder=tmp_path).state == "OK"
    assert machine.shared_memory(8, folder=tmp_path).state == "warning"


def test_disk_and_memory_that_do_not_suffice_are_told(monkeypatch, tmp_path):
    usage = type(machine.shutil.disk_usage("/"))
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage(0, 0, int(5e9)))
    assert machine.disk(tmp_path / "not" / "there").state == "OK"
    assert machine.disk(tmp_path, needed=4e9).state == "OK"
    assert machine.disk(tmp_path, needed=6e9).state == "error"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: usage(0, 0, int(1e9)))
    assert machine.disk(tmp_path).state == "warning"
    assert machine.disk(tmp_path, needed=1e6).state == "OK"
    assert machine.host_memory(1e9).state == "warning"
    assert machine.host_memory(16e9).state == "OK"
