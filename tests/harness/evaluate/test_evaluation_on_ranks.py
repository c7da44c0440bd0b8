"""An evaluation dealt out over ranks: answers, scores and verdict are those of one process."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

from harness import checkpoint as checkpoints
from harness.config.schema import Config
from harness.data.encode import encode_set
from harness.evaluate.passes import Passes
from harness.evaluate.run import evaluate_model
from harness.model.vlm import VisionLanguageModel
from plan_cases import changed
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


def bytes_of(image):
    """What is shown: pixels, or of features the file that they were made from."""
    return image.tobytes() if isinstance(image, Image.Image) else image or b""


def known(evaluation):
    """All that an evaluation says, but for how long it took."""

    predictions = [p.row() for result in evaluation.tasks.values() for p in result.predictions]
    shown = [
        [p.id, item.prediction, bytes_of(item.image).hex()]
        for p, item in zip(evaluation.shown, evaluation.shown_images, strict=True)
    ]
    return json.dumps(
        [
            timeless(evaluation.by_task()),
            predictions,
            shown,
            evaluation.images,
            evaluation.without_picture,
            evaluation.unreadable,
            evaluation.pixels,
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
    config = changed(config, bridge={"question_aware": question_aware})
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
@pytest.mark.parametrize(
    ("kind", "question_aware"), [("images", True), ("features", False)], ids=["images", "features"]
)
def test_sets_with_and_without_pictures_are_scored_by_two_ranks_as_by_one(
    world, tmp_path, monkeypatch, kind, question_aware
):
    config = changed(world[0], bridge={"question_aware": question_aware})
    words = range(50, 55)  # a set of texts alone: a batch without a picture for either rank
    alone = (1, 2, 3, 6, 9, 10, 13)
    paths = [
        str(make_shards(tmp_path / "mixed", 14, "mixed", unreadable=(4,), text_only=alone)),
        str(make_shards(tmp_path / "words", 5, "words", 50, text_only=words)),
    ]
    if kind == "features":
        encode_set(tmp_path / "mixed", tmp_path / "features", config.model.vision)
        paths[0] = str(tmp_path / "features")
    model = VisionLanguageModel.build(config).eval()
    batches = []  # rank, and which of the records have a picture
    read = Passes.read

    def watched(self, number, place):
        notes = read(self, number, place)
        batches.append((self.collected.dealer.rank, [bool(tasks) for *_, tasks in notes]))
        return notes

    def scored(dealer=None):
        own = copy.deepcopy(model) if dealer else model
        return evaluate_model(own, paths, config, floors=False, dealer=dealer)

    by_one = scored()
    assert (by_one.images, by_one.without_picture) == (6, len(alone) + len(words))
    monkeypatch.setattr(Passes, "read", watched)
    first, second = on_ranks(2, scored)
    assert second is None
    assert known(first) == known(by_one)
    assert {rank for rank, shown in batches if not any(shown)} == {0, 1}
    assert {rank for rank, shown in batches if any(shown) and not all(shown)} == {0, 1}


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
