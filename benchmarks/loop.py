"""A step of ours against the loops that people write, side by side: captions a second and memory.

    python benchmarks/loop.py [--sizes small large] [--flickr8k DIR] [--rounds 5] [--json FILE]
    python benchmarks/loop.py --dev-loss --flickr8k DIR [--json FILE]

Four programs learn the same task with the same parts at true size (random weights; small: CLIP
ViT-B/32 and Flan-T5-small with 32 queries, large: CLIP ViT-L/14 and Flan-T5-base with 64; NF4 and
LoRA of rank 16 on all linear layers, a Q-Former of 2 x 768): `plain` and `trainer` of
usual_loops.py, and `harness train` from images and from features, with all captions of a picture.
Each is a process of its own, so that its peak memory is its own; they take turns, so that a busy
machine slows all alike. What counts is the median over the turns of whole steps: reading, decoding,
collating, forward, backward, optimizer. On a CPU nothing runs beside a step (no workers, one
thread), and seconds are the processor's own, in which other programs have no part; on a GPU each
loop has `--workers`, a turn is of `--steps` steps, and the clock counts. Without --flickr8k (a
folder with images/ and Flickr8k.token.txt or captions.txt) pictures and captions are drawn.
`--dev-loss`: not how fast a step is but how soon the same dev loss is reached (equal_loss.py).
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, TextIO

import numpy as np
import peft
import torch
import transformers
from equal_loss import reached_alike
from PIL import Image
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from usual_loops import LEARNING_RATE, WEIGHT_DECAY, Parts, plain, trainer

from harness import base_lm
from harness.config.schema import Config
from harness.data.encode import encode_set
from harness.model.pretrained import quiet_transformers
from harness.report.pictures import markdown_table
from harness.train.run import run
from harness.train.state import Observer, Run, StepResult
from shards.build import build

CLIP = {
    "small": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "patch_size": 32,
        "projection_dim": 512,
    },
    "large": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "projection_dim": 768,
    },
}
T5 = {
    "small": {"d_model": 512, "d_ff": 1024, "num_layers": 8, "num_heads": 6},
    "large": {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_heads": 12},
}
QUERIES = {"small": 32, "large": 64}
BATCH = {"small": 16, "large": 8}  # images a step
LOOPS = {
    "plain": "the loop people write",
    "trainer": "transformers' Trainer",
    "images": "ours, from images",
    "features": "ours, from features",
}
IMAGES = 128


# ---- what they learn from ------------------------------------------------------------------------


def captions_of(flickr8k: Path | None, folder: Path, images: int = IMAGES) -> dict[str, list[str]]:
    """Returns the first pictures of Flickr8k with their captions, or drawn ones, by path."""
    if flickr8k is None:
        return drawn(folder, images)
    texts: dict[str, list[str]] = {}
    official = flickr8k / "Flickr8k.token.txt"
    file = official if official.exists() else flickr8k / "captions.txt"
    lines = file.read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines] if file == official else csv.reader(lines[1:])
    for name, caption in rows:
        texts.setdefault(name.partition("#")[0], []).append(caption)
    paths = sorted(path for path in (flickr8k / "images").iterdir() if path.name in texts)
    return {str(path.resolve()): texts[path.name] for path in paths[:images]}


def drawn(folder: Path, images: int) -> dict[str, list[str]]:
    """Returns noise, and five captions a picture as long as those of Flickr8k."""
    generator = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("ba", "do", "ki", "lu", "mo", "ne") for b in "dfgklmnprst"]
    found = {}
    (folder / "drawn").mkdir()
    for n in range(images):
        path = folder / "drawn" / f"{n:04}.jpg"
        coarse = generator.integers(0, 256, (8, 10, 3), np.uint8)
        Image.fromarray(coarse).resize((320, 256), Image.Resampling.BICUBIC).save(path)
        lengths = generator.normal(11, 3.5, 5).clip(4, 30).astype(int)
        found[str(path)] = [" ".join(generator.choice(words, length)) for length in lengths]
    return found


def make_parts(folder: Path, size: str, captions: list[str]) -> None:
    """Saves a random CLIP and a random T5 of true size, with a tokenizer of these captions."""
    torch.manual_seed(0)
    (folder / "t5").mkdir(parents=True)
    base_lm.train_tokenizer(captions, folder / "t5", 8000)
    with quiet_transformers():
        CLIPVisionModel(CLIPVisionConfig(**CLIP[size])).save_pretrained(folder / "clip")
        CLIPImageProcessorPil().save_pretrained(folder / "clip")
        T5ForConditionalGeneration(
            T5Config(
                vocab_size=32128,
                d_kv=64,
                feed_forward_proj="gated-gelu",
                tie_word_embeddings=False,
                decoder_start_token_id=0,
                dropout_rate=0.0,
                **T5[size],
            )
        ).save_pretrained(folder / "t5")


def config_of(folder: Path, size: str, batch: int, data: str, workers: int) -> Config:
    """Returns our config of the same training."""
    return Config.model_validate(
        {
            "name": "loop",
            "out": str(folder / f"run_{data}"),
            "data": {"train": [{"path": str(folder / data / "train")}], "workers": workers},
            "model": {
                "vision": {"id": str(folder / "clip"), "layer": -2},
                "bridge": {"query_tokens": QUERIES[size], "layers": 2},
                "lm": {"id": str(folder / "t5"), "lora": {"r": 16, "alpha": 32}},
            },
            "prompts": {"caption": "photo"},
            "train": {
                "epochs": 1_000_000,
                "global_batch": batch,
                "micro_batch": batch,
                "learning_rate": LEARNING_RATE,
                "weight_decay": WEIGHT_DECAY,
                "save_every": 10**9,
                "save_minutes": None,
                "image_use_every": None,
            },
            "tracking": {"kind": "none"},
        }
    )


def make_sets(folder: Path, captions: dict[str, list[str]], config: Config) -> None:
    """Writes the same pictures as shards of images and of features."""
    images = folder / "files"
    images.mkdir(parents=True)
    lines = []
    for path, texts in captions.items():
        name = Path(path).name
        (images / name).symlink_to(path)
        lines += [f"{name}#{n}\t{text}\n" for n, text in enumerate(texts)]
    (folder / "token.txt").write_text("".join(lines), encoding="utf-8")
    build("flickr8k", folder / "images", images=images, captions=folder / "token.txt", workers=1)
    encode_set(
        folder / "images" / "train", folder / "features" / "train", config.model.vision, workers=0
    )


# ---- one loop, in a process of its own -----------------------------------------------------------


class Turns:
    """The steps of this process, taken when its parent says how many; it answers with a line."""

    def __init__(self, replies: TextIO, workers: int):
        self.replies = replies
        is_alone = not (torch.cuda.is_available() or workers or torch.get_num_threads() > 1)
        self.clock = time.process_time if is_alone else time.perf_counter
        self.captions = 0
        self.left = self._asked()
        self.since = self.clock()

    def taken(self, captions: int) -> None:
        self.captions += captions
        self.left -= 1
        if self.left:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = self.clock() - self.since
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _resident()
        answer = {"seconds": seconds, "captions": self.captions, "peak_mb": peak / 1e6}
        self.replies.write(json.dumps(answer) + "\n")
        self.captions = 0
        self.left = self._asked()
        self.since = self.clock()

    def _asked(self) -> int:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)  # the parent has what it wants
        return int(line)


def _resident() -> int:
    """Returns the most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Told(Observer):
    """What hears of each of our steps."""

    def __init__(self, turns: Turns):
        self.turns = turns

    def step_taken(self, run: Run, step: StepResult) -> None:
        self.turns.taken(int(step.targets))


