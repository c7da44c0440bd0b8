"""What computing nothing twice is worth: one training step over the same images and captions, three ways.

    python benchmarks/grouped.py [--images DIR] [--batch 16] [--steps 5]

unrolled: every caption brings its own picture, as in most trainers; grouped: a picture's work is done once; features:
the frozen encoder's work was done before. Ratios of one run; the three ways take turns, so that a busy machine slows
all alike. Losses must agree, or the program stops.
"""

from __future__ import annotations

import argparse
import io
import platform
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from transformers import T5Config, T5ForConditionalGeneration

from harness import base_lm
from harness.batch import Batch, Collator
from harness.config import Bridge, Config, LanguageModel, Model, Vision
from harness.model.vision import quiet_transformers
from harness.model.vlm import VisionLanguageModel
from harness.report import markdown_table
from shards.read import Sample
from shards.record import Record, Text

CAPTIONS = (
    "A black dog is running through the snow .",
    "Two children in red shirts play with a ball on the grass .",
    "A man climbs a steep rock face above the sea .",
    "People stand in front of a large building at night .",
    "A girl in a pink dress goes up the stairs of a wooden house .",
)


def unrolled(batch: Batch) -> Batch:
    """The same targets, each with a picture and a context of its own."""
    contexts = batch.context_of_T
    return replace(
        batch,
        pixels_IHW3=batch.pixels_IHW3[batch.image_of_C[contexts]],
        prompt_ids_CL=batch.prompt_ids_CL[contexts],
        prompt_mask_CL=batch.prompt_mask_CL[contexts],
        image_of_C=torch.arange(len(contexts)),
        context_of_T=torch.arange(len(contexts)),
    )


def pictures(folder: Path | None, count: int, side: int) -> list[np.ndarray]:
    if folder is None:
        return list(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8))
    files = sorted(folder.glob("*.jpg"))[:count]
    return [np.asarray(Image.open(io.BytesIO(f.read_bytes())).convert("RGB").resize((side, side))) for f in files]


def step(model: VisionLanguageModel, batch: Batch) -> tuple[float, float]:
    """(seconds, loss) of one forward and backward pass."""
    model.zero_grad()
    started = time.perf_counter()
    out = model(batch)
    loss = out.sum / out.weight
    loss.backward()
    return time.perf_counter() - started, loss.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="a folder of JPEGs; without it, noise")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        base_lm.train_tokenizer(CAPTIONS, Path(folder), 512)
        lm = T5ForConditionalGeneration(
            T5Config(
                vocab_size=512, d_model=256, d_kv=64, d_ff=1024, num_layers=3, num_heads=4, decoder_start_token_id=0
            )
        )
        with quiet_transformers():
            lm.save_pretrained(folder)
        config = Config(
            name="grouped",
            model=Model(
                vision=Vision(kind="efficientnet_lite0", image_size=224),
                bridge=Bridge(query_tokens=32, layers=2, width=256, heads=4),
                lm=LanguageModel(id=folder, tuning="qlora"),
            ),
        )
        model = VisionLanguageModel.build(config).train()
    collate = Collator(model.tokenizer, config.data, config.prompts)
    record = Record("r", "d", "s", "i", (Text("t", "caption", CAPTIONS),))
    samples = [Sample(record, image, "jpg", 0, 0) for image in pictures(given.images, given.batch, 224)]
    grouped = collate(samples)
    features = replace(grouped, pixels_IHW3=None, features_IPD=model.patch_tokens(grouped).half())
    ways = {"unrolled": unrolled(grouped), "grouped": grouped, "grouped, features": features}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(given.steps + 1):
        losses = {}
        for name, batch in ways.items():
            seconds, losses[name] = step(model, batch)
            times[name] += [seconds] if turn else []  # the first turn warms up
        if max(losses.values()) - min(losses.values()) > 1e-3 * losses["grouped"]:
            raise SystemExit(f"the losses differ: {losses}")
    slowest = median(times["unrolled"])
    rows = [
        [n, f"{median(t):.3f}", f"{given.batch / median(t):.1f}", f"{slowest / median(t):.1f}"]
        for n, t in times.items()
    ]
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__};"
    )
    print(
        f"{given.batch} pictures of 224 px, 5 captions each; EfficientNet-Lite0, Q-Former 2 x 256, T5 3+3 x 256 NF4\n"
    )
    print(markdown_table(rows, ["a step", "s", "pictures/s", "times as fast"]))


if __name__ == "__main__":
    main()
