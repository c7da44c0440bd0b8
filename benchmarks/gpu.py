"""Everything that a GPU must show, in one command on a bare machine: no hub, no data set, no disk
but a temporary folder; random weights at true size, drawn pictures and texts.

    python benchmarks/gpu.py [--minutes 8] [--json] [--only SECTION ...]
    python benchmarks/gpu.py --device cpu --tiny     every line of it, on any machine

A section is measured and told on its own: what fails in one, or what it needs and is not installed
(bitsandbytes for 4 bits, deepspeed for offload), loses no other. The time is shared by the sections
that are left. --json prints a line of JSON for each section as it is done, the table at the end
goes to stderr then. Steps are those of `harness train`, by its own engine: forward, backward,
clipping, optimizer; data are in memory. A T4's policy of precision (fp16) can be taken by any GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from grouped import unrolled
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)

from harness import base_lm
from harness.config.load import load
from harness.config.schema import Config, TrainConfig
from harness.data.collate import Collator
from harness.errors import reason_of
from harness.machine import devices
from harness.machine.determinism import set_workspace
from harness.machine.hardware import hardware
from harness.machine.launch_file import Launch, read_launch
from harness.machine.precision import Precision, choose
from harness.model import compiled
from harness.model.batch import Batch
from harness.model.pretrained import quiet_transformers
from harness.model.vlm import VisionLanguageModel
from harness.plan.facts import FOLDER as FACTS
from harness.plan.planner import CUDA_CONTEXT, Planner
from harness.plan.workload import Sizes, Workload
from harness.report.pictures import markdown_table
from harness.train.engines import make_engine
from harness.train.mfu import flops_of_an_image
from shards.read import Sample
from shards.record import Record, Text

FLICKR8K = 6000  # pictures of its training set
T4 = torch.device("cuda"), (7, 5)  # whose policy is asked for by its capability
MOST_STEPS = 20  # of one measurement
TINY_CLIP = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
    "image_size": 32,
}
TINY_T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
TINY = {
    "bridge": {"query_tokens": 4, "layers": 1, "width": 32, "heads": 4},
    "train": {"global_batch": 4, "micro_batch": 2},
}


class NeededError(Exception):
    """What a section needs and this machine lacks."""


def need(package: str) -> None:
    if find_spec(package) is None:
        raise NeededError(f"needs {package}, which is not installed")


@dataclass(frozen=True)
class Row:
    """One figure; `target`: what it is to reach on an H100 or H200."""

    what: str
    value: float | str
    unit: str = ""
    target: str = ""

    def cells(self) -> list[str]:
        shown = self.value if isinstance(self.value, str) else f"{self.value:,.4g}"
        return [self.what, shown, self.unit, self.target]


# ---- models and batches --------------------------------------------------------------------------


class Bench:
    """Models of the shipped configs with random weights, and batches for them, on one device."""

    def __init__(self, device: str, tiny: bool, folder: Path) -> None:
        self.device = torch.device(device)
        self.tiny = tiny
        self.folder = folder
        self.seconds = 1.0  # that a section may take
        self.captions = drawn_captions()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @cached_property
    def tuning(self) -> str:
        """4 bits where that can be."""
        return "qlora" if find_spec("bitsandbytes") else "lora"

    def config(self, name: str, **changes: Any) -> Config:
        """Returns the shipped config on models of ours; `changes`: of train and lm, by section."""
        document = load(name).model_dump(mode="json")
        model = document["model"]
        model["vision"]["id"] = str(self._encoder(model["vision"]["id"]))
        model["lm"] |= {"id": str(self._base(model["lm"]["id"])), "tuning": self.tuning}
        model["lm"] |= changes.get("lm", {})
        if self.tiny:
            model["vision"]["image_size"] = TINY_CLIP["image_size"]
            model["bridge"] |= TINY["bridge"]
            document["train"] |= TINY["train"]
        document["train"] |= changes.get("train", {})
        document["data"] |= {"folder": None, "train": [], "dev": [], "test": []}
        return Config(**document)

    def _encoder(self, name: str) -> Path:
        folder = self.folder / name
        if not folder.exists():
            facts = json.loads((FACTS / name / "config.json").read_text())["vision_config"]
            with torch.device(self.device), quiet_transformers():
                config = CLIPVisionConfig(**(TINY_CLIP if self.tiny else facts))
                CLIPVisionModel(config).save_pretrained(folder)
        return folder

    def _base(self, name: str) -> Path:
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir(parents=True)
            base_lm.train_tokenizer(self.captions, folder, 1000)
            facts = json.loads((FACTS / name / "config.json").read_text())
            if self.tiny:
                facts |= {**TINY_T5, "num_decoder_layers": TINY_T5["num_layers"]}
            with torch.device(self.device), quiet_transformers():
                T5ForConditionalGeneration(T5Config(**facts)).save_pretrained(folder)
        return folder

    def policy(self, precision: str) -> Precision:
        """Returns a policy of precision, a T4's fp16 on a CPU too."""
        if precision == "fp16" and not self.on_gpu:
            return replace(choose("auto", *T4), device_type="cpu")
        return choose(precision, self.device)  # type: ignore[arg-type]  # a name of one

    def batch(self, config: Config, model: VisionLanguageModel, images: int) -> Batch:
        """Returns drawn pictures: with five captions each, or with questions, as the config has."""
        generator = np.random.default_rng(0)
        side = config.model.vision.image_size
        asked = config.data.texts_per_image or 0
        samples = []
        for n in range(images):
            pixels_HW3 = generator.integers(0, 256, (side, side, 3), np.uint8)
            chosen = [self.captions[(5 * n + k) % len(self.captions)] for k in range(5)]
            texts = [Text(f"{n}", "caption", tuple(chosen))]
            if asked:
                texts = [Text(f"{n}-{k}", "vqa", ("two",) * 10, chosen[k]) for k in range(asked)]
            record = Record(f"{n}", "drawn", "train", f"{n}", tuple(texts))
            samples.append(Sample(record, pixels_HW3, "jpg", 0, n))
        batch = Collator.of(config, model.tokenizer, on_gpu=self.on_gpu)(samples)
        assert batch is not None  # there is something to learn
        return batch

    def training(self, config: Config, precision: str, micro_batches: int = 1) -> Training:
        gc.collect()  # what an earlier model has left in cycles
        if self.on_gpu:
            torch.cuda.empty_cache()
        return Training(self, config, self.policy(precision), micro_batches)


