"""Ten captions of a run as they are: five at random of the quarter that scores best, and five of
the quarter that scores worst, by CIDEr-D of each picture.

    python benchmarks/ten_captions.py RUN/evaluation/SET_captions.json DATA [--seed 0] [--json FILE]

DATA: the shards or features that were scored. Which ten depends on the seed alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

from harness.evaluate import captions
from harness.report.pictures import markdown_table
from shards.manifest import Manifest
from shards.read import Reader

OF_EACH = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("captions", type=Path, metavar="FILE", help="COCO's form of results")
    parser.add_argument("data", metavar="DATA", help="the shards or features that were scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the same is written")
    given = parser.parse_args()
    said = captions.read_caption_results(given.captions)
    references = references_of(given.data)
    rows = [
        {
            "CIDEr x 100": round(100 * points),
            "the model says": said[image],
            "a person has written": references[image][0],
            "image": image,
        }
        for image, points in chosen(said, references, given.seed)
    ]
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    print(markdown_table([list(row.values()) for row in rows], list(rows[0])))


def references_of(folder: str) -> dict[str, Sequence[str]]:
    """Returns the captions that people have written, by image id."""
    reader = Reader(Manifest.open(folder))
    records = (reader.read(index).known for index in range(reader.manifest.samples))
    return {str(record.image_id): record.texts[0].targets for record in records}


def chosen(
    said: Mapping[str, str], references: Mapping[str, Sequence[str]], seed: int
) -> list[tuple[str, float]]:
    """Returns ten images with their CIDEr-D, each five in falling order."""
    scores = captions.score(said, references)
    of_each = captions.figures(scores.sums_IK)["CIDEr"]
    points = dict(zip(scores.image_ids, of_each.tolist(), strict=True))
    ordered = sorted(points, key=lambda image: (-points[image], image))
    quarter = max(OF_EACH, len(ordered) // 4)
    drawn = random.Random(seed)
    best = drawn.sample(ordered[:quarter], OF_EACH)
    worst = drawn.sample(ordered[-quarter:], OF_EACH)
    return [
        (image, points[image])
        for part in (best, worst)
        for image in sorted(part, key=lambda image: (-points[image], image))
    ]


if __name__ == "__main__":
    main()
