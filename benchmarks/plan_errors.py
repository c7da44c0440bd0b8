"""How far `harness plan` is off, where it can be held against the real thing on this machine.

    python benchmarks/plan_errors.py

Weights part by part; tensors saved for the backward pass, over ten random tiny models; on the CPU
the growth of the process' memory in a training step; on a GPU, where there is one, the peak that
CUDA's allocator saw.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import psutil
import torch
from transformers.utils import logging as transformers_logging

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))

from harness.config.schema import Config
from harness.machine import devices
from harness.machine.precision import choose
from harness.model.vlm import VisionLanguageModel
from harness.plan.skeleton import Skeleton, weights
from harness.plan.workload import Sizes
from harness.report.pictures import markdown_table
from plan_cases import (
    GPU_CASES,
    changed,
    collated,
    drawn,
    measured_peak,
    measured_saved,
    middle_sized,
)
from tiny_models import tiny_clip, tiny_t5
from toy_runs import make_config

CPU = torch.device("cpu")
TUNINGS = ("qlora", "lora", "full", "frozen")


def off(planned: float, measured: float) -> str:
    return f"{planned / measured - 1:+.1%}"


def weight_rows(config: Config) -> list[list[str]]:
    rows = []
    for tuning in TUNINGS:
        one = changed(config, lm={"tuning": tuning})
        planned = sum(weights(Skeleton(one, choose("fp32", CPU)).model).values())
        real = sum(weights(VisionLanguageModel.build(one, precision=choose("fp32", CPU))).values())
        rows.append([tuning, f"{planned:,}", f"{real:,}", off(planned, real)])
    return rows


def saved_rows(config: Config, root: Path) -> list[list[str]]:
    rows = []
    for seed in range(10):
        one, images = drawn(config, seed, root / f"t5-{seed}")
        model = VisionLanguageModel.build(one, precision=choose("fp32", CPU)).train()
        batch = collated(one, model, images)
        kept = one.train.activation_checkpointing
        skeleton = Skeleton(one, choose("fp32", CPU))
        planned = skeleton.run(
            Sizes.of(batch), images, checkpointing=kept, gradients_held=False
        ).saved
        real = measured_saved(model, batch)
        bridge = one.model.bridge
        what = f"{one.model.lm.tuning}, {bridge.kind} of {bridge.query_tokens}, {images} images"
        rows.append(
            [what + ", checkpointed" * kept, f"{planned:,}", f"{real:,}", off(planned, real)]
        )
    return rows


def step_growth(config: Config, images: int) -> tuple[int, int]:
    """(planned, measured) bytes that a micro-batch adds to the memory of a process that has nothing
    else to do.
    """
    torch.set_num_threads(1)
    model = VisionLanguageModel.build(config, precision=choose("fp32", CPU)).train()
    batch = collated(config, model, images)
    model(collated(config, model, 1)).sum.backward()  # what torch sets up once, and the gradients
    before = psutil.Process().memory_info().rss
    loss = model(batch).sum
    grown = psutil.Process().memory_info().rss - before
    loss.backward()
    planned = Skeleton(config, choose("fp32", CPU)).run(
        Sizes.of(batch), images, checkpointing=False, gradients_held=True, backward=False
    )
    return planned.saved, grown


def growth_rows(config: Config) -> list[list[str]]:
    rows = []
    for name, threshold in (
        ("malloc gives large blocks back (MALLOC_MMAP_THRESHOLD_=65536)", "65536"),
        ("as it is", None),
    ):
        os.environ.pop("MALLOC_MMAP_THRESHOLD_", None)
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": threshold} if threshold else {}
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            planned, grown = pool.submit(step_growth, config, 32).result()
        rows.append([name, f"{planned:,}", f"{grown:,}", off(planned, grown)])
    return rows


def gpu_rows(config: Config) -> list[list[str]]:
    """Peak of `torch.cuda.max_memory_allocated` in two steps of two micro-batches."""
    measured = ((case, *measured_peak(config, *case)) for case in GPU_CASES)
    return [
        [
            f"{devices.here().name}, {images} images" + ", checkpointed" * kept,
            f"{planned:,}",
            f"{real:,}",
            off(planned, real),
        ]
        for (images, kept), planned, real in measured
    ]


def main() -> None:
    transformers_logging.disable_progress_bar()
    logging.getLogger("harness.data.collate").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = make_config(root, tiny_clip(root / "clip"), tiny_t5(root / "t5"))
        columns = ["", "planned", "real", "off"]
        print("Bytes of weights, of tiny models:\n")
        print(markdown_table(weight_rows(config), columns))
        print("\nBytes saved for the backward pass, of ten random tiny models:\n")
        print(markdown_table(saved_rows(config, root), columns))
        middle = middle_sized(config, root)
        print(
            "\nResident memory that a forward pass adds, T5 of width 512 with 6 + 6 layers, 32 "
            "images, on the CPU:\n"
        )
        print(markdown_table(growth_rows(middle), columns))
        if torch.cuda.is_available():
            print(
                "\nPeak of CUDA's allocator in training steps of that model, the context not "
                "counted:\n"
            )
            print(markdown_table(gpu_rows(middle), columns))
        else:
            print(
                "\nPeak on a GPU: not measured on a GPU, this machine has none. All figures of "
                "the plan are modelled."
            )


if __name__ == "__main__":
    main()