def drawn_captions() -> list[str]:
    """Returns captions as long as Flickr8k's."""
    generator = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "mo", "ne") for b in "dfgklmnprst"]
    lengths = generator.normal(11, 3.5, 400).clip(4, 30).astype(int)
    return [" ".join(generator.choice(words, length)) for length in lengths]


class Training:
    """A model with the engine of `harness train`, and a batch that it learns again and again."""

    def __init__(self, bench: Bench, config: Config, policy: Precision, micro_batches: int) -> None:
        self.bench = bench
        self.config = config
        self.policy = policy
        self.engine = make_engine(config.train.model_copy(update={"precision": "auto"}))
        self.engine.precision = policy
        self.engine.scaler = torch.amp.GradScaler(bench.device.type, enabled=policy.loss_scaler)
        self.model = VisionLanguageModel.build(config, precision=policy, device=bench.device)
        self.wrapped = self.engine.prepare(self.model)
        self.model.train()
        self.host_batch = bench.batch(config, self.model, config.train.micro_batch)
        self.micro_batches = micro_batches

    @cached_property
    def batch(self) -> Batch:
        """The batch on the device."""
        return self.host_batch.to(self.bench.device)

    def step(self, batch: Batch | None = None) -> float | None:
        """Takes one optimizer step; returns the gradient's norm, None for a skipped one."""
        batch = batch or self.batch
        weight = self.host_batch.weight.item() * self.micro_batches
        for index in range(self.micro_batches):
            with self.engine.micro_step(last=index == self.micro_batches - 1):
                self.engine.backward(self.wrapped(batch).sum / weight)
        self.engine.await_gradients()
        return self.engine.step(self.config.train.learning_rate)

    def featured(self) -> Batch:
        """Returns the batch with features in place of pictures."""
        features_IPD = self.model.patch_tokens(self.batch).half()
        return replace(self.batch, pixels_IHW3=None, features_IPD=features_IPD)

    def encoder_flops(self) -> float:
        """Returns the operations of the encoder's pass over the batch."""
        with FlopCounterMode(display=False) as counter:
            self.model.patch_tokens(self.batch)
        return counter.get_total_flops()

    def step_flops(self) -> float:
        """Returns the operations of a step over the batch, as the plan counts them."""
        parts = self.config, self.policy, self.model
        return self.host_batch.images * flops_of_an_image(*parts, [self.host_batch])

    def seconds(self, act: Callable[[], Any], share: float = 1.0) -> float:
        """Returns the median time of `act`, for at most this share of the section's time."""
        return timed(act, self.bench.device, share * self.bench.seconds)

    def mfu(self, flops: float, seconds: float) -> float | str:
        name = hardware() if self.bench.on_gpu else "a CPU"
        peak = devices.peak_teraflops(name, self.policy.name)
        return flops / seconds / peak / 1e12 if peak else f"the peak of {name} is not known"


