"""Fine-tunes EfficientNet-Lite on the words of the training pictures' captions: an encoder for
`model.vision.weights`, which is frozen from then on.

    python benchmarks/encoder_of_words.py --train data/flickr8k/train --dev data/flickr8k/dev \
        --kind efficientnet_lite0 --image-size 224 --epochs 4 --out data/models/lite0_words

First the head alone, on the features as they are; then all of the network but the statistics of its
batch norms (as Kumar et al. 2022 advise: a head that starts at random distorts what lies below it).
The target of a word is the share of the picture's captions that say it; the loss its cross-entropy,
summed over words. No picture outside --train teaches; those of --dev are counted after each epoch
only. Broken off and typed again, it goes on after the last whole epoch, with an optimizer anew.

Legend: B pictures of a batch, S pixels, W words, D width of the features, I pictures.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from sklearn.metrics import average_precision_score
from torch import nn
from torch.nn import functional

from harness.config.schema import VisionConfig
from harness.data.images import ImageDecoder
from harness.evaluate.ptb import tokenise
from harness.model.vision.load import load_vision
from harness.model.vision.tower import VisionTower
from shards.manifest import Manifest
from shards.read import Reader

MAX_PIXELS = 50_000_000
SHIFT = 16  # pixels that a training picture is moved at most, its border repeated


@dataclass
class Pictures:
    pixels_ISS3: torch.Tensor  # uint8
    shares_IW: torch.Tensor  # of the captions that say the word


def main() -> None:
    given = arguments()
    torch.manual_seed(given.seed)
    config = VisionConfig(kind=given.kind, image_size=given.image_size)
    tower = load_vision(config)
    train_pixels, train_said = read(given.train, config)
    dev_pixels, dev_said = read(given.dev, config)
    words = common_words(train_said, given.pictures_a_word)
    print(f"{len(words):,} words in at least {given.pictures_a_word} training pictures", flush=True)
    train = Pictures(train_pixels, shares(train_said, words))
    dev = Pictures(dev_pixels, shares(dev_said, words))
    head = nn.Linear(tower.width, len(words))
    folder = Path(given.out)
    folder.mkdir(parents=True, exist_ok=True)
    done = goes_on(folder, tower, head)
    if not done:
        train_head(head, pooled(tower, train), train.shares_IW)
        print(f"head alone: {told(tower, head, dev)}", flush=True)
    learning = [*trainable(tower), *head.parameters()]
    optimizer = torch.optim.AdamW(learning, given.learning_rate, weight_decay=given.weight_decay)
    for epoch in range(done, given.epochs):
        started = time.perf_counter()
        train_epoch(tower, head, optimizer, train, given, epoch)
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}, {seconds:,.0f} s: {told(tower, head, dev)}", flush=True)
        save(folder, tower, head, words, given, epoch + 1)
    print(
        f"{folder / 'model.safetensors'} on {platform.machine()}, {torch.get_num_threads()} threads"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", required=True, metavar="DIR", help="shards with captions")
    parser.add_argument("--dev", required=True, metavar="DIR", help="shards to be counted on")
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--kind", default="efficientnet_lite0")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--pictures-a-word", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def read(folder: str, config: VisionConfig) -> tuple[torch.Tensor, list[list[set[str]]]]:
    """Returns uint8 pixels_ISS3, and for each picture the words of each of its captions, as the
    scorers cut them.
    """
    reader = Reader(Manifest.open(folder))
    decode = ImageDecoder.of(config, MAX_PIXELS)
    pixels = []
    said = []
    for index in range(reader.manifest.samples):
        sample = reader.read(index)
        pixels.append(decode(sample))
        said.append([set(text.split()) for text in tokenise(sample.known.texts[0].targets)])
    return torch.from_numpy(np.stack(pixels)), said


def common_words(said: list[list[set[str]]], pictures_a_word: int) -> list[str]:
    """Returns the W words that captions of so many pictures hold, most common first."""
    counts: Counter[str] = Counter()
    for captions in said:
        counts.update(sorted(set.union(*captions)))
    return [word for word, count in counts.most_common() if count >= pictures_a_word]


def shares(said: list[list[set[str]]], words: list[str]) -> torch.Tensor:
    """Returns shares_IW of each picture's captions that say a word."""
    place = {word: index for index, word in enumerate(words)}
    shares_IW = torch.zeros(len(said), len(words))
    for index, captions in enumerate(said):
        for caption in captions:
            for word in caption & place.keys():
                shares_IW[index, place[word]] += 1 / len(captions)
    return shares_IW


def trainable(tower: VisionTower) -> list[nn.Parameter]:
    """Returns the encoder's parameters, ready to be trained; the tower stays in eval mode, so its
    batch norms keep the statistics of ImageNet.
    """
    parameters = list(tower.network.parameters())
    for parameter in parameters:
        parameter.requires_grad_(True)
    return parameters


def features(tower: VisionTower, pixels_BSS3: torch.Tensor) -> torch.Tensor:
    """Returns pooled features_BD, with gradients, which the tower's own forward never has."""
    normed = (pixels_BSS3.float() * tower.scale - tower.mean_3) / tower.std_3
    return tower.network(normed.permute(0, 3, 1, 2)).mean(dim=1)


