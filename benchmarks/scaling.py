"""What a set costs by its size, and what the nodes of a cluster fetch of it.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--most 8] [--nodes 64] [--json]

Sizes: 10^4 to 10^MOST samples. Their indexes are made here, true in every row; every sample of a
set is the same small JPEG with a caption, which all its shards hold (hard links), so that batches
do come out. Above 10^7 the sidecar has holes: only rows that the measured places need are written.
Each size is measured in a process of its own; times begin when torch and shards are imported.
Nodes: readers with caches of their own over one HTTP server on this machine, which counts bytes;
each reads two epochs, after the other.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import platform
import resource
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from shards import manifest as manifests
from shards.index import index_shards
from shards.loader import Loader
from shards.manifest import SIDECAR, FileInfo, Manifest, sidecar_dtype
from shards.read import Sample
from shards.record import Record, Text
from shards.sidecar import write_index
from shards.stream import Order
from shards.write import write_shards

KEY = 9  # digits of a key
WINDOW = 8
BATCH = 64
LANES = 64
SHARDS = 128  # of the set that the nodes read
IMAGES_A_SHARD = 32
TENTHS = 10
PLACES = 20  # seeks that are timed
WHOLE = 10**7  # samples up to which every row is written
TEXTS = (Text("a", "caption", ("a picture",)),)


def jpeg(side: int = 16) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def one_sample(folder: Path) -> Manifest:
    """A tar of others with one sample, indexed."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "one.tar", "w") as tar:
        for name, data in (("0" * KEY + ".jpg", jpeg()), ("0" * KEY + ".txt", b"a picture")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return index_shards(str(folder), "benchmark", "train")


def places_of(samples: int) -> list[int]:
    """Where batches are read: the beginning, the tenths of an epoch, and some between."""
    tenths = [samples * n // TENTHS for n in range(TENTHS)]
    some = np.random.default_rng(1).integers(0, samples - 20 * BATCH, PLACES).tolist()
    return tenths + some


def make_set(folder: Path, samples: int) -> None:
    """Writes a set whose every row is true, with `samples` samples."""
    one = one_sample(folder / "one")
    a_shard = min(10_000, samples // 10)
    shards = samples // a_shard
    row = one.sidecar[0]
    rows = np.zeros(a_shard, sidecar_dtype(KEY))
    for name in row.dtype.names or ():
        rows[name] = row[name]
    needed = range(shards)
    if samples > WHOLE:
        order = Order([a_shard] * shards, 0, WINDOW)
        read = [order.epoch_indices(0, at, at + 21 * BATCH) for at in places_of(samples)]
        needed = sorted(set((np.concatenate(read) // a_shard).tolist()))
    whole = hashlib.sha256()
    hashes = ["0" * 64] * shards
    with open(folder / SIDECAR, "wb") as file:
        for shard in needed:
            first = shard * a_shard
            rows["key"] = np.char.zfill(np.arange(first, first + a_shard).astype("S9"), KEY)
            data = rows.tobytes()
            hashes[shard] = hashlib.sha256(data).hexdigest()
            whole.update(data)
            file.seek(first * rows.itemsize)
            file.write(data)
        file.truncate(samples * rows.itemsize)
    for n in range(shards):
        os.link(folder / "one" / "one.tar", folder / f"train-{n:06d}.tar")
    info = replace(one.shards[0], samples=a_shard, texts=a_shard)
    write_index(
        replace(
            one,
            shards=tuple(replace(info, name=f"train-{n:06d}.tar") for n in range(shards)),
            sidecar_file=FileInfo(SIDECAR, samples * rows.itemsize, whole.hexdigest()),
            rows_sha256=tuple(hashes),
            key_bytes=KEY,
            format_1_digest=None,
        ),
        folder,
    )


def decode(sample: Sample) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(sample.payload)).convert("RGB"))


def megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def seek_times(loader: Loader) -> list[float]:
    """Milliseconds until it is known which samples are the batch at some place."""
    took = []
    order = loader._reading.order
    for place in places_of(loader.samples)[TENTHS:]:
        began = time.perf_counter()
        for lane, first, end, _ in order.shares(place, place + BATCH, 0, 0, 1):
            order.lanes[lane].picks(0, first, end)
        took.append(1e3 * (time.perf_counter() - began))
    return took


def batch_times(loader: Loader) -> list[list[float]]:
    """Milliseconds of batches in each tenth of an epoch, in turns, as the machine is not idle."""
    took: list[list[float]] = [[] for _ in range(TENTHS)]
    for _ in range(3):
        for tenth, place in enumerate(places_of(loader.samples)[:TENTHS]):
            with closing(loader.iterate(loader.at(0, place))) as batches:
                for _ in range(7):
                    began = time.perf_counter()
                    next(batches)
                    took[tenth].append(1e3 * (time.perf_counter() - began))
    return took


def measure(folder: str) -> dict[str, Any]:
    """Returns the figures of one set, in this process, which has opened none before."""
    before = megabytes()
    began = time.perf_counter()
    loader = Loader([folder], global_batch=BATCH, window_shards=WINDOW, decode=decode)
    opened = time.perf_counter() - began
    with closing(loader.iterate()) as batches:
        _, samples = next(batches)
    first = time.perf_counter() - began
    assert all(sample.payload is not None for sample in samples), samples[0].error
    seeks = seek_times(loader)
    in_lanes = seek_times(Loader([folder], global_batch=BATCH, window_shards=WINDOW, lanes=LANES))
    by_tenth = [median(took) for took in batch_times(loader)]
    return {
        "open_s": opened,
        "first_batch_s": first,
        "peak_mb": megabytes(),
        "of_it_before_mb": before,
        "seek_ms": median(seeks),
        "longest_seek_ms": max(seeks),
        "seek_in_lanes_ms": median(in_lanes),
        "batch_ms_by_tenth_of_an_epoch": by_tenth,
        "slowest_tenth_over_fastest": max(by_tenth) / min(by_tenth),
    }


def by_size(most: int) -> dict[str, Any]:
    found = {}
    for power in range(4, most + 1):
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place, "train")
            make_set(folder, 10**power)
            line = [sys.executable, __file__, "--measure", str(folder)]
            found[str(10**power)] = json.loads(subprocess.check_output(line))
    return found


@contextmanager
def counting_server(folder: Path) -> Iterator[tuple[str, Counter[str]]]:
    """Serves a folder; yields its URL and the bytes sent of each file, headers aside."""
    sent: Counter[str] = Counter()

    class Handler(SimpleHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.rpartition("/")[2]
            data = (folder / name).read_bytes()
            if wanted := self.headers.get("Range"):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                data = data[int(first) : int(last) + 1]
            self.send_response(206 if wanted else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
            sent[name] += len(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", sent
    finally:
        server.shutdown()
        server.server_close()


def fetched(folder: Path, nodes: int, lanes: int) -> dict[str, float]:
    """Returns what the nodes of a run of two epochs fetch, as shares of the set."""
    shares, index = [], 0
    manifest = Manifest.open(folder)
    with tempfile.TemporaryDirectory() as place:
        for rank in range(nodes):
            with counting_server(folder) as (url, sent):
                loader = Loader(
                    [url],
                    global_batch=BATCH,
                    rank=rank,
                    world_size=nodes,
                    ranks_here=1,
                    lanes=lanes,
                    cache_dir=f"{place}/{rank}",
                    cache_bytes=10**8,
                )
                with closing(loader.iterate(epochs=2)) as batches:
                    for _ in batches:
                        pass
                for thread in threading.enumerate():  # it may be in the middle of a fetch
                    if thread.name == "shards ahead":
                        thread.join()
                shares.append(sum(n for name, n in sent.items() if name.endswith(".tar")))
                index += sent[SIDECAR]
    return {
        "lanes": lanes,
        "fetched_in_all": sum(shares) / manifest.bytes,
        "most_by_one_node": max(shares) / manifest.bytes,
        "rows_of_the_index_in_all": index / manifest.sidecar_file.bytes,
    }


def by_nodes(most: int) -> dict[str, Any]:
    """With as many lanes as the largest cluster has nodes, and with one."""
    manifests.CHECKED_AT_ONCE = 0  # as of a set with more than 64 MiB of rows
    found = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "train")
        records = (
            (Record(f"{n:06d}", "benchmark", "train", str(n), TEXTS), jpeg(), "jpg")
            for n in range(SHARDS * IMAGES_A_SHARD)
        )
        write_shards(records, folder, dataset="b", split="train", max_shard_samples=IMAGES_A_SHARD)
        nodes = 1
        while nodes <= most:
            found[str(nodes)] = fetched(folder, nodes, LANES)
            if nodes <= 8:
                found[str(nodes)]["without_lanes"] = fetched(folder, nodes, 1)["fetched_in_all"]
            nodes *= 2
    return found


def hardware() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.machine())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{name}, {os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}, {versions}"


def show(found: dict[str, Any]) -> None:
    names = ("samples", "open, s", "first batch, s", "peak MB", "of it before", "seek, ms")
    more = ("longest", f"in {LANES} lanes", "slowest tenth / fastest")
    sizes = Table(*names, *more, title=found["hardware"])
    for samples, row in found["by_samples"].items():
        figures = (row["open_s"], row["first_batch_s"], row["peak_mb"], row["of_it_before_mb"])
        times = [row["seek_ms"], row["longest_seek_ms"], row["seek_in_lanes_ms"]]
        times.append(row["slowest_tenth_over_fastest"])
        sizes.add_row(f"{int(samples):,}", *(f"{x:,.2f}" for x in (*figures, *times)))
    names = ("nodes", "times the set, in all", "most by one node", "rows of the index", "one lane")
    nodes = Table(*names, title=f"{LANES} lanes, two epochs, shards fetched")
    for count, row in found["by_nodes"].items():
        shares = ("fetched_in_all", "most_by_one_node", "rows_of_the_index_in_all", "without_lanes")
        nodes.add_row(count, *(f"{row[name]:.3f}" if name in row else "" for name in shares))
    for table in (sizes, nodes):
        Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=8, help="power of ten of the largest set")
    parser.add_argument("--nodes", type=int, default=64, help="of the largest cluster, at most 64")
    parser.add_argument("--json", action="store_true", help="print JSON in place of tables")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    found = {
        "hardware": hardware(),
        "by_samples": by_size(options.most),
        "by_nodes": by_nodes(options.nodes),
    }
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        show(found)


if __name__ == "__main__":
    main()
