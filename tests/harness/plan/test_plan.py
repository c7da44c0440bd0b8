"""A plan is right where it can be held against the real thing: bytes of weights and of saved
tensors, operations.
"""

import json
import re
from dataclasses import replace

import psutil
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.config.schema import Config
from harness.data import collate as batches
from harness.doctor import machine
from harness.errors import ConfigError
from harness.machine import devices, launcher
from harness.machine.devices import DEVICES
from harness.machine.launch_file import read_launch
from harness.machine.precision import choose
from harness.model.vlm import VisionLanguageModel
from harness.plan.plan import advised, check, plan
from harness.plan.planner import Planner
from harness.plan.skeleton import Skeleton, weights
from harness.plan.workload import Sizes, workload
from plan_cases import (
    GPU_CASES,
    changed,
    collated,
    drawn,
    measured_peak,
    measured_saved,
    middle_sized,
)
from tiny_models import tiny_clip
from toy_runs import make_config

CPU = torch.device("cpu")
KEYS = (
    "fits peak_bytes host_bytes parts step_flops seconds_per_epoch utilisation "
    "largest_micro_batch disk_bytes advice"
)


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_clip_folder, tiny_t5_folder) -> Config:
    return make_config(tmp_path_factory.mktemp("plan"), tiny_clip_folder, tiny_t5_folder)


def planner(config: Config, device=None, **launch) -> Planner:
    work = workload(config)
    return Planner(
        config,
        device or devices.cpu(),
        read_launch(launch.get("name")),
        launch.get("n", 1),
        work,
        None,
    )


def room(needed: int) -> int:
    """Memory of a device on which just so much fits."""
    return int((needed + 1000) / devices.FREE_SHARE)


def test_a_damaged_sample_is_left_out_of_the_texts_that_are_looked_at(
    tmp_path, tiny_clip_folder, tiny_t5_folder
):
    config = make_config(tmp_path, tiny_clip_folder, tiny_t5_folder)
    shard = sorted((tmp_path / "train").glob("*.tar"))[0]
    shard.write_bytes(shard.read_bytes().replace(b"IDAT", b"XXXX", 1))
    assert workload(config).source == "the texts of 13 images of the shards"


@pytest.mark.parametrize("tuning", ["qlora", "lora", "full", "frozen"])
def test_bytes_of_weights_are_those_of_the_loaded_model_part_by_part(config, tuning):
    config = changed(config, lm={"tuning": tuning})
    real = VisionLanguageModel.build(config, precision=choose("fp32", CPU))
    skeleton = Skeleton(config, choose("fp32", CPU))
    assert weights(skeleton.model) == weights(real)
    assert (
        ("LM 4-bit" in weights(real))
        == ("quantisation constants" in weights(real))
        == (tuning == "qlora")
    )
    assert skeleton.trained_bytes == sum(
        p.numel() * 4 for p in real.parameters() if p.requires_grad
    )
    assert skeleton.parameters["language model"] == sum(
        p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in real.lm.parameters()
    )


def test_a_plan_for_features_has_no_encoder(config):
    real = VisionLanguageModel.build(config, precision=choose("fp32", CPU))
    skeleton = Skeleton(config, choose("fp32", CPU), real.config.encoder)
    expected = weights(real)
    assert expected.pop("encoder") > 0
    assert weights(skeleton.model) == expected


@pytest.mark.parametrize("seed", range(10))
def test_bytes_of_saved_tensors_are_within_a_tenth_of_a_real_pass(
    config, monkeypatch, tmp_path, seed
):
    monkeypatch.setattr(
        batches, "MIN_PADDING_SAVED", 8 if seed % 2 else 10**6
    )  # targets in groups of like length, or not
    config, images = drawn(config, seed, tmp_path / "t5")
    model = VisionLanguageModel.build(config, precision=choose("fp32", CPU)).train()
    batch = collated(config, model, images)
    skeleton = Skeleton(config, choose("fp32", CPU))
    checkpointing = config.train.activation_checkpointing
    planned = skeleton.run(
        Sizes.of(batch), batch.images, checkpointing=checkpointing, gradients_held=False
    )
    assert planned.saved == pytest.approx(measured_saved(model, batch), rel=0.1)
    assert planned.bytes >= planned.saved
    for other in (not checkpointing, checkpointing):  # one pass leaves nothing behind for the next
        again = skeleton.run(
            Sizes.of(batch), batch.images, checkpointing=other, gradients_held=False
        )
    assert again == planned


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="CUDA's allocator is asked: there is no GPU here"
)
@pytest.mark.parametrize(("images", "checkpointing"), GPU_CASES)
def test_the_peak_on_a_gpu_is_within_a_tenth_of_what_its_allocator_saw(
    config, tmp_path, images, checkpointing
):
    planned, measured = measured_peak(middle_sized(config, tmp_path), images, checkpointing)
    assert planned == pytest.approx(measured, rel=0.1)