def child(given: argparse.Namespace) -> None:
    """Learns in turns, until the parent closes the pipe."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed goes to the log
    turns = Turns(replies, given.workers)
    size = given.sizes[0]
    if given.loop in ("images", "features"):
        config = config_of(given.folder, size, given.batch, given.loop, given.workers)
        run(config, observers=[Told(turns)])
        return
    captions = json.loads((given.folder / "captions.json").read_text(encoding="utf-8"))
    parts = Parts(given.folder, captions, QUERIES[size])
    {"plain": plain, "trainer": trainer}[given.loop](parts, given.batch, given.workers, turns.taken)


# ---- all of them, in turns -----------------------------------------------------------------------


def started(folder: Path, loop: str, size: str, given: argparse.Namespace) -> subprocess.Popen:
    own = [sys.executable, __file__, "--loop", loop, "--folder", str(folder), "--sizes", size]
    own += ["--batch", str(given.batch or BATCH[size]), "--workers", str(given.workers)]
    with (folder / f"{loop}.log").open("w") as log:
        return subprocess.Popen(
            own, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder
        )


def turn(folder: Path, loop: str, process: subprocess.Popen, steps: int) -> dict[str, float]:
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{loop} ended:\n" + (folder / f"{loop}.log").read_text()[-3000:])
    return json.loads(line)


def measured(size: str, given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Returns captions a second and peak memory of each loop, and the two ratios."""
    captions = captions_of(given.flickr8k, folder)
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")
    make_parts(folder, size, [text for texts in captions.values() for text in texts])
    batch = given.batch or BATCH[size]
    make_sets(folder, captions, config_of(folder, size, batch, "images", 0))
    loops = {loop: started(folder, loop, size, given) for loop in given.loops}
    answers: dict[str, list[dict[str, float]]] = {loop: [] for loop in loops}
    try:
        for round_ in range(given.rounds + 1):
            for loop, process in loops.items():
                answer = turn(folder, loop, process, given.steps)
                answers[loop] += [answer] if round_ else []  # the first warms up
    finally:
        for process in loops.values():
            process.kill()  # ours would finish its step, and save
            process.wait()
    result: dict[str, Any] = {"batch": batch, "loops": {}}
    for loop, turns in answers.items():
        rates = [t["captions"] / t["seconds"] for t in turns]
        result["loops"][loop] = {
            "captions_per_second": median(rates),
            "seconds_per_step": median(t["seconds"] for t in turns) / given.steps,
            "peak_mb": turns[-1]["peak_mb"],
        }
    others = [r["captions_per_second"] for n, r in result["loops"].items() if n in LOOPS_OF_OTHERS]
    for loop in ("images", "features"):
        if others and loop in loops:
            own = result["loops"][loop]["captions_per_second"]
            result[f"ratio_{loop}_over_best_other"] = own / max(others)
    return result