@torch.no_grad()
def pooled(tower: VisionTower, of: Pictures) -> torch.Tensor:
    return torch.cat([features(tower, pixels) for pixels in of.pixels_ISS3.split(32)])


def loss_of(logits_BW: torch.Tensor, shares_BW: torch.Tensor) -> torch.Tensor:
    """Returns the cross-entropy of every word, summed over words, mean over pictures."""
    return functional.binary_cross_entropy_with_logits(logits_BW, shares_BW, reduction="sum") / len(
        logits_BW
    )


def train_head(head: nn.Linear, features_ID: torch.Tensor, shares_IW: torch.Tensor) -> None:
    """Trains the head on features that stay as they are; each word starts at its own share."""
    nn.init.zeros_(head.weight)
    with torch.no_grad():
        head.bias.copy_(torch.logit(shares_IW.mean(dim=0), eps=1e-6))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.1)
    for _ in range(10):
        for rows in torch.randperm(len(features_ID)).split(64):
            optimizer.zero_grad()
            loss_of(head(features_ID[rows]), shares_IW[rows]).backward()
            optimizer.step()


def train_epoch(
    tower: VisionTower,
    head: nn.Linear,
    optimizer: torch.optim.Optimizer,
    train: Pictures,
    given: argparse.Namespace,
    epoch: int,
) -> None:
    """Passes once over the pictures, each mirrored by chance and moved a little; the learning rate
    falls along a cosine over all epochs.
    """
    draw = torch.Generator().manual_seed(given.seed + 1000 * epoch)
    batches = torch.randperm(len(train.pixels_ISS3), generator=draw).split(given.batch)
    for number, rows in enumerate(batches):
        share = (epoch + number / len(batches)) / given.epochs
        (group,) = optimizer.param_groups
        group["lr"] = given.learning_rate * (1 + math.cos(math.pi * share)) / 2
        optimizer.zero_grad()
        pixels_BSS3 = changed(train.pixels_ISS3[rows], draw)
        features_BD = functional.dropout(features(tower, pixels_BSS3), 0.2)
        loss = loss_of(head(features_BD), train.shares_IW[rows])
        loss.backward()
        nn.utils.clip_grad_norm_(group["params"], 10.0)
        optimizer.step()
        if number % 20 == 0:
            print(f"  {number}/{len(batches)} loss {loss.item():.2f}", flush=True)


def changed(pixels_BSS3: torch.Tensor, draw: torch.Generator) -> torch.Tensor:
    """Returns the pictures, each mirrored by chance and moved by up to SHIFT pixels each way."""
    side = pixels_BSS3.shape[1]
    made = []
    for pixels_SS3 in pixels_BSS3:
        flip, down, right = torch.rand(3, generator=draw).tolist()
        wide_3SS = pixels_SS3.permute(2, 0, 1)[None].float()
        wide_3SS = functional.pad(wide_3SS, (SHIFT,) * 4, mode="replicate")[0]
        top = int(down * (2 * SHIFT + 1))
        left = int(right * (2 * SHIFT + 1))
        part_3SS = wide_3SS[:, top : top + side, left : left + side]
        made.append(part_3SS.flip(-1) if flip < 0.5 else part_3SS)
    return torch.stack(made).permute(0, 2, 3, 1)


@torch.no_grad()
def told(tower: VisionTower, head: nn.Linear, dev: Pictures) -> str:
    """Returns what dev says: the loss, beside that of always saying each word's own share, and the
    mean average precision of the words over pictures.
    """
    logits_IW = head(pooled(tower, dev))
    blind = torch.logit(dev.shares_IW.mean(dim=0), eps=1e-6).expand_as(logits_IW)
    said_IW = dev.shares_IW > 0
    said_W = said_IW.any(dim=0)  # a word that dev never says has no precision
    precision = average_precision_score(said_IW[:, said_W], logits_IW[:, said_W])
    return (
        f"dev loss {loss_of(logits_IW, dev.shares_IW):.3f} (blind "
        f"{loss_of(blind, dev.shares_IW):.3f}), mean average precision {precision:.4f}"
    )


def goes_on(folder: Path, tower: VisionTower, head: nn.Linear) -> int:
    """Loads the last whole epoch, if there is one, and returns how many there were."""
    if not (folder / "made.json").exists():
        return 0
    tower.network.network.load_state_dict(load_file(folder / "model.safetensors"))
    head.load_state_dict(load_file(folder / "head.safetensors"))
    return int(json.loads((folder / "made.json").read_text())["epochs_done"])


def save(
    folder: Path,
    tower: VisionTower,
    head: nn.Linear,
    words: list[str],
    given: argparse.Namespace,
    done: int,
) -> None:
    save_file(
        {name: tensor.contiguous() for name, tensor in tower.network.network.state_dict().items()},
        folder / "model.safetensors",
    )
    save_file(head.state_dict(), folder / "head.safetensors")
    made = {"epochs_done": done, "words": words, "given": vars(given)}
    (folder / "made.json").write_text(json.dumps(made, indent=2))


if __name__ == "__main__":
    main()
