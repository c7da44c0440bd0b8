"""A run from feature sets shows the pictures that its features were made from, everywhere."""

import base64
import io
import re
import shutil

import numpy as np
from PIL import Image

from harness.evaluate.run_on_disk import evaluate_run
from shards import origin
from shards.manifest import Manifest
from toy_runs import picture


def pictures_in(page):
    """Returns the mean colour of each picture on a page."""
    found = re.findall(r'src="data:image/jpeg;base64,([^"]+)', page.read_text())
    images = [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]
    return [np.asarray(image).reshape(-1, 3).mean(axis=0) for image in images]


def test_answers_and_evaluation_of_a_run_from_features_show_pictures_till_these_are_gone(
    features_run, look_root, caplog
):
    dev = [Image.open(io.BytesIO(picture(n))) for n in range(100, 105)]
    colours = [np.asarray(image).reshape(-1, 3).mean(axis=0) for image in dev]
    page = features_run.out_dir / "answers" / "step-000002.html"
    shown = pictures_in(page)
    assert len(shown) == 2
    for mean in shown:
        assert min(np.abs(known - mean).max() for known in colours) < 4
    assert "not at hand" not in page.read_text()
    evaluate_run(features_run.out_dir)
    assert (features_run.out_dir / "evaluation/predictions.png").is_file()
    (features_run.out_dir / "evaluation/predictions.png").unlink()
    shutil.move(look_root / "dev", look_root / "away")
    origin._warn.cache_clear()
    try:
        evaluate_run(features_run.out_dir)
        assert not (features_run.out_dir / "evaluation/predictions.png").exists()
        assert caplog.text.count("the pictures that") == 1, "said once, not after every epoch"
    finally:
        shutil.move(look_root / "away", look_root / "dev")
    assert Manifest.open(look_root / "features/dev").origin_relative == "../../dev"