def timed(act: Callable[[], Any], device: torch.device, limit: float) -> float:
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(2):
        act()
    wait()
    times = []
    ends = time.perf_counter() + limit
    while len(times) < MOST_STEPS and (time.perf_counter() < ends or len(times) < 2):
        began = time.perf_counter()
        act()
        wait()
        times.append(time.perf_counter() - began)
    return median(times)


# ---- sections: each yields its rows --------------------------------------------------------------


def memory(bench: Bench) -> Iterator[Row]:
    """Peak of CUDA's allocator in two steps of two micro-batches, beside the plan's."""
    cases = [("flickr8k_t4", None, ""), ("vqav2_t4", None, "")]
    cases += [("vqav2_t4", 2 if bench.tiny else 32, "6 GB at most"), ("scale", None, "")]
    for name, images, target in cases:
        config = bench.config(name)
        size = images or config.train.micro_batch
        train = {"micro_batch": size, "global_batch": 2 * size}
        config = bench.config(name, train=train)
        planned, measured, _ = peaks(bench, config, Launch())
        what = f"{name}, {config.model.lm.tuning}, {config.train.precision}, {size} images"
        yield Row(f"{what}: planned", planned / 1e9, "GB")
        if measured is None:
            yield Row(f"{what}: measured", "not measured on a GPU")
            continue
        yield Row(f"{what}: measured", measured / 1e9, "GB", target)
        yield Row(f"{what}: the plan is off by", 100 * (planned / measured - 1), "%")


def peaks(bench: Bench, config: Config, launch: Launch) -> tuple[int, int | None, float]:
    """Returns (planned, measured) bytes on the device, None without a GPU, and the seconds of the
    second step.
    """
    before = 0
    gc.collect()
    if bench.on_gpu:
        before = torch.cuda.memory_allocated()
    training = bench.training(config, config.train.precision, micro_batches=2)
    if bench.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        began = time.perf_counter()
        training.step(training.host_batch.to(bench.device))
    seconds = time.perf_counter() - began
    measured = torch.cuda.max_memory_allocated() - before if bench.on_gpu else None
    work = Workload(Sizes.of(training.host_batch), None, None, "the batch measured")
    device = devices.here() if bench.on_gpu else devices.device("a100-80")
    planner = Planner(config, device, launch, 1, work, None)
    return planner.bytes(config.train.micro_batch) - CUDA_CONTEXT, measured, seconds


