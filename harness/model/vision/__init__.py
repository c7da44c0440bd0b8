"""The frozen image encoder: tower.py what it is, load.py which kinds there are."""

from harness.model.vision.load import load_vision
from harness.model.vision.tower import VisionTower, content_hash

__all__ = ["VisionTower", "content_hash", "load_vision"]
