"""A batch of captions and questions as the Collator groups it, the same batch unrolled, and a model
to put it into.

Two images, five contexts, nine targets: image 0 has a caption prompt with five targets and two
questions, image 1 has one of each. Features take the place of pixels: 6 patch tokens of width 32.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.config.schema import Config, DataConfig, DecodingConfig, PromptsConfig
from harness.data.collate import Collator
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from shards.read import Sample
from shards.record import Record, Text

TOKENS, WIDTH = 6, 32
ENCODER = {
    "kind": "clip",
    "id": "none",
    "hash": "e" * 64,
    "tokens": TOKENS,
    "width": WIDTH,
    "image_size": 32,
}
# each kind of language model and of bridge, as keys of the config
LANGUAGES: dict[str, dict[str, Any]] = {
    "t5": {},
    "gpt2": {"kind": "gpt2"},
    "gpt2 with cross-attention": {"kind": "gpt2", "cross_attention": True},
}
BRIDGES: dict[str, dict[str, Any]] = {
    "qformer": {},
    "question-aware": {"question_aware": True},
    "mean_pool": {"kind": "mean_pool"},
    "linear": {"kind": "linear"},
}
CAPTIONS = (
    "a black dog",
    "a white dog with brown spots",
    "two girls paint a rainbow",
    "a man",
    "a boy jumps",
)


def records() -> list[Record]:
    first = (
        Text("c0", "caption", CAPTIONS),
        Text("q0", "vqa", ("down", "down", "at the table"), "Where is he looking?"),
        Text(
            "q1", "vqa", ("yes",) * 3, "is there a red shape in the picture, or is it a blue one?"
        ),
    )
    second = (
        Text("c1", "caption", ("a child in a pink dress",)),
        Text("q2", "vqa", ("no",), "is it red?"),
    )
    return [Record("0", "toy", "train", "0", first), Record("1", "toy", "train", "1", second)]


def samples(epoch: int = 0) -> list[Sample]:
    rng = np.random.default_rng(0)
    features = [rng.normal(size=(TOKENS, WIDTH)).astype(np.float16) for _ in records()]
    return [
        Sample(r, f, "safetensors", 0, i, epoch=epoch)
        for i, (r, f) in enumerate(zip(records(), features, strict=True))
    ]


def collator(
    tokenizer, *, prompts: PromptsConfig | None = None, loss_on_padding: bool = False, **data
) -> Collator:
    prompts = prompts or PromptsConfig()
    return Collator(
        tokenizer, DataConfig(**data), prompts, loss_on_padding=loss_on_padding, packs=True
    )


def unrolled(batch: Batch) -> Batch:
    """Every target with an image row and a context row of its own."""
    c = batch.context_of_T
    rows = torch.arange(len(c))
    return replace(
        batch,
        prompt_ids_CL=batch.prompt_ids_CL[c],
        prompt_mask_CL=batch.prompt_mask_CL[c],
        image_of_C=rows,
        context_of_T=rows,
        features_IPD=batch.features_IPD[batch.image_of_C[c]],
        contexts=tuple(batch.contexts[i] for i in c.tolist()),
    )


def config(
    folder: str | Path, *, bridge: dict | None = None, train: dict | None = None, **lm
) -> Config:
    small = {"query_tokens": 3, "layers": 2, "width": 32, "heads": 4}
    lora = {"r": 4, "alpha": 8}
    return Config(
        name="grouped",
        model={
            "bridge": small | (bridge or {}),
            "lm": {"id": str(folder), "tuning": "lora", "lora": lora} | lm,
        },
        train=train or {},
    )


def model(folder: str | Path, **settings) -> VisionLanguageModel:
    """In train mode, and LoRA's B matrices not 0 as at their start, when A has no gradient."""
    built = VisionLanguageModel.build(config(folder, **settings), ENCODER)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return built.train()


def opened(built: VisionLanguageModel) -> VisionLanguageModel:
    """The model with a cross-attention that lets something through, as after some training."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in built.named_parameters():
        if "crossattention.c_proj" in name:
            parameter.data.normal_(std=0.3, generator=generator)
    return built


def gradients(
    built: VisionLanguageModel, batch: Batch
) -> tuple[float, dict[str, torch.Tensor | None]]:
    """Mean loss of the batch, and the gradient of every trainable parameter (None where it got
    none).
    """
    built.zero_grad(set_to_none=True)
    out = built(batch)
    loss = out.sum / max(float(out.weight), 1.0)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in built.named_parameters() if p.requires_grad}


def loss_of_t5(built: VisionLanguageModel, batch: Batch) -> torch.Tensor:
    """The mean loss of T5's own forward over the unrolled batch."""
    flat = unrolled(batch)
    image, t5 = built.bridge_tokens(flat), built.lm.base
    embeds = torch.cat([image.tokens_NQD, t5.shared(flat.prompt_ids_CL)], dim=1)
    seen = torch.ones(image.tokens_NQD.shape[:2], dtype=torch.bool)
    return t5(
        inputs_embeds=embeds,
        attention_mask=torch.cat([seen, flat.prompt_mask_CL], dim=1),
        labels=flat.labels_TL.masked_fill(flat.weight_TL == 0, -100),
    ).loss


def furthest(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of gradients, in the largest gradient."""
    assert one.keys() == other.keys()
    size = max(g.abs().max().item() for g in one.values())
    return max((one[name] - other[name]).abs().max().item() for name in one) / size


def pixel_batch(model):
    rng = np.random.default_rng(0)
    made = samples()
    for sample in made:
        sample.payload, sample.extension = rng.integers(0, 255, (32, 32, 3), np.uint8), "jpg"
    return collator(model.tokenizer)(made)


def moved(model, seed: int = 0):
    """The model after something like training: every trainable weight is another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def outputs(model, batch):
    with torch.no_grad():
        said = model.eval().generate(batch, DecodingConfig(max_new_tokens=4, min_new_tokens=4))
        return model.loss(batch).sum_T, said.p_eos_first_C, said.token_ids


def same(one, other) -> bool:
    return torch.equal(one[0], other[0]) and torch.equal(one[1], other[1]) and one[2] == other[2]
