"""Small generated image files, standing for those of the official sets, which are not ours to hand
out.
"""

import hashlib
import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

OFFICIAL = Path(__file__).resolve().parent.parent / "data"
FLICKR8K = OFFICIAL / "flickr8k"
FLICKR8K_IMAGES = (
    "1000268201_693b08cb0e.jpg",
    "1155138244_859fd6e079.jpg",
    "1859726819_9a793b3b44.jpg",
    "2090545563_a4e66ec76b.jpg",
    "2428275562_4bde2bc5ea.jpg",
    "3385593926_d3e9c21170.jpg",
)


def encoded(image: Image.Image, form: str = "JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def picture(name: str, width: int = 24, height: int = 16) -> bytes:
    """A JPEG of its own for every name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    coarse = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return encoded(
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), quality=90
    )


def fill(folder: Path, names) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(name))
    return folder


def make_tar(path, files, tar_format=tarfile.USTAR_FORMAT):
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path.parent