def test_operations_are_those_that_torchs_own_counter_finds_in_a_real_step(config):
    config = changed(config, lm={"tuning": "lora"})  # of 4-bit products the counter knows nothing
    model = VisionLanguageModel.build(config, precision=choose("fp32", CPU)).train()
    model.lm.t5.set_attn_implementation("eager")  # nor of the CPU's attention
    batch = collated(config, model, 4)
    with FlopCounterMode(display=False) as counter:
        model(batch).sum.backward()
    skeleton = Skeleton(config, choose("fp32", CPU))
    planned = skeleton.run(Sizes.of(batch), 4, checkpointing=False, gradients_held=False)
    assert set(planned.flops) == {"float32"}
    assert planned.flops["float32"] == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_the_dtype_of_each_operation_is_the_policys(config):
    skeleton = Skeleton(config, choose("fp16", torch.device("cuda"), (7, 5)))
    planned = skeleton.run(Sizes(1, 1, 8, 4, 1.0), 2, checkpointing=False, gradients_held=False)
    assert set(planned.flops) == {"float16", "float32"}  # wo, LoRA and lm_head stay in fp32 on a T4


def test_the_json_has_the_keys_that_scripts_read_and_its_parts_add_up(config, harness, tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(config.model_dump(mode="json")))
    code, out, _ = harness("plan", file, "--device", "t4", "--json")
    said = json.loads(out)
    assert code == 0
    assert said["fits"] is True
    assert not set(KEYS.split()) - said.keys()
    assert sum(said["parts"].values()) == said["peak_bytes"]
    assert said["status"] == "modelled"
    assert "fp16" in said["precision"]
    assert said["steps"] == 2 * 4  # 14 images in global batches of 4, two epochs
    assert any("14 images of the shards" in note for note in said["notes"])


def test_without_shards_the_plan_says_what_it_assumes_and_names_no_hours(config, tmp_path):
    made = plan(
        changed(config, data={"train": [{"path": str(tmp_path / "gone")}]}), "cpu", brief=True
    )
    assert made.hours is None
    assert made.seconds_per_epoch is None
    assert any("as long as the config's limits" in note for note in made.notes)
    assert "the shards are not there" in made.table()


def test_the_largest_micro_batch_fits_and_the_next_does_not(config):
    config = changed(config, train={"global_batch": 4096, "micro_batch": 2})
    wanted = planner(config, DEVICES["t4"])
    found = planner(config, replace(DEVICES["t4"], memory=room(wanted.bytes(37))))
    assert found.largest() == 37
    assert found.fits(37)
    assert not found.fits(38)


def test_a_smaller_micro_batch_is_advised_first(config):
    config = changed(config, train={"global_batch": 64, "micro_batch": 64})
    small = replace(
        DEVICES["a10"], name="small", memory=room(planner(config, DEVICES["a10"]).bytes(20))
    )
    made = advised(planner(config, small), brief=False)
    assert not made.fits
    assert made.largest_micro_batch == 20
    (advice,) = made.advice
    assert advice.startswith("train.micro_batch=20")


def test_where_no_micro_batch_fits_the_next_cheapest_change_is_found(config):
    document = {
        "train": [{"path": "gone"}],
        "texts_per_image": 64,
    }  # activations are the most by far
    config = changed(config, lm={"tuning": "full"}, train={"micro_batch": 1}, data=document)
    whole = planner(config, DEVICES["a10"])
    for change, name in (
        (changed(config, train={"activation_checkpointing": True}), "activation_checkpointing"),
        (
            changed(config, lm={"tuning": "qlora"}, train={"activation_checkpointing": True}),
            "qlora",
        ),
    ):
        needed = planner(change, DEVICES["a10"]).bytes(1)
        assert needed < whole.bytes(1)
        small = replace(DEVICES["a10"], memory=room(needed))
        (advice,) = advised(planner(config, small), brief=False).advice
        assert name in advice
        assert "fits" in advice
    tiny = replace(DEVICES["a10"], name="tiny", memory=1000)
    (advice,) = advised(planner(config, tiny), brief=False).advice
    assert "zero3_offload does not fit tiny; t4 does" in advice


