"""Activation checkpointing keeps its gain: nothing is computed a third time, however many groups a
batch is decoded in, and compiled parts save no more.
"""

from collections import Counter

import pytest
import torch

from harness.data import collate
from harness.model import compiled
from harness.model.vlm import VisionLanguageModel
from plan_cases import changed, measured_saved
from toy_batch import furthest, gradients, moved, pixel_batch
from toy_runs import make_config


@pytest.fixture
def config(tmp_path, tiny_clip_folder, tiny_t5_folder, monkeypatch):
    monkeypatch.setattr(collate, "MIN_PADDING_SAVED", 4)
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()
    config = make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, dev=False)
    return changed(config, bridge={"layers": 2}, data={"texts_per_image": None})


def built(config, **train):
    return moved(VisionLanguageModel.build(changed(config, train=train)).train())


def test_a_part_runs_once_forward_and_once_more_backward_whatever_the_groups(config):
    model = built(config, activation_checkpointing=True)
    batch = pixel_batch(model)
    assert len(batch.groups) > 1
    runs = Counter()
    t5 = model.lm.base
    parts = {
        "vision": model.vision.network.encoder.layers[0],
        "bridge": model.bridge.body.qformer.encoder.layer[0],
        "encoder": t5.encoder.block[0].layer[0],
        "decoder": t5.decoder.block[0].layer[0],
    }
    for name, part in parts.items():
        part.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    found = gradients(model, batch)
    assert runs == {"vision": 1, "bridge": 2, "encoder": 2, "decoder": 2 * len(batch.groups)}
    runs.clear()
    kept = gradients(built(config), batch)
    assert found[0] == pytest.approx(kept[0], rel=1e-6)
    assert furthest(found[1], kept[1]) < 1e-4
    model.eval()
    model.loss(batch)
    assert runs["bridge"] == 1, "an evaluation keeps nothing and computes nothing again"


@pytest.mark.parametrize("compile", [False, True])
def test_far_less_is_saved_compiled_or_not(config, compile):
    kept = built(config)
    batch = pixel_batch(kept)
    model = built(config, activation_checkpointing=True, compile=compile)
    saved = measured_saved(model, batch)
    assert saved < 0.3 * measured_saved(kept, batch)
    if compile:
        assert model.compilations.count
    of_bridge = measured_saved(built(config), batch)
    model.checkpoints_bridge = False
    assert saved < measured_saved(model, batch) <= of_bridge
