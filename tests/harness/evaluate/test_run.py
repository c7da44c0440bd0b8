"""What an evaluation says of how its pixels were made."""

from contextlib import closing

import pytest

from harness.data.fast_resize import FastDecoder
from harness.data.images import ImageDecoder
from harness.evaluate.report import report_of
from harness.evaluate.run import passes_of
from harness.model.vlm import VisionLanguageModel
from plan_cases import changed
from toy_runs import make_config, make_shards


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    """A config that learns from reduced pictures, its model, a set of them and one of texts."""
    root = tmp_path_factory.mktemp("pixels")
    make_shards(root / "pictures", 2)
    make_shards(root / "words", 2, "words", 10, text_only=(10, 11))
    config = make_config(root, tiny_clip_folder, tiny_t5_folder, dev=False)
    config = changed(config, data={"resize": "reduced"})
    return root, config, VisionLanguageModel.build(config)


@pytest.mark.parametrize(
    ("name", "decode", "expected"),
    [
        ("pictures", None, "exact"),  # whatever training reads
        ("pictures", FastDecoder(32, "crop", 10**6), "fast"),
        ("pictures", FastDecoder(32, "crop", 10**6, reduced=True), "reduced"),
        ("pictures", ImageDecoder(1, "whole", 10**6), "whole"),
        ("pictures", lambda _: None, None),  # answers of a model elsewhere
        ("words", None, None),
    ],
)
def test_an_evaluation_says_which_way_its_pixels_were_made(world, name, decode, expected):
    root, config, model = world
    with closing(passes_of(model, [str(root / name)], config, decode=decode)) as passes:
        report = report_of(passes.collected.evaluation, [], "", None)
    assert report.get("pixels") == expected
    assert ("pixels" in report) == (expected is not None)