def speed(bench: Bench) -> Iterator[Row]:
    """Steps of two configs in fp16 and bf16, the encoder alone beside them."""
    for name, precision in (("flickr8k_t4", "fp16"), ("flickr8k_t4", "bf16"), ("scale", "bf16")):
        training = bench.training(bench.config(name), precision)
        what = f"{name}, {training.config.model.lm.tuning}, {precision}"
        images = training.host_batch.images
        seconds = training.seconds(training.step, 0.25)
        yield Row(f"{what}: steps", 1 / seconds, "a second")
        yield Row(f"{what}: targets", len(training.host_batch.labels_TL) / seconds, "a second")
        yield Row(f"{what}: pictures", images / seconds, "a second")
        whole = training.step_flops()
        mfu = training.mfu(whole, seconds)
        yield Row(f"{what}: MFU of a step", mfu, "", "0.35")
        encoder = training.encoder_flops()
        alone = training.seconds(lambda t=training: t.model.patch_tokens(t.batch), 0.05)
        yield Row(f"{what}: MFU of the encoder alone", training.mfu(encoder, alone))
        rates = whole / seconds / (encoder / alone)
        yield Row(f"{what}: a step's FLOP/s against the encoder's own", rates, "", "0.6")


def four_bits(bench: Bench) -> Iterator[Row]:
    """NF4 with LoRA against a bf16 base with LoRA."""
    need("bitsandbytes")
    seconds = {}
    for tuning in ("qlora", "lora"):
        training = bench.training(bench.config("scale", lm={"tuning": tuning}), "bf16")
        seconds[tuning] = training.seconds(training.step, 0.3)
        del training
    ratio = seconds["lora"] / seconds["qlora"]
    yield Row("scale, bf16: steps of NF4 against LoRA on bf16", ratio, "", "0.8")


def grouping(bench: Bench) -> Iterator[Row]:
    """What is computed once: a picture for all its captions, its features for all epochs."""
    precision = "bf16" if bench.on_gpu else "fp32"
    training = bench.training(bench.config("flickr8k_t4"), precision)
    images = training.host_batch.images
    ways = {
        "unrolled": unrolled_on(training),
        "grouped": training.batch,
        "features": training.featured(),
    }
    seconds = {
        name: training.seconds(lambda b=batch: training.step(b), 0.2)
        for name, batch in ways.items()
    }
    for name, took in seconds.items():
        yield Row(f"flickr8k_t4, {precision}, {name}: pictures", images / took, "a second")
    yield Row("grouped against unrolled", seconds["unrolled"] / seconds["grouped"])
    yield Row("features against images", seconds["grouped"] / seconds["features"])
    rest = training.step_flops() - training.encoder_flops()
    yield Row("MFU of a step from features", training.mfu(rest, seconds["features"]))
    epoch = FLICKR8K / images * seconds["features"]
    yield Row("an epoch of Flickr8k from features", epoch, "s", "10 at most")


def unrolled_on(training: Training) -> Batch:
    return unrolled(replace(training.host_batch, groups=())).to(training.bench.device)


def compiling(bench: Bench) -> Iterator[Row]:
    """Encoder and bridge compiled, and as they are written."""
    if bench.tiny:
        compiled.BACKEND = "aot_eager"  # traced as by inductor; that takes a minute on a CPU
    seconds = {}
    for asked in (False, True):
        training = bench.training(bench.config("flickr8k_t4", train={"compile": asked}), "bf16")
        began = time.perf_counter()
        training.step()
        warm_up = time.perf_counter() - began
        seconds[asked] = training.seconds(training.step, 0.2)
    yield Row("flickr8k_t4, bf16: the first step with train.compile", warm_up, "s")
    yield Row("compiled steps against others", seconds[False] / seconds[True])


