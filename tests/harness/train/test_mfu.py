"""What a training's time goes into: operations of a step, a GPU's peak, shares, the verdict."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from harness.look.history import History
from harness.machine.devices import DEVICES, peak_teraflops
from harness.machine.precision import choose
from harness.model.vlm import VisionLanguageModel
from harness.report.speed import Shares
from harness.train import mfu, step
from harness.train import run as train
from harness.train.clock import Clock
from plan_cases import changed, collated
from toy_batch import pixel_batch
from toy_runs import make_config

FP32 = choose("fp32", torch.device("cpu"))


@pytest.fixture
def config(tmp_path, tiny_clip_folder, tiny_t5_folder):
    return make_config(tmp_path, tiny_clip_folder, tiny_t5_folder)


@pytest.mark.slow
def test_the_operations_of_an_image_are_those_of_a_real_step(config):
    config = changed(config, lm={"tuning": "lora"})
    model = VisionLanguageModel.build(config, precision=FP32).train()
    batches = [collated(config, model, images) for images in (3, 2)]
    # torch's table lacks the CPU's own attention kernels
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for batch in batches:
            model(batch).sum.backward()
    real = counter.get_total_flops() / 5
    found = mfu.flops_of_an_image(config, FP32, model, batches)
    assert found == pytest.approx(real, rel=0.03)
    with FlopCounterMode(display=False) as counter:
        model.patch_tokens(batches[0])
    encoder = counter.get_total_flops() / 3
    assert encoder < 0.5 * found
    with_frozen = mfu.flops_of_an_image(
        changed(config, lm={"tuning": "frozen"}), FP32, model, batches
    )
    assert with_frozen < found, "weights that are not trained have no gradient to compute"
    again = changed(config, train={"activation_checkpointing": True})
    assert mfu.flops_of_an_image(again, FP32, model, batches) == pytest.approx(found, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Tesla T4", "t4"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
        ("a CPU", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_kind_and_an_unknown_one_has_none(name, kind):
    expected = kind and DEVICES[kind]
    assert peak_teraflops(name, "bf16") == (expected and expected.float16)
    assert peak_teraflops(name, "fp32") == (expected and expected.float32)


def run_on(config, model, device, world_size=1):
    engine = SimpleNamespace(
        device=torch.device(device), precision=FP32, world_size=world_size, is_main=True
    )
    return SimpleNamespace(config=config, engine=engine, model=model)


def test_the_utilisation_is_of_all_gpus_and_an_unknown_one_is_told(config, monkeypatch):
    model = VisionLanguageModel.build(config, precision=FP32)
    batch = pixel_batch(model)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    used = mfu.Utilisation(run_on(config, model, "cuda", world_size=2))
    assert used.of(100.0) is None
    used.count([batch])
    each = mfu.flops_of_an_image(config, FP32, model, [batch])
    assert used.of(100.0) == pytest.approx(100 * each / (2 * 8.1e12))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA X1")
    unknown = mfu.Utilisation(run_on(config, model, "cuda"))
    unknown.count([batch])
    assert unknown.of(100.0) is None
    assert unknown.unknown == "no MFU: the peak of NVIDIA X1 is not known"


def test_a_first_step_of_texts_alone_is_not_what_an_image_takes(config, monkeypatch):
    model = VisionLanguageModel.build(config, precision=FP32)
    batch = pixel_batch(model)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    used = mfu.Utilisation(run_on(config, model, "cuda"))
    texts = replace(batch, pixels_IHW3=None, image_of_C=torch.full_like(batch.image_of_C, -1))
    used.count([texts])
    assert (used.of(1.0), used.unknown) == (None, "")
    used.count([batch])
    assert used.of(1.0) == mfu.flops_of_an_image(config, FP32, model, [batch]) / 8.1e12


def test_the_longest_waiting_of_any_rank_counts(config, monkeypatch):
    waited = {0: 1.0, 1: 40.0}
    monkeypatch.setattr(step, "gathered", lambda value, engine: [value, waited[1]])
    said = []
    told = []
    run = run_on(config, None, "cpu", world_size=2)
    run.clock = SimpleNamespace(
        spent={"data": waited[0], "step": 99.0, "evaluation": 0.0}, images_per_second=1.0
    )
    run.terminal = SimpleNamespace(say=said.append)
    run.track = lambda prefix, figures: told.append(figures)
    run.tracker = SimpleNamespace(tags=told.append)
    step.StepLog(run).tell_speed()
    assert said[0].startswith("data-bound: 60% of the time in steps, 40% waiting for data")
    assert told[0]["share_waiting"] == 0.4
    assert told[1] == {"speed": "data-bound"}


def test_what_cannot_be_counted_ends_no_run(config, monkeypatch):
    model = VisionLanguageModel.build(config, precision=FP32)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    gone = changed(config, lm={"id": "nowhere"})
    used = mfu.Utilisation(run_on(gone, model, "cuda"))
    used.count([pixel_batch(model)])
    assert used.of(1.0) is None
    assert "could not be counted" in used.unknown


@pytest.mark.parametrize(
    ("seconds", "bound"),
    [
        ((1, 99, 10), "compute-bound"),
        ((30, 70, 10), "data-bound"),
        ((1, 9, 11), "evaluation-bound"),
    ],
)
def test_the_verdict_is_of_measured_waits(monkeypatch, seconds, bound):
    now = [0.0]
    monkeypatch.setattr("harness.train.clock.time.perf_counter", lambda: now[0])
    clock = Clock()
    assert Shares.of(clock.spent) is None
    waiting, computing, evaluating = seconds
    for _ in range(2):
        for phase, took in (("data", waiting), ("step", computing), ("saving", 1000)):
            clock.enter(phase)
            now[0] += took
        clock.count(images=4, targets=8)
        clock.reset()
        with clock.during("evaluation"):
            now[0] += evaluating
    shares = Shares.of(clock.spent)
    assert list(shares.figures().values()) == pytest.approx([s / sum(seconds) for s in seconds])
    assert shares.bound == bound
    assert shares.lines()[0].startswith(f"{bound}: ")
    assert clock.images_per_second == pytest.approx(4 / (waiting + computing))


def test_a_run_tells_what_limits_its_speed_in_its_log_and_on_its_page(config, capfd):
    train.run(changed(config, train={"epochs": 1, "evaluate_every": None}))
    said = capfd.readouterr().err
    assert "-bound: " in said
    assert "no MFU: the peak of a CPU is not known" in said
    history = History(config.out_dir)
    shares = [history.series[f"train/{name}"][-1][1] for name in Shares.__dataclass_fields__]
    assert sum(shares) == pytest.approx(1)
    assert min(shares) > 0
    facts = dict(history.facts())
    assert facts["what limits the speed"] == "; ".join(Shares(*shares).lines())
    page = (config.out_dir / "report.html").read_text()
    assert facts["what limits the speed"] in page
