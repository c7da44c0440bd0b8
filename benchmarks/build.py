"""How much faster `harness shards build` is with several workers than with one.

    python benchmarks/build.py --images photos --captions Flickr8k.token.txt [--copies 40]
        [--short-side 224] [--workers 1 2] [--turns 3] [--json FILE]

Builds the same set with each number of workers in turn, `turns` times over, and checks that the
shards are equal byte for byte. `copies` puts each image in that often, under another name: of
Flickr8k in its original size few images are at hand. What counts is the time of a whole build, from
the official files to shards on the disk; starting Python is not in it. Other processes of the
machine are told by the load before and after, and by the share of a core that they took.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

import psutil

from harness.report.pictures import markdown_table
from shards.build import build
from shards.manifest import Manifest


def copied(images: Path, captions: Path, copies: int, folder: Path) -> dict[str, Path]:
    """Links every image `copies` times under another name; returns the options of a build."""
    of_image: dict[str, list[str]] = {}
    for line in captions.read_text(encoding="utf-8").splitlines():
        name, _, rest = line.partition("#")
        of_image.setdefault(name, []).append(rest)
    (folder / "images").mkdir()
    lines = []
    for path in sorted(images.iterdir()):
        for n in range(copies if path.name in of_image else 0):
            name = f"{n}_{path.name}"
            os.symlink(path.resolve(), folder / "images" / name)
            lines += [f"{name}#{rest}\n" for rest in of_image[path.name]]
    (folder / "token.txt").write_text("".join(lines), encoding="utf-8")
    return {"images": folder / "images", "captions": folder / "token.txt"}


def timed(out: Path, workers: int, short_side: int | None, options: dict[str, Path]) -> dict:
    """Builds once; gives its seconds, those of all its processors, and the set's digest."""
    busy = psutil.cpu_times()
    used = _processor_seconds()
    started = time.perf_counter()
    summary = build("flickr8k", out, workers=workers, short_side=short_side, **options)
    seconds = time.perf_counter() - started
    own = _processor_seconds() - used
    now = psutil.cpu_times()
    all_of_it = sum(getattr(now, name) - getattr(busy, name) for name in ("user", "nice", "system"))
    digest = Manifest.open(out / "train").digest
    shutil.rmtree(out)
    return {
        "workers": workers,
        "seconds": seconds,
        "processor_seconds": own,
        "cores_taken_by_others": max(0.0, all_of_it - own) / seconds,
        "images": summary.total("records"),
        "digest": digest,
    }


def _processor_seconds() -> float:
    own = resource.getrusage(resource.RUSAGE_SELF)
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--short-side", type=int)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        options = copied(given.images, given.captions, given.copies, Path(folder))
        runs = [
            timed(Path(folder) / "out", workers, given.short_side, options)
            for _ in range(given.turns)
            for workers in given.workers
        ]
    if len({run["digest"] for run in runs}) != 1:
        raise SystemExit("the shards depend on the number of workers")
    of_one = [run["seconds"] for run in runs if run["workers"] == given.workers[0]]
    rows = []
    for workers in given.workers:
        own = [run for run in runs if run["workers"] == workers]
        seconds = [run["seconds"] for run in own]
        rows.append(
            [
                f"{workers}",
                f"{median(seconds):.2f}",
                f"{min(seconds):.2f}",
                f"{own[0]['images'] / median(seconds):,.0f}",
                f"{median(run['processor_seconds'] for run in own):.2f}",
                f"{median(run['cores_taken_by_others'] for run in own):.2f}",
                f"{median(of_one) / median(seconds):.2f}",
                f"{min(of_one) / min(seconds):.2f}",
            ]
        )
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load_before": load_before,
        "load_after": os.getloadavg()[0],
    }
    print(
        f"{machine['processor']}, {machine['cores']} cores, load {load_before:.1f} before and "
        f"{machine['load_after']:.1f} after; {runs[0]['images']:,} images, {given.turns} turns\n"
    )
    names = ["workers", "s, median", "s, least", "images/s", "processor s", "cores of others"]
    print(markdown_table(rows, [*names, "times as fast", "of the least"]))
    if given.json:
        report = {"machine": machine, "short_side": given.short_side, "runs": runs}
        given.json.write_text(json.dumps(report, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
