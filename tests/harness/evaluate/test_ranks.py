"""An evaluation dealt out over ranks: answers, scores and verdict are those of one process."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch

from harness import checkpoint as checkpoints
from harness.config.schema import Config
from harness.evaluate.run import evaluate_model
from harness.model.vlm import VisionLanguageModel
from ranks_in_threads import on_ranks
from toy_runs import make_config, make_shards

SECONDS = ("seconds", "beside_seconds")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    """A config over pictures that the gate takes a part of, and a model that reads questions."""
    root = tmp_path_factory.mktemp("ranks")
    config = make_config(root, tiny_clip_folder, tiny_t5_folder, dev=False)
    paths = [
        str(make_shards(root / "a", 34, "a", unreadable=(7,))),
        str(make_shards(root / "b", 5, "b")),
    ]
    changes = {
        "generate": {"vqa": {"max_new_tokens": 2}, "caption": {"max_new_tokens": 4}},
        "evaluation": {
            "batch_images": 4,
            "counterfactual_texts": 120,
            "space_images": 6,
            "show_images": 6,
            "recall_images": 40,
            "bootstrap": 50,
        },
    }
    config = Config(**(config.model_dump(mode="json") | changes))
    return config, paths


def timeless(value):
    """What a report says, but for how long it took."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if not k.endswith(SECONDS)}
    return value


def known(evaluation):
    """All that an evaluation says, but for how long it took."""

    predictions = [p.row() for result in evaluation.tasks.values() for p in result.predictions]
    shown = [
        [p.id, item.prediction, item.image and item.image.tobytes().hex()]
        for p, item in zip(evaluation.shown, evaluation.shown_images, strict=True)
    ]
    return json.dumps(
        [
            timeless(evaluation.by_task()),
            predictions,
            shown,
            evaluation.images,
            evaluation.unreadable,
        ]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("question_aware", "sizes"), [(False, (3,)), (True, (2,))], ids=["with floors", "without"]
)
def test_answers_scores_and_verdict_are_the_same_for_one_two_and_three_ranks(
    world, monkeypatch, question_aware, sizes
):
    monkeypatch.setattr("harness.evaluate.floors.shallow_answers", lambda *_: None)  # no model's
    config, paths = world
    bridge = config.model.bridge.model_copy(update={"question_aware": question_aware})
    parts = config.model.model_copy(update={"bridge": bridge})
    config = config.model_copy(update={"model": parts})
    model = VisionLanguageModel.build(config).eval()

    def scored(dealer=None):
        own = copy.deepcopy(model) if dealer else model
        return evaluate_model(own, paths, config, floors=not question_aware, dealer=dealer)

    alone = known(scored())
    for size in sizes:
        first, *others = on_ranks(size, scored)
        assert known(first) == alone
        assert others == [None] * (size - 1)


@pytest.mark.slow
def test_a_run_is_scored_by_two_processes_as_by_one_and_only_the_first_writes_and_speaks(
    world, tmp_path
):
    config, paths = world
    config = config.model_copy(update={"out": str(tmp_path / "run")})
    model = VisionLanguageModel.build(config).eval()
    state = {"step": 3, "config": config.model_dump(mode="json"), "run_id": None}
    state["train"] = {"stream": {"epoch": 0, "position": 4}}
    checkpoints.write(config.out_dir, 3, model.save_pretrained, {"step/x": torch.zeros(1)}, state)
    asked = ["evaluate", config.out, "--limit", "8", "--override", "evaluation.space_images=0"]
    asked += [f"--data={path}" for path in paths]
    written = []
    for processes in (2, 1):
        command = [sys.executable, "-m", "harness", *asked, "--processes", str(processes), "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        report = json.loads(ended.stdout)  # one, of one process
        out = tmp_path / "run" / "evaluation"
        files = {
            path.name: path.read_bytes()
            for path in out.rglob("*.json")
            if path.name not in ("scores.json",)
        }
        written.append((timeless(report), files))
        assert ended.stderr.count("report:") == 1
        shutil.rmtree(out)
    assert written[0] == written[1]
    assert len(written[0][1]) == 4  # answers and captions of two sets
