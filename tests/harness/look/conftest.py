"""A run on features, shared by the tests of what is shown of it."""

import pytest

from harness.data.encode import encode_set
from harness.train import run as train
from toy_runs import make_config


@pytest.fixture(scope="package")
def look_root(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    import shutil

    folder = tmp_path_factory.mktemp("looks")
    shutil.copytree(tiny_clip_folder, folder / "clip")
    shutil.copytree(tiny_t5_folder, folder / "t5")
    return folder


@pytest.fixture(scope="package")
def features_run(look_root):
    """The config of a trained run on features, which lie in ROOT/features beside ROOT/train and
    ROOT/dev.
    """
    root = look_root
    config = make_config(root, root / "clip", root / "t5", max_steps=2)
    for split in ("train", "dev"):
        encode_set(root / split, root / "features" / split, config.model.vision)
    data = {
        "train": [{"path": str(root / "features/train")}],
        "dev": [{"path": str(root / "features/dev")}],
        "test": [{"path": str(root / "features/dev")}],
    }
    config = config.model_validate(config.model_dump() | {"data": config.data.model_dump() | data})
    train.run(config)
    return config
