"""Scores copying a neighbour's caption by several feature sets: which encoder tells pictures apart
as captions do, before anything is trained on it.

    python benchmarks/neighbour_floor.py data/flickr8k_features data/flickr8k_lite2 [--split dev]

Each folder holds `train` and the split. The captions are those of `harness evaluate`'s neighbour
floor, and so are the scores. Legend: I pictures, P patch tokens, D width of the encoder.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from harness.evaluate import captions
from harness.evaluate.gate_terms.neighbours import consensus_captions
from harness.report.pictures import markdown_table
from shards.features import read_features
from shards.manifest import Manifest
from shards.read import Reader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", metavar="FOLDER")
    parser.add_argument("--split", default="dev", help="scored; train gives the neighbours")
    given = parser.parse_args()
    rows = []
    for folder in given.folders:
        training_ID, texts, _ = read(Path(folder) / "train")
        asked_ID, references, keys = read(Path(folder) / given.split)
        said = consensus_captions(asked_ID, training_ID, texts)
        scores = captions.score(
            dict(zip(keys, said, strict=True)), dict(zip(keys, references, strict=True))
        ).with_intervals()
        rows.append(
            [folder]
            + [
                f"{scores[name].value:.3f} [{scores[name].low:.3f}, {scores[name].high:.3f}]"
                for name in ("CIDEr", "Bleu_4")
            ]
        )
    print(markdown_table(rows, ["features", "CIDEr", "BLEU-4"]))


def read(folder: Path) -> tuple[np.ndarray, list[list[str]], list[str]]:
    """Returns of a feature set: mean-pooled features_ID, captions and keys."""
    reader = Reader(Manifest.open(str(folder)))
    pooled = []
    texts = []
    keys = []
    for index in range(reader.manifest.samples):
        sample = reader.read(index)
        features_PD = read_features(sample.payload)
        pooled.append(features_PD.astype(np.float32).mean(axis=0))
        texts.append(list(sample.known.texts[0].targets))
        keys.append(sample.known.key)
    return np.stack(pooled), texts, keys


if __name__ == "__main__":
    main()
