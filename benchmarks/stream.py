"""What the stream costs: a seek in an order of 10^8 samples, and reading, beside plain webdataset.

    OMP_NUM_THREADS=1 python benchmarks/stream.py [--images FOLDER] [--count 2000]

FOLDER holds JPEGs, for instance those of Flickr8k; without it noisy 224 x 224 ones are made. Prints
one table.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image
from rich.console import Console
from rich.table import Table

from shards.loader import Loader
from shards.read import Sample
from shards.record import Record, Text
from shards.stream import Order
from shards.write import write_shards


def seek(shards: int, window: int, seeks: int = 100) -> tuple[str, str]:
    """A seek to a random place of 10^8 samples, and the memory an order holds after all of them."""
    sizes = np.full(shards, 10**8 // shards)
    Order(sizes[:100], 0, window).epoch_indices(0, 0, 32)  # numpy's own first allocations
    places = np.random.default_rng(0).integers(0, 10**8 - 32, seeks).tolist()
    tracemalloc.start()
    order = Order(sizes, 0, window)
    for place in places[:10]:
        order.epoch_indices(0, place, place + 32)
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    took = []
    for place in places:
        began = time.process_time()
        order.epoch_indices(0, place, place + 32)
        took.append(time.process_time() - began)
    return f"{1e3 * float(np.median(took)):.2f} ms", f"{held / 1e6:.1f} MB held"


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decode(sample: Sample) -> np.ndarray:
    return pixels(sample.payload)


def read_ours(folder: str, decoded: bool, shuffle: bool, workers: int) -> Iterator[object]:
    loader = Loader(
        [folder],
        global_batch=32,
        window_shards=4,
        shuffle=shuffle,
        workers=workers,
        decode=decode if decoded else None,
    )
    with closing(loader.iterate(epochs=1)) as batches:
        for _, samples in batches:
            yield from samples


def read_webdataset(folder: str, decoded: bool) -> Iterator[object]:
    for sample in webdataset.WebDataset(
        [str(p) for p in sorted(Path(folder).glob("*.tar"))], shardshuffle=False
    ):
        sample["json"] = json.loads(sample["json"])
        if decoded:
            sample["jpg"] = pixels(sample["jpg"])
        yield sample


def speed(read: Callable[[], Iterable[object]], count: int, rounds: int = 3) -> tuple[str, str]:
    """Samples per second of wall-clock time, and of CPU time of this process; the best of some
    rounds.
    """
    wall, cpu = [], []
    for _ in range(rounds):
        began, began_cpu = time.perf_counter(), time.process_time()
        found = sum(1 for _ in read())
        wall.append(found / (time.perf_counter() - began))
        cpu.append(found / (time.process_time() - began_cpu))
        if found != count:
            raise SystemExit(f"{found} samples came, {count} are in the set")
    return f"{max(wall):,.0f} /s", f"{max(cpu):,.0f} per CPU second of the main process"


def jpegs(folder: Path | None, count: int) -> Iterator[bytes]:
    if folder is not None:
        yield from (path.read_bytes() for path in islice(sorted(folder.glob("*.jpg")), count))
        return
    rng = np.random.default_rng(0)
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (28, 28, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((224, 224), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        yield buffer.getvalue()


def build(out: Path, folder: Path | None, count: int) -> tuple[str, int, int]:
    """Folder, images, bytes of a set of sixteen shards with five captions an image."""

    def records() -> Iterator[tuple[Record, bytes, str]]:
        for n, data in enumerate(jpegs(folder, count)):
            text = Text(
                str(n),
                "caption",
                tuple(f"caption {i} of picture {n}, of a usual length" for i in range(5)),
            )
            yield Record(f"{n:06d}", "benchmark", "train", str(n), (text,)), data, "jpg"

    manifest = write_shards(
        records(), out, dataset="benchmark", split="train", max_shard_samples=-(-count // 16)
    )
    return str(out), manifest.samples, manifest.bytes


def hardware() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (
                x.split(":")[1].strip()
                for x in cpuinfo.read_text().splitlines()
                if "model name" in x
            ),
            name,
        )
    load = os.getloadavg()[0]
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    return f"{name}, {os.cpu_count()} CPUs, load {load:.1f}, {versions}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of JPEGs; none: made here")
    parser.add_argument("--count", type=int, default=2000)
    options = parser.parse_args()
    table = Table("what", "", "", title=f"The stream on {hardware()}")
    for shards, window in ((100_000, 8), (10_000, 8), (10_000, 128)):
        table.add_row(
            f"seek in 10^8 samples, {shards:,} shards, window {window}", *seek(shards, window)
        )
    with tempfile.TemporaryDirectory() as place:
        folder, count, size = build(Path(place, "train"), options.images, options.count)
        source = options.images.parent.name if options.images else "generated"
        table.add_section()
        table.add_row(
            f"{count:,} JPEGs ({source})", f"{size / count / 1e3:.1f} kB each", "page cache warm"
        )
        for decoded in (False, True):
            what = "decoded by Pillow" if decoded else "bytes and texts"
            table.add_row(
                f"{what}: webdataset, in order",
                *speed(partial(read_webdataset, folder, decoded), count),
            )
            for name, shuffle, workers in (
                ("in order", False, 0),
                ("shuffled", True, 0),
                ("shuffled, 2 workers", True, 2),
            ):
                ours = partial(read_ours, folder, decoded, shuffle, workers)
                table.add_row(f"{what}: ours, {name}", *speed(ours, count))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
