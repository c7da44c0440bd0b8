"""What computing nothing twice is worth: one training step over the same captions, four ways.

    python benchmarks/grouped.py [--images DIR [--captions Flickr8k.token.txt]] [--batch 16]

unrolled: every caption brings its own picture, as in most trainers; grouped: a picture's work is
done once; of like length: and captions are decoded with others of their length, without most of the
padding; features: and the frozen encoder's work was done before. Ratios of one run; the ways take
turns, so that a busy machine slows all alike. Losses must agree, or the program stops.
"""

from __future__ import annotations

import argparse
import io
import platform
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from PIL import Image
from transformers import T5Config, T5ForConditionalGeneration

from harness import base_lm
from harness.config.schema import (
    BridgeConfig,
    Config,
    LanguageModelConfig,
    ModelConfig,
    VisionConfig,
)
from harness.data.collate import Collator
from harness.model.batch import Batch
from harness.model.pretrained import quiet_transformers
from harness.model.vlm import VisionLanguageModel
from harness.report.pictures import markdown_table
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


def pictures(
    folder: Path | None, captions: Path | None, count: int, side: int
) -> list[tuple[np.ndarray, list[str]]]:
    """Pixels and the captions of each picture: of the file's lines `NAME.jpg#N<tab>CAPTION`, or the
    five above.
    """
    if folder is None:
        pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
        return [(one, list(CAPTIONS)) for one in pixels]
    texts = defaultdict(list)
    for line in captions.read_text().splitlines() if captions else ():
        name, _, caption = line.partition("\t")
        texts[name.partition("#")[0]].append(caption)
    files = [file for file in sorted(folder.glob("*.jpg")) if not captions or file.name in texts][
        :count
    ]
    opened = [
        Image.open(io.BytesIO(file.read_bytes())).convert("RGB").resize((side, side))
        for file in files
    ]
    return [
        (np.asarray(image), texts.get(file.name) or list(CAPTIONS))
        for file, image in zip(files, opened, strict=True)
    ]


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
    parser.add_argument(
        "--captions",
        type=Path,
        help="theirs, as Flickr8k.token.txt; without it, five of like length",
    )
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args()
    shown = pictures(given.images, given.captions, given.batch, 224)
    with tempfile.TemporaryDirectory() as folder:
        base_lm.train_tokenizer(
            [caption for _, captions in shown for caption in captions], Path(folder), 512
        )
        lm = T5ForConditionalGeneration(
            T5Config(
                vocab_size=512,
                d_model=256,
                d_kv=64,
                d_ff=1024,
                num_layers=3,
                num_heads=4,
                decoder_start_token_id=0,
            )
        )
        with quiet_transformers():
            lm.save_pretrained(folder)
        config = Config(
            name="grouped",
            model=ModelConfig(
                vision=VisionConfig(kind="efficientnet_lite0", image_size=224),
                bridge=BridgeConfig(query_tokens=32, layers=2, width=256, heads=4),
                lm=LanguageModelConfig(id=folder, tuning="qlora"),
            ),
        )
        model = VisionLanguageModel.build(config).train()
    collate = Collator(model.tokenizer, config.data, config.prompts)
    like = collate(
        [
            Sample(
                Record(f"{n}", "d", "s", "i", (Text("t", "caption", tuple(captions)),)),
                image,
                "jpg",
                0,
                n,
            )
            for n, (image, captions) in enumerate(shown)
        ]
    )
    grouped = replace(like, groups=())
    features = replace(like, pixels_IHW3=None, features_IPD=model.patch_tokens(like).half())
    ways = {
        "unrolled: every caption brings its own picture": unrolled(grouped),
        "grouped": grouped,
        "grouped, captions of like length together": like,
        "the same, features made before": features,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(given.steps + 1):
        losses = {}
        for name, batch in ways.items():
            seconds, losses[name] = step(model, batch)
            times[name] += [seconds] if turn else []  # the first turn warms up
        if max(losses.values()) - min(losses.values()) > 1e-3 * min(losses.values()):
            raise SystemExit(f"the losses differ: {losses}")
    slowest = median(next(iter(times.values())))
    rows = [
        [n, f"{median(t):.3f}", f"{given.batch / median(t):.1f}", f"{slowest / median(t):.1f}"]
        for n, t in times.items()
    ]
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s), "
        f"torch {torch.__version__};"
    )
    words = int(like.weight) / like.labels_TL.numel()
    print(
        f"{given.batch} pictures of 224 px, {len(like.labels_TL)} texts ({words:.0%} of their "
        f"positions no padding), "
        f"EfficientNet-Lite0, Q-Former 2 x 256, T5 3+3 x 256 NF4\n"
    )
    print(markdown_table(rows, ["a step", "s", "pictures/s", "times as fast"]))


if __name__ == "__main__":
    main()