LOOPS_OF_OTHERS = ("plain", "trainer")


def shown(size: str, result: dict[str, Any]) -> str:
    loops = result["loops"]
    best = max((loops[n]["captions_per_second"] for n in LOOPS_OF_OTHERS if n in loops), default=0)
    rows = [
        [
            LOOPS[name],
            f"{one['seconds_per_step']:.2f}",
            f"{one['captions_per_second']:.2f}",
            f"{one['captions_per_second'] / best:.2f}" if best else "",
            f"{one['peak_mb'] / 1000:.2f}",
        ]
        for name, one in loops.items()
    ]
    names = [
        f"{size}, {result['batch']} images a step",
        "s a step",
        "captions/s",
        "times the best other",
        "GB",
    ]
    return markdown_table(rows, names)


def machine() -> dict[str, Any]:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": gpu or platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


def main() -> None:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=tuple(CLIP), default=["small"])
    parser.add_argument("--loops", nargs="+", choices=tuple(LOOPS), default=list(LOOPS))
    parser.add_argument("--flickr8k", type=Path)
    parser.add_argument("--batch", type=int, help="images a step; 16 of small, 8 of large")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each, after a first")
    parser.add_argument("--steps", type=int, default=20 if on_gpu else 1, help="of a turn")
    parser.add_argument("--workers", type=int, default=4 if on_gpu else 0)
    parser.add_argument("--dev-loss", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--loop", choices=tuple(LOOPS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.loop:
        child(given)
        return
    report: dict[str, Any] = {"machine": machine()}
    if given.dev_loss:
        given.sizes = []
    print(", ".join(f"{name} {value}" for name, value in report["machine"].items()), "\n")
    for size in given.sizes:
        with tempfile.TemporaryDirectory() as folder:
            report[size] = measured(size, given, Path(folder))
        print(shown(size, report[size]), flush=True)
    if given.dev_loss:
        with tempfile.TemporaryDirectory() as folder:
            report["dev_loss"] = reached_alike(Path(folder), given, captions_of, make_sets)
    if given.json:
        given.json.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