def profiled(bench: Bench) -> Iterator[Row]:
    """What the device does in three steps: kernels, copies, and gaps in which it waits."""
    training = bench.training(bench.config("flickr8k_t4"), "bf16")
    activities = [ProfilerActivity.CPU]
    if bench.on_gpu:
        activities.append(ProfilerActivity.CUDA)
    for _ in range(2):
        training.step()
    began = time.perf_counter()
    with profile(activities=activities) as seen:
        for _ in range(3):
            training.step(training.host_batch.to(bench.device))
        if bench.on_gpu:
            torch.cuda.synchronize()
    wall = 1e6 * (time.perf_counter() - began)
    kind = DeviceType.CUDA if bench.on_gpu else DeviceType.CPU
    events = [event for event in seen.events() or () if event.device_type == kind]
    if not events:
        raise NeededError("the profiler saw nothing of the device")
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    first = min(start for start, _ in spans)
    last = max(end for _, end in spans)
    busy = covered(spans)
    copies = covered(
        [
            span
            for event, span in zip(events, spans, strict=True)
            if event.name.lower().startswith(("memcpy", "memset", "aten::copy_"))
        ]
    )
    yield Row("of the time from the first kernel to the last: kernels", busy / (last - first))
    yield Row("copies among them", copies / (last - first))
    yield Row("gaps, in which the device waits for the host", 1 - busy / (last - first))
    yield Row("a step, the profiler's own time included", wall / 3e3, "ms")
    yield Row("kernels a step", len(events) / 3)
    longest: dict[str, float] = {}
    for event, (start, end) in zip(events, spans, strict=True):
        longest[event.name] = longest.get(event.name, 0.0) + end - start
    for name in sorted(longest, key=lambda name: -longest[name])[:5]:
        yield Row(f"most time: {name[:60]}", longest[name] / (last - first), "of the time")


def covered(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of time spans."""
    length = 0.0
    until = -float("inf")
    for start, end in sorted(spans):
        length += max(0.0, end - max(start, until))
        until = max(until, end)
    return length


def evaluation(bench: Bench) -> Iterator[Row]:
    """Answers and their losses; random weights rarely end a caption before its limit."""
    training = bench.training(bench.config("flickr8k_t4"), "bf16")
    training.model.eval()
    images = 2 if bench.tiny else training.config.evaluation.batch_images
    batch = bench.batch(training.config, training.model, images).to(bench.device)
    decoding = training.config.generate.caption
    if bench.tiny:
        decoding = decoding.model_copy(update={"max_new_tokens": 3})

    @torch.no_grad()
    def answer() -> None:
        training.model.generate(batch, decoding)
        training.model.loss(batch)

    seconds = timed(answer, bench.device, 0.5 * bench.seconds)
    what = f"flickr8k_t4, bf16, {decoding.beams} beams of {decoding.max_new_tokens} tokens"
    yield Row(f"{what}: pictures", images / seconds, "a second")


def resumed(bench: Bench) -> Iterator[Row]:
    """Four steps, and two with a resume and two more: the same bits, by train.deterministic."""
    same, steps = in_a_process(bench, _resumed)
    yield Row(f"{steps} steps, resumed after half of them", "same bits" if same else "OTHER BITS")


def _resumed(device: str, tiny: bool, folder: Path) -> tuple[bool, int]:
    train = {"deterministic": True}
    set_workspace(TrainConfig(**train))  # before anything is on the GPU
    bench = Bench(device, tiny, folder)
    config = bench.config("flickr8k_t4", train=train)
    steps = 4
    whole = bench.training(config, "fp16")
    for _ in range(steps // 2):
        whole.step()
    weights = {name: value.clone() for name, value in whole.engine.trained_state().items()}
    moments = {name: value.clone() for name, value in whole.engine.optimizer_state().items()}
    scaler = whole.engine.scaler_state()
    other = bench.training(config, "fp16")
    with torch.no_grad():
        for name, value in other.model.trained_state().items():
            value.copy_(weights[name])
    other.engine.load_optimizer_state(moments)
    other.engine.load_scaler_state(scaler)
    for each in (whole, other):
        for _ in range(steps - steps // 2):
            each.step()
    found = other.engine.trained_state()
    same = all(value.equal(found[name]) for name, value in whole.engine.trained_state().items())
    moved = any(not value.equal(weights[name]) for name, value in found.items())
    return same and moved, steps


def offload(bench: Bench) -> Iterator[Row]:
    """ZeRO-2 with its optimizer on the CPU, in one process: peak beside the plan's, and speed."""
    need("deepspeed")
    planned, measured, seconds = in_a_process(bench, _offload)
    yield Row("scale, zero2_offload: planned", planned / 1e9, "GB")
    shown = "not measured on a GPU" if measured is None else measured / 1e9
    yield Row("scale, zero2_offload: measured", shown, "" if measured is None else "GB")
    yield Row("scale, zero2_offload: a step", seconds, "s")


def _offload(device: str, tiny: bool, folder: Path) -> tuple[int, int | None, float]:
    launch = read_launch("zero2_offload")
    settings = folder / "zero2_offload.json"
    assert launch.deepspeed is not None  # its file has them
    settings.write_text(json.dumps({"zero_optimization": launch.deepspeed.zero}))
    os.environ |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29519",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(settings),
    }
    bench = Bench(device, tiny, folder)
    return peaks(bench, bench.config("scale"), launch)


