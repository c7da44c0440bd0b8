"""A run without a dev set goes on, and says at its beginning and its end what that costs."""

import pytest

from harness.doctor import examine
from harness.errors import ConfigError
from harness.evaluate.run_on_disk import evaluate_run
from harness.train.run import run
from toy_runs import make_config

ASKED = {
    "max_steps": 2,
    "keep_best": "dev/CIDEr",
    "early_stop": {"metric": "dev/CIDEr", "patience": 1},
    "stop_if_image_ignored": True,
}


def test_without_a_dev_set_a_run_says_what_it_goes_without_and_gives_a_model(root, capfd):
    config = make_config(root, root / "clip", root / "t5", "nodev", dev=False, **ASKED)
    last = run(config)
    assert last.name == "step-000002"
    said = " ".join("".join(capfd.readouterr()).split())
    at_first, at_last = said.split("step 1/")
    for sentence in (
        "data.dev is empty: nothing is scored during training",
        "train.keep_best=dev/CIDEr has nothing to choose by",
        "train.early_stop.metric=dev/CIDEr is never measured",
        "train.stop_if_image_ignored has no verdict to stop at",
    ):
        assert sentence in at_first
        assert any(sentence in finding.found for finding in examine.sets_apart(config))
    assert "no verdict: nothing was scored" in at_last
    with pytest.raises(ConfigError, match=r"neither data\.test nor data\.dev"):
        evaluate_run(config.out_dir)
    scores = evaluate_run(config.out_dir, [str(root / "dev")])
    assert scores["tasks"]["caption"]["verdict"]


def test_without_a_test_set_the_dev_set_is_scored_and_that_is_said(root, capfd):
    config = make_config(root, root / "clip", root / "t5", "notest", max_steps=1)
    run(config)
    said = "".join(capfd.readouterr())
    assert "data.dev is empty" not in said
    assert "no verdict: nothing" not in said
    assert evaluate_run(config.out_dir)["data"] == [str(root / "dev")]
    assert "names no data.test, so that data.dev is scored" in capfd.readouterr().err
