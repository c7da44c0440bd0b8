"""Scores copying a neighbour's caption by several feature sets: which encoder tells pictures apart
as captions do, before anything is trained on it.

    python benchmarks/neighbour_floor.py data/flickr8k_features data/flickr8k_lite2 [--split dev]

Each folder holds `train` and the split. The captions are those of `harness evaluate`'s neighbour
floor, and so are the scores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from harness.config.schema import Config
from harness.evaluate import captions
from harness.evaluate.gate_terms.neighbours import consensus_captions
from harness.evaluate.training_pictures import TrainingPictures, training_pictures
from harness.report.pictures import markdown_table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--split", default="dev", help="scored; train gives the neighbours")
    given = parser.parse_args()
    rows = []
    for folder in given.folders:
        neighbours = read(Path(folder) / "train")
        asked = read(Path(folder) / given.split)
        said = consensus_captions(
            np.stack(asked.features), np.stack(neighbours.features), neighbours.captions_N
        )
        found = captions.score(
            {str(row): caption for row, caption in enumerate(said)},
            {str(row): list(texts) for row, texts in enumerate(asked.captions_N)},
        ).with_intervals()
        shown = [found[name] for name in ("CIDEr", "Bleu_4")]
        rows.append([folder, *(f"{i.value:.3f} [{i.low:.3f}, {i.high:.3f}]" for i in shown)])
    print(markdown_table(rows, ["features", "CIDEr", "BLEU-4"]))


def read(folder: Path) -> TrainingPictures:
    """Returns mean-pooled features and captions as `harness evaluate` reads those of neighbours."""
    config = Config(name="floor", data={"train": [{"path": str(folder)}]})
    found = training_pictures(config, None, judged=())
    if isinstance(found, str):
        raise SystemExit(f"{folder}: {found}")
    return found


if __name__ == "__main__":
    main()