def test_zero_divides_by_processes_and_offload_moves_to_main_memory(config):
    config = changed(config, lm={"tuning": "full"})
    a10 = DEVICES["a10"]
    alone, plain = planner(config, a10), planner(config, a10, n=4)
    two, offloaded = (
        planner(config, a10, name="zero2", n=4),
        planner(config, a10, name="zero2_offload", n=4),
    )
    three = planner(config, a10, name="zero3_offload", n=4)
    trained = alone.skeleton.trained_bytes
    states = {
        p.launch.name or str(p.processes): p.peak(1)[0]["optimizer states"]
        for p in (alone, plain, two)
    }
    assert states == {"1": 2 * trained, "4": 2 * trained, "zero2": 3 * -(-trained // 4)}
    assert two.peak(1)[0]["gradients"] == -(-trained // 4)
    assert plain.peak(1)[0]["gradients"] >= trained
    for moved in (offloaded, three):
        assert moved.peak(1)[0]["optimizer states"] == moved.peak(1)[0]["gradients"] == 0
        assert moved.host(1, 0) >= two.host(1, 0) + 4 * trained
    assert three.peak(1)[0]["encoder"] == 0 < two.peak(1)[0]["encoder"]


@pytest.mark.parametrize("processes", [1, 8])
def test_epochs_add_up_to_the_hours_evaluations_included(config, processes):
    config = changed(
        config, train={"evaluate_every": 1, "epochs": 3}, evaluation={"dev_images": 5000}
    )
    made = advised(planner(config, DEVICES["a100-40"], n=processes), brief=True)
    assert made.steps == 3 * 4
    assert made.evaluations == 3 + made.steps
    assert made.seconds_per_epoch * 3 == pytest.approx(made.hours * 3600)
    assert made.hours * 3600 > 2 * made.steps * made.seconds_per_step


def test_main_memory_decides_on_a_cpu_and_fewer_processes_are_advised_first(config):
    config = changed(config, data={"workers": 0})
    two = planner(config, n=2)
    short = planner(
        config,
        replace(devices.cpu(), memory=room(two.host(two.images, two.without_gradients))),
        n=4,
    )
    made = advised(short, brief=False)
    assert not made.fits
    assert made.peak_bytes < made.usable_bytes < made.host_bytes
    assert made.tightest == ("main memory", made.host_bytes, made.usable_bytes)
    assert (
        f"{made.host_bytes / 1e9:.2f} GB of {made.usable_bytes / 1e9:.2f} GB of main memory"
        in made.summary()[0]
    )
    (advice,) = made.advice
    assert advice.startswith("--processes 2 fits")


def test_main_memory_of_the_machine_counts_for_the_gpu_that_is_here(config):
    by_name = planner(config, DEVICES["a10"], n=2)
    images = by_name.images
    needed = by_name.host(images, by_name.bytes(images))
    assert advised(by_name, brief=True).fits
    here = replace(DEVICES["a10"], main_memory=room(needed))
    assert planner(config, here, n=2).fits(images)
    made = planner(config, replace(here, main_memory=room(needed // 2)), n=2).plan(brief=True)
    assert not made.fits
    assert made.tightest[0] == "main memory"
    assert any("main memory" in line and "does not fit" in line for line in made.summary())
    tiny = advised(planner(config, replace(here, main_memory=1000)), brief=True)
    assert "a larger machine" in tiny.advice[0]


def test_offload_says_what_main_memory_it_takes(config):
    said = "\n".join(
        advised(planner(config, DEVICES["a10"], name="zero2_offload", n=2), brief=True).summary()
    )
    assert re.search(r"needs \d+\.\d\d GB of main memory", said)


@pytest.mark.parametrize("precision", ["auto", "fp16"])
def test_deepspeed_and_fp16_are_refused_in_the_plan(config, monkeypatch, precision):
    made = advised(
        planner(changed(config, train={"precision": precision}), DEVICES["t4"], name="zero2"),
        brief=True,
    )
    assert not made.fits
    assert "refused: DeepSpeed and fp16" in made.summary()[0]
    assert "refused: DeepSpeed and fp16" in made.table()
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", lambda *_, **__: _Done(made))
    with pytest.raises(ConfigError, match="refused: DeepSpeed and fp16"):
        check(config, None, 1, [].append, force=True)
    assert advised(planner(config, DEVICES["t4"], name="multi_gpu"), brief=True).fits


def test_the_number_of_processes_is_the_launchers_and_said_where_it_is_not_known(
    config, nvidia_smi
):
    nvidia_smi("NVIDIA A10, 23028, 8.6", "NVIDIA A10, 23028, 8.6")
    assert plan(config, "here", brief=True).processes == 2
    assert plan(config, "here", read_launch("t4"), brief=True).processes == 1
    assert plan(config, "here", read_launch("cpu"), brief=True).device == "cpu"
    made = plan(config, "a10", read_launch("zero2"), brief=True)
    assert made.processes == 1
    assert "1 process: give --processes N" in made.table()
    assert "1 process: give --processes N" in "\n".join(made.summary())
    assert plan(config, "a10", read_launch("zero2"), 2, brief=True).warnings == []


def test_a_run_that_cannot_fit_is_refused_before_the_launch_unless_forced(config):
    said = []
    huge = changed(config, train={"global_batch": 10**6, "micro_batch": 10**6})
    with pytest.raises(
        ConfigError, match=r"the run needs .* that cpu has: train.micro_batch=\d+.*--force"
    ):
        check(huge, None, 1, said.append)
    assert any("does not fit" in line for line in said)
    assert len(said) <= 6


def test_a_forced_run_goes_on(config, monkeypatch):
    made = replace(plan(config, "cpu", brief=True), fits=False)
    monkeypatch.setattr("concurrent.futures.ProcessPoolExecutor", lambda *_, **__: _Done(made))
    check(config, None, 1, [].append, force=True)
    with pytest.raises(ConfigError):
        check(config, None, 1, [].append)


class _Done:
    """An executor whose result is there."""

    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def submit(self, *_):
        return self

    def result(self):
        return self.value


@pytest.mark.parametrize(
    ("sections", "device", "sentence"),
    [
        ({"lm": {"id": "google/flan-t5-gone"}}, "t4", "its config.json is all that is needed"),
        ({}, "t44", "did you mean t4?"),
        ({"train": {"precision": "bf16"}}, "t4", "has no native bf16"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(config, sections, device, sentence):
    with pytest.raises(ConfigError, match=sentence.replace("?", r"\?")):
        plan(changed(config, **sections), device)


@pytest.fixture
def nvidia_smi(monkeypatch, tmp_path):
    """Makes one that lists the GPUs it is given as "name, MiB, compute capability"."""

    def fake(*gpus: str) -> None:
        file = tmp_path / "nvidia-smi"
        lines = [f"echo '{index}, GPU-{index}f00, {gpu}, 550.54'" for index, gpu in enumerate(gpus)]
        file.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    return fake


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        (None, "01"),
        ("1", "1"),
        ("1,0", "10"),
        ("GPU-1", "1"),
        ("", ""),
        ("-1,-1", ""),
        ("0,-1,1", "0"),
        ("7", ""),
    ],
)
def test_the_gpus_that_are_visible_are_the_same_to_plan_launcher_and_doctor(
    nvidia_smi, monkeypatch, visible, indices
):
    nvidia_smi("Tesla T4, 15360, 7.5", "NVIDIA A10, 23028, 8.6")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert "".join(card.index for card in devices.cards()) == indices
    assert launcher.gpus() == len(indices)
    assert devices.here().name == {"0": "Tesla T4", "1": "NVIDIA A10"}.get(indices[:1], "cpu")
    assert machine.driver() == "550.54"


def test_a_containers_limit_is_the_main_memory_for_plan_and_doctor(monkeypatch, tmp_path):
    monkeypatch.setattr(devices, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert devices.cpu().memory == psutil.virtual_memory().total
    (tmp_path / "memory.max").write_text("2000000000\n")
    assert devices.cpu().memory == 2_000_000_000
    assert "2.0 GB" in machine.host_memory().found


def test_a_gpu_that_is_here_is_known_by_its_name_and_keeps_its_own_memory(monkeypatch, nvidia_smi):
    nvidia_smi("NVIDIA A100-SXM4-80GB, 81920, 8.0")
    found = devices.here()
    assert (found.name, found.capability, found.float16) == ("NVIDIA A100-SXM4-80GB", (8, 0), 312)
    assert found.memory == pytest.approx(DEVICES["a100-80"].memory, rel=0.03)
    assert found.main_memory == devices.main_memory()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert devices.here().name == "cpu"


def test_the_skeleton_of_a_clip_in_the_hubs_form_is_its_vision_tower_up_to_the_layer_used(
    config, tmp_path
):
    folder = tiny_clip(tmp_path / "clip", layers=3)
    for weight in folder.glob("*.safetensors"):
        weight.unlink()  # config.json is all that is needed
    document = config.model_dump(mode="json")
    document["model"]["vision"] |= {"id": str(folder), "layer": -2}
    three = weights(Skeleton(Config(**document), choose("fp32", CPU)).model)["encoder"]
    document["model"]["vision"] |= {"layer": -3}
    two = weights(Skeleton(Config(**document), choose("fp32", CPU)).model)["encoder"]
    assert two < three
