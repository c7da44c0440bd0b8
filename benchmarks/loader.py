"""Images a second from JPEGs in tars to batches of pixels: ours, what people use, and a limit.

    OMP_NUM_THREADS=1 python benchmarks/loader.py --images DIR [--copies 20] [--workers 0 1 2]
        [--rounds 3] [--json FILE]

DIR holds JPEGs in their original size, for instance 48 of Flickr8k; each is put into the set
`copies` times over. Every way reads all of it once, the picture and its five captions, in batches
of 32 of 224 pixels, and takes turns with the others, so that a busy machine slows all alike:

- limit: a bare loop over the bytes in memory, simplejpeg's decoding and Pillow's resize of only the
  kept box; nothing is read, parsed or made into a batch. With workers: so many processes of it.
- ours: `harness train`'s Loader with data.resize=fast, and with exact.
- webdataset: its usual pipeline, with the pixels of transformers' CLIPImageProcessorPil.
- files: torch's DataLoader over image files with the same processor.

Two rates: images a second by the clock, and images a second of the processor's time of all
processes, in which other programs have no part. Medians over the rounds; with --json also their
ratios, by number of workers.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from itertools import cycle, islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import PIL
import simplejpeg
import torch
import transformers
import webdataset
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from harness.config.schema import Config
from harness.data.fast_resize import training_decoder
from harness.data.images import reading
from harness.report.pictures import markdown_table
from shards.loader import Loader
from shards.record import Record, Text
from shards.write import write_shards

SIDE = 224
BATCH = 32
SHARDS = 16
CAPTION = "two dogs run over a meadow after a red ball"
Way = Callable[[Path, int], int]  # of a folder and a number of workers: how many images came


def make(folder: Path, images: Sequence[bytes], copies: int) -> None:
    """Writes the set as shards and as files."""
    (folder / "files").mkdir()
    pictures = list(islice(cycle(images), len(images) * copies))

    def samples() -> Iterator[tuple[Record, bytes, str]]:
        for n, data in enumerate(pictures):
            targets = tuple(f"{CAPTION} {n} {i}" for i in range(5))
            text = Text(str(n), "caption", targets)
            yield Record(f"{n:06d}", "benchmark", "train", str(n), (text,)), data, "jpg"
            (folder / "files" / f"{n:06d}.jpg").write_bytes(data)

    many = -(-len(pictures) // SHARDS)
    write_shards(
        samples(), folder / "train", dataset="benchmark", split="train", max_shard_samples=many
    )


def kept_box(width: int, height: int) -> tuple[float, float, float, float]:
    """What CLIP's processor keeps of a picture, in the picture's own pixels."""
    scale = min(width, height) / SIDE
    left = (round(width / scale) - SIDE) // 2 * scale
    top = (round(height / scale) - SIDE) // 2 * scale
    return left, top, left + SIDE * scale, top + SIDE * scale


def bare_loop(pictures: Sequence[bytes]) -> int:
    for data in pictures:
        image = Image.fromarray(simplejpeg.decode_jpeg(data))
        box = kept_box(*image.size)
        np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BICUBIC, box=box))
    return len(pictures)


def limit(folder: Path, workers: int) -> int:
    pictures = IN_MEMORY
    if not workers:
        return bare_loop(pictures)
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=bare_loop, args=(pictures[n::workers],)) for n in range(workers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return len(pictures)


IN_MEMORY: list[bytes] = []  # what `limit` goes through


def ours(resize: str) -> Way:
    def read(folder: Path, workers: int) -> int:
        config = Config(name="x", data={"resize": resize, "workers": workers})
        options = reading(config) | {"decode": training_decoder(config)}
        count = 0
        loader = Loader([str(folder / "train")], global_batch=BATCH, **options)
        with closing(loader.iterate(epochs=1)) as batches:
            for _, samples in batches:
                count += len(torch.from_numpy(np.stack([each.payload for each in samples])))
                assert all(len(each.known.texts[0].targets) == 5 for each in samples)
        return count

    return read


def processed(processor: CLIPImageProcessorPil, image: Image.Image) -> torch.Tensor:
    return processor(images=image, return_tensors="pt")["pixel_values"][0]


def through_webdataset(folder: Path, workers: int) -> int:
    processor = CLIPImageProcessorPil()

    def captions(record: dict[str, Any]) -> list[str]:
        return record["texts"][0]["targets"]

    tars = [str(path) for path in sorted((folder / "train").glob("*.tar"))]
    dataset = (
        webdataset.WebDataset(tars, shardshuffle=SHARDS)
        .shuffle(100)
        .decode("pil")
        .to_tuple("jpg", "json")
        .map_tuple(lambda image: processed(processor, image), captions)
        .batched(BATCH)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)
    return sum(len(pixels) for pixels, _ in loader)


class Files(Dataset):
    """Image files with their captions."""

    def __init__(self, folder: Path):
        self.paths = sorted((folder / "files").iterdir())
        self.captions = [[f"{CAPTION} {n} {i}" for i in range(5)] for n in range(len(self.paths))]
        self.processor = CLIPImageProcessorPil()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, n: int) -> tuple[torch.Tensor, list[str]]:
        image = Image.open(self.paths[n]).convert("RGB")
        return processed(self.processor, image), self.captions[n]


def over_files(folder: Path, workers: int) -> int:
    loader = DataLoader(Files(folder), batch_size=BATCH, shuffle=True, num_workers=workers)
    return sum(len(pixels) for pixels, _ in loader)


WAYS: dict[str, Way] = {
    "limit": limit,
    "ours": ours("fast"),
    "ours_exact": ours("exact"),
    "webdataset": through_webdataset,
    "files": over_files,
}


def processor_seconds() -> float:
    """Of this process and of those that have ended."""
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def timed(way: Way, folder: Path, workers: int) -> dict[str, float]:
    used = processor_seconds()
    began = time.perf_counter()
    count = way(folder, workers)
    seconds = time.perf_counter() - began
    if count != len(IN_MEMORY):
        raise SystemExit(f"{count} images came, {len(IN_MEMORY)} are in the set")
    return {"by_clock": count / seconds, "per_core": count / (processor_seconds() - used)}


def measured(folder: Path, workers: int, rounds: int) -> dict[str, Any]:
    """Medians of both rates by way, and the ratios of ours to the others."""
    turns = [
        {name: timed(way, folder, workers) for name, way in WAYS.items()} for _ in range(rounds)
    ]
    found: dict[str, Any] = {
        name: {rate: median(turn[name][rate] for turn in turns) for rate in turns[0][name]}
        for name in WAYS
    }
    for rate in ("by_clock", "per_core"):
        for other in ("limit", "webdataset", "files"):
            ratios = [turn["ours"][rate] / turn[other][rate] for turn in turns]
            found[f"ratio_over_{other}_{rate}"] = median(ratios)
    return found


def hardware() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    named = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return {
        "processor": named[0] if named else platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "vector_instructions": torch.backends.cpu.get_cpu_capability(),
        "transformers": transformers.__version__,
        "webdataset": webdataset.__version__,
        "pillow": PIL.__version__,
        "simplejpeg": simplejpeg.__version__,
    }


def table(found: dict[int, dict[str, Any]]) -> str:
    rows = []
    for workers, figures in found.items():
        for name in WAYS:
            rates = [figures[name][rate] for rate in ("by_clock", "per_core")]
            share = figures[name]["per_core"] / figures["limit"]["per_core"]
            rows.append([f"{workers}", name, *(f"{rate:,.0f}" for rate in rates), f"{share:.2f}"])
    names = ["workers", "way", "images/s by the clock", "images/s and core", "of the limit"]
    return markdown_table(rows, names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="a folder of JPEGs")
    parser.add_argument("--copies", type=int, default=20)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    images = [path.read_bytes() for path in sorted(given.images.glob("*.jpg"))]
    IN_MEMORY.extend(islice(cycle(images), len(images) * given.copies))
    machine = hardware()
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), images, given.copies)
        found = {n: measured(Path(place), n, given.rounds) for n in given.workers}
    print(f"{machine}; {len(IN_MEMORY)} images, {given.rounds} rounds\n")
    print(table(found))
    if given.json:
        least = found[given.workers[0]]
        report = {
            "machine": machine,
            "images": len(IN_MEMORY),
            "rounds": given.rounds,
            "ratio_over_limit_per_core": least["ratio_over_limit_per_core"],
            "ratio_over_webdataset_per_core": least["ratio_over_webdataset_per_core"],
            "workers": {f"{n}": figures for n, figures in found.items()},
        }
        given.json.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
