"""A run from feature sets shows the pictures that its features were made from, everywhere."""

import base64
import io
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from harness.data.encode import encode_set
from harness.evaluate.run_on_disk import evaluate_run
from harness.train import run as train
from shards.manifest import Manifest
from toy_runs import make_config, picture


def pictures_in(page):
    """Returns the mean colour of each picture on a page."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)', page.read_text())
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]
    return [np.asarray(image).reshape(-1, 3).mean(axis=0) for image in images]


@pytest.fixture(scope="module")
def trained(root):
    """The config of a run on features, which lie in ROOT/features beside ROOT/train and /dev."""
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


def test_answers_and_evaluation_of_a_run_from_features_show_pictures_till_these_are_gone(
    trained, root, caplog
):
    dev = [Image.open(io.BytesIO(picture(n))) for n in range(100, 105)]
    colours = [np.asarray(image).reshape(-1, 3).mean(axis=0) for image in dev]
    page = trained.out_dir / "answers" / "step-000002.html"
    shown = pictures_in(page)
    assert len(shown) == 2
    for mean in shown:
        assert min(np.abs(known - mean).max() for known in colours) < 4
    assert "not at hand" not in page.read_text()
    evaluate_run(trained.out_dir)
    assert (trained.out_dir / "evaluation/predictions.png").is_file()
    (trained.out_dir / "evaluation/predictions.png").unlink()
    shutil.move(root / "dev", root / "away")
    try:
        evaluate_run(trained.out_dir)
        assert not (trained.out_dir / "evaluation/predictions.png").exists()
        assert caplog.text.count("the pictures that") == 1, "said once, not after every epoch"
    finally:
        shutil.move(root / "away", root / "dev")
    assert Manifest.open(root / "features/dev").origin_relative == "../../dev"
