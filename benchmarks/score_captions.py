"""How long `harness score captions` takes: captions drawn from a file, five references each,
figures with intervals.

    python benchmarks/score_captions.py --captions raw_captions.txt [--images 1000] [--turns 5]

A line of the file is a caption; what is scored is another line without its first word. In one
process and one thread; reading files and starting Python are not counted, tokenising is.
"""

from __future__ import annotations

import argparse
import platform
import random
import time
from pathlib import Path
from statistics import median

from harness.evaluate import captions, ptb
from harness.report.pictures import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=Path, required=True)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=5)
    given = parser.parse_args()
    lines, rng = given.captions.read_text(encoding="utf-8").splitlines(), random.Random(0)
    references = {str(i): rng.choices(lines, k=5) for i in range(given.images)}
    hypotheses = {image: " ".join(rng.choice(lines).split()[1:]) for image in references}
    texts = [text for of_image in references.values() for text in of_image] + list(
        hypotheses.values()
    )
    times: dict[str, list[float]] = {}
    for _ in range(given.turns):
        started = time.perf_counter()
        ptb.tokenise(texts)
        tokenised = time.perf_counter()
        scores = captions.score(hypotheses, references)
        scored = time.perf_counter()
        scores.with_intervals()
        ended = time.perf_counter()
        for name, seconds in (
            ("of which tokens", tokenised - started),
            ("figures", scored - tokenised),
            ("intervals", ended - scored),
            ("figures and intervals", ended - tokenised),
        ):
            times.setdefault(name, []).append(seconds)
    print(
        f"{platform.processor() or platform.machine()}, one process; {given.images:,} images, "
        f"{len(texts):,} captions\n"
    )
    print(
        markdown_table(
            [[n, f"{median(t):.2f}", f"{max(t):.2f}"] for n, t in times.items()],
            ["s", "median", "longest"],
        )
    )


if __name__ == "__main__":
    main()
