"""Official files of known sets, and your own, -> Source: records by split, where their images are,
what was left out.

Each `load` takes the options of `harness shards build` by their names, with `_` for `-`.
"""

from collections.abc import Callable

from shards.sources import coco_captions, easy_vqa, flickr8k, hf, image_folder, karpathy, vqav2
from shards.sources.source import Item, Skipped, Source

SOURCES: dict[str, Callable[..., Source]] = {
    "flickr8k": flickr8k.load,  # token.txt or captions.txt, split files, folder or zip
    "vqav2": vqav2.load,  # official questions and annotations, COCO images
    "coco-captions": coco_captions.load,  # official captions_*.json
    "karpathy": karpathy.load,  # dataset_*.json of Flickr8k, Flickr30k, COCO
    "easy-vqa": easy_vqa.load,  # from the package, nothing to give
    "image-folder": image_folder.load,  # your own images and a JSONL
    "hf": hf.load,  # the package `datasets`: hub, parquet, folder
}

__all__ = ["SOURCES", "Item", "Skipped", "Source"]