def in_a_process(bench: Bench, act: Callable[[str, bool, Path], Any]) -> Any:
    """Returns what `act` gives in a process of its own: what it sets for torch stays there."""
    if bench.on_gpu:
        torch.cuda.empty_cache()
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(act, bench.device.type, bench.tiny, bench.folder).result()


SECTIONS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "memory": memory,
    "speed": speed,
    "four_bits": four_bits,
    "grouping": grouping,
    "compile": compiling,
    "profile": profiled,
    "evaluation": evaluation,
    "resume": resumed,
    "offload": offload,
}


# ---- all of them ---------------------------------------------------------------------------------


def measured(name: str, bench: Bench) -> dict[str, Any]:
    """Returns a section's rows, as far as it came, and what kept it from the others."""
    began = time.perf_counter()
    rows: list[Row] = []
    error = ""
    try:
        for row in SECTIONS[name](bench):
            rows.append(row)
            print(f"{name}: {' '.join(row.cells())}", file=sys.stderr, flush=True)
    except NeededError as lacking:
        error = str(lacking)
    except Exception as failure:  # of whatever kind: the other sections are still to come
        error = f"failed: {type(failure).__name__}: {reason_of(failure)}"
    if error:
        print(f"{name}: {error}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - began
    return {"section": name, "rows": list(map(asdict, rows)), "error": error, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    found = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=found)
    parser.add_argument("--tiny", action="store_true", help="models of a few weights")
    given = parser.parse_args()
    if given.device != found:
        parser.error(f"this process sees {found}: set CUDA_VISIBLE_DEVICES= to measure a CPU")
    # Cut prompts are no news here.
    logging.getLogger("harness.data.collate").setLevel(logging.ERROR)
    ends = time.perf_counter() + 60 * given.minutes
    about = f"{hardware()}, torch {torch.__version__}{', tiny models' * given.tiny}"
    print(about, file=sys.stderr)
    done = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.device, given.tiny, Path(folder))
        for index, name in enumerate(given.only):
            left = ends - time.perf_counter()
            bench.seconds = left / (len(given.only) - index)
            section = {"section": name, "rows": [], "error": "left out: no time was left"}
            if left > 0 or given.tiny:
                section = measured(name, bench)
            done.append(section)
            if given.json:
                print(json.dumps({"hardware": about, **section}), flush=True)
    table = [
        [section["section"], *Row(**row).cells()] for section in done for row in section["rows"]
    ]
    table += [[s["section"], s["error"], "", "", ""] for s in done if s["error"]]
    shown = markdown_table(table, ["section", "what", "value", "unit", "to reach"])
    print(f"\n{about}\n\n{shown}", file=sys.stderr if given.json else sys.stdout)


if __name__ == "__main__":
    main()
