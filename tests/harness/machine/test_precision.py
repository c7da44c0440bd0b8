"""Each device gets the policy that trains on it, and a request that it cannot do is refused."""

from dataclasses import replace

import pytest
import torch

from harness.errors import ConfigError
from harness.machine import hardware
from harness.machine.precision import choose, choose_or_fall_back

CPU, GPU = torch.device("cpu"), torch.device("cuda")
T4, A100, H100 = (7, 5), (8, 0), (9, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_a_t4_keeps_the_language_model_out_of_fp16_autocast():
    precision = choose("auto", GPU, T4)
    assert (precision.vision, precision.bridge, precision.lm) == (FP16, FP16, None)
    assert (precision.compute_dtype, precision.lm_dtype, precision.loss_scaler) == (
        FP16,
        FP32,
        True,
    )
    assert "7.5 has no native bf16" in precision.reason


@pytest.mark.parametrize("capability", [A100, H100])
def test_a_gpu_with_bf16_uses_it_for_all_parts_without_a_scaler(capability):
    precision = choose("auto", GPU, capability)
    assert {precision.vision, precision.bridge, precision.lm, precision.compute_dtype} == {BF16}
    assert (precision.name, precision.loss_scaler) == ("bf16", False)


def test_the_cpu_computes_in_fp32():
    precision = choose("auto", CPU)
    assert (precision.vision, precision.bridge, precision.lm, precision.compute_dtype) == (
        None,
        None,
        None,
        FP32,
    )
    assert not precision.loss_scaler


def test_fp16_on_a_gpu_with_bf16_is_the_policy_of_a_t4():
    asked, t4 = choose("fp16", GPU, A100), choose("auto", GPU, T4)
    assert (asked.lm, asked.compute_dtype, asked.loss_scaler) == (
        t4.lm,
        t4.compute_dtype,
        t4.loss_scaler,
    )


@pytest.mark.parametrize(
    ("requested", "device", "capability", "words"),
    [
        (
            "bf16",
            GPU,
            T4,
            "is bf16, but a GPU of compute capability 7.5 has no native bf16: use "
            "train.precision=auto, fp16 or fp32",
        ),
        (
            "fp16",
            CPU,
            None,
            "is fp16, but the device 'cpu' does not train in fp16: use train.precision=auto or "
            "fp32",
        ),
        ("fp16", torch.device("mps"), None, "the device 'mps' does not train in fp16"),
    ],
)
def test_what_the_device_cannot_do_is_refused_and_its_advice_can_be_followed(
    requested, device, capability, words
):
    with pytest.raises(ConfigError, match=words) as refused:
        choose(requested, device, capability)
    _, advice = str(refused.value).split("use train.precision=")
    for other in advice.replace(" or ", ", ").split(", "):
        assert not choose(other, device, capability).fell_back


@pytest.mark.parametrize(
    ("requested", "device", "capability", "name", "reason"),
    [
        ("fp16", CPU, None, "fp32", "fp32 in place of fp16, in which this device does not compute"),
        ("bf16", GPU, T4, "fp16", "fp16 in place of bf16, in which this device does not compute"),
        ("bf16", torch.device("mps"), None, "fp32", "fp32 in place of bf16"),
    ],
)
def test_a_model_that_only_answers_falls_back_to_what_the_device_can_do_and_says_so(
    requested, device, capability, name, reason
):
    found = choose_or_fall_back(requested, device, capability)
    assert (found.name, found.fell_back) == (name, True)
    assert found.reason.startswith(reason)
    own = choose("auto", device, capability)
    assert own.reason in found.reason
    assert replace(found, reason=own.reason, fell_back=False) == own


@pytest.mark.parametrize(
    ("requested", "device", "capability"),
    [("bf16", CPU, None), ("fp16", GPU, A100), ("bf16", GPU, H100), ("auto", GPU, T4)],
)
def test_what_the_device_can_do_is_done_as_asked_whoever_asks(requested, device, capability):
    found = choose_or_fall_back(requested, device, capability)
    assert found == choose(requested, device, capability)
    assert not found.fell_back


def test_a_cpu_without_bf16_says_what_it_costs(monkeypatch, tmp_path):
    facts = tmp_path / "cpuinfo"
    monkeypatch.setattr(hardware, "CPUINFO", facts)
    for flags, has_it in (
        ("flags\t\t: fma avx2", False),
        ("flags\t\t: avx512_bf16", True),
        ("Features\t: asimd bf16", True),
    ):
        facts.write_text(f"model name\t: X\n{flags}\n")
        hardware.multiplies_bf16.cache_clear()
        assert hardware.multiplies_bf16() == has_it
        assert ("emulates" in choose("bf16", CPU).reason) != has_it
    hardware.multiplies_bf16.cache_clear()


def test_emulated_bf16_does_not_count():
    assert choose("auto", GPU, A100, bf16_supported=False).name == "fp16"


@pytest.mark.parametrize(("device", "capability"), [(CPU, None), (GPU, T4), (GPU, A100)])
def test_fp32_can_be_asked_for_everywhere(device, capability):
    precision = choose("fp32", device, capability)
    assert (precision.lm, precision.compute_dtype, precision.loss_scaler) == (None, FP32, False)


def test_no_autocast_means_that_an_outer_one_is_switched_off():
    precision = choose("fp32", CPU)
    one = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=BF16):
        assert (one @ one).dtype == BF16
        with precision.autocast("lm"):
            assert (one @ one).dtype == FP32
    with choose("bf16", CPU).autocast("lm"):
        assert (one @ one).dtype == BF16


def test_the_facts_for_the_tracker_are_words():
    facts = choose("auto", GPU, T4).facts()
    assert facts["precision.lm"] == "float32"
    assert facts["precision.lm_4bit_compute"] == "float16"
    assert facts["precision.loss_scaler"] == "true"
