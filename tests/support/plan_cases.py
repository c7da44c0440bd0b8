"""Random tiny models and what a real pass through them holds, for the plan's tests and
benchmarks/plan_errors.py.
"""

import gc
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from harness.config.schema import Config, DecodingConfig
from harness.data.collate import Collator
from harness.machine import devices
from harness.machine.launch_file import Launch
from harness.machine.precision import choose
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from harness.plan.planner import CUDA_CONTEXT, Planner
from harness.plan.skeleton import _Meter, tensors_of
from harness.plan.workload import Sizes, Workload
from harness.train.engine import parameter_groups
from shards.read import Sample
from shards.record import Record
from tiny_models import tiny_t5
from toy_runs import texts

GPU_CASES = (
    (8, False),
    (32, False),
    (32, True),
)  # images of a micro-batch, activation checkpointing


def changed(config: Config, **sections: Mapping) -> Config:
    """The config with keys of `train`, `data`, `lm` or `bridge` changed."""
    document = config.model_dump(mode="json")
    places = {"lm": document["model"]["lm"], "bridge": document["model"]["bridge"]}
    for section, keys in sections.items():
        places.get(section, document.get(section)).update(keys)
    return Config(**document)


def drawn(config: Config, seed: int, folder: Path) -> tuple[Config, int]:
    """A config with a language model of its own, and a number of images; the same for the same
    seed.
    """
    draw = random.Random(f"plan {seed}")
    width, layers = draw.choice([64, 128]), draw.choice([1, 2])
    config = changed(
        config,
        lm={
            "id": str(tiny_t5(folder, width=width, layers=layers)),
            "tuning": draw.choice(["qlora", "full"]),
        },
        bridge={
            "kind": draw.choice(["qformer", "qformer", "linear", "mean_pool"]),
            "query_tokens": draw.choice([2, 8, 16]),
            "width": draw.choice([32, 64]),
            "layers": draw.choice([1, 2]),
        },
        data={"texts_per_image": draw.choice([None, 1, 3])},
        train={"activation_checkpointing": seed % 2 == 1},
    )
    return config, draw.choice([1, 4, 9])


def collated(config: Config, model: VisionLanguageModel, images: int) -> Batch:
    """What the collator makes of so many pictures with the toy set's texts."""
    samples = [
        Sample(
            Record(f"{i}", "toy", "train", f"{i}", texts(i)),
            np.zeros((32, 32, 3), np.uint8),
            "png",
            0,
            i,
        )
        for i in range(images)
    ]
    on_gpu = model.device.type == "cuda"
    collate = Collator(
        model.tokenizer,
        config.data,
        config.prompts,
        config.seed,
        packs=not config.model.lm.has_encoder,
        on_gpu=on_gpu,
    )
    return collate(samples)


def measured_saved(model: VisionLanguageModel, batch: Batch) -> int:
    """Bytes of the storages that a real forward pass saves for its backward pass, of parameters not
    counted.
    """
    own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch).sum  # alive until the end, so that no storage is used a second time
    assert torch.isfinite(loss)
    return sum(storage.nbytes() for storage in saved.values())


class RealMeter(_Meter):
    """The plan's meter over a real model: nothing is answered in place of torch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.add([t for t in tree_leaves(out) if isinstance(t, torch.Tensor)], "temporaries")
        return out


def measured_evaluation(
    model: VisionLanguageModel, batch: Batch, decoding: DecodingConfig
) -> dict[str, int]:
    """Bytes that losses and answers of a batch hold at most, beside the model, by phase."""
    found = {}
    for phase in ("losses", "answers"):
        meter = RealMeter(None, model, 1)
        meter.add(tensors_of(batch), "batch")
        with torch.no_grad(), meter:
            tokens = model.bridge_tokens(batch)
            if phase == "losses":
                model.loss(batch, tokens)
            else:
                model.generate(batch, decoding, tokens)
        found[phase] = sum(meter.peak.values())
    return found


def middle_sized(config: Config, root: Path) -> Config:
    """A model whose activations are hundreds of megabytes."""
    lm = {"id": str(tiny_t5(root / "t5-512", width=512, layers=6)), "tuning": "qlora"}
    return changed(
        config, lm=lm, bridge={"width": 256, "query_tokens": 32}, data={"texts_per_image": None}
    )


def measured_peak(config: Config, images: int, checkpointing: bool) -> tuple[int, int]:
    """(planned, measured) bytes of CUDA's allocator at most, in two steps of two micro-batches;
    without the context.
    """
    cuda = torch.device("cuda")
    train = {
        "micro_batch": images,
        "global_batch": 2 * images,
        "activation_checkpointing": checkpointing,
    }
    config = changed(config, train=train)
    gc.collect()  # what an earlier case left behind in cycles
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = VisionLanguageModel.build(config, precision=choose("auto", cuda), device=cuda).train()
    batch = collated(config, model, images)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameter_groups(named, config.train), fused=True)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        for _ in range(2):
            model(batch.to("cuda")).sum.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    measured = torch.cuda.max_memory_allocated() - before
    work = Workload(Sizes.of(batch), None, None, "the batch measured")
    planned = Planner(config, devices.here(), Launch(), 1, work, None).bytes(images) - CUDA_CONTEXT
    return planned, measured
