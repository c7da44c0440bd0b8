"""What must hold in every run is noticed when it does not: frozen parts, and the gradient of every
trained one.
"""

import pytest
import torch
from torch import nn

from harness import checkpoint as checkpoints
from harness.errors import GuardError
from harness.model.bridge import Bridge
from harness.model.vision import VisionTower
from harness.train import run as train
from harness.train.guards import GradientGuard, check_frozen, frozen_hash
from toy_runs import make_config


def small() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model[0].weight.data.add_(1e-7),
        lambda model: model[1].running_mean.add_(1e-7),
        lambda model: model.train()(torch.randn(4, 2)),  # batch norm counts and averages
    ],
    ids=["parameter", "buffer", "forward in train mode"],
)
def test_any_change_of_what_is_frozen_is_noticed(change):
    model = small().eval()
    before = frozen_hash(model)
    model[2].weight.data.add_(1.0)
    check_frozen(model, before)
    change(model)
    with pytest.raises(GuardError, match="frozen parameter or buffer has changed"):
        check_frozen(model, before)


def test_a_trained_parameter_without_a_gradient_is_named():
    model = small()
    guard = GradientGuard(model)
    model[1](model[0](torch.randn(4, 2))).sum().backward()
    with pytest.raises(
        GuardError, match=r"2 of 4 trainable parameters got no gradient .* 2.weight"
    ):
        guard.check()


def test_a_gradient_that_is_not_finite_is_named_and_a_skipped_step_forgotten():
    model = small()
    guard = GradientGuard(model)
    (model(torch.randn(4, 2)).sum() * float("inf")).backward()
    guard.forget()
    model(torch.randn(4, 2)).sum().backward()
    guard.check()
    guard = GradientGuard(model)
    (model(torch.randn(4, 2)).sum() * float("nan")).backward()
    with pytest.raises(GuardError, match="not finite"):
        guard.check()


def test_the_hooks_are_gone_after_the_first_step_and_nothing_trainable_is_refused():
    model = small()
    guard = GradientGuard(model)
    model(torch.randn(4, 2)).sum().backward()
    guard.check()
    assert not any(parameter._backward_hooks for parameter in model.parameters())
    with pytest.raises(GuardError, match="nothing is trainable"):
        GradientGuard(model.requires_grad_(False))


@pytest.fixture
def config(tmp_path, tiny_clip_folder, tiny_t5_folder):
    return make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, save_every=1, dev=False)


def test_a_run_whose_bridge_gets_no_gradient_stops_after_its_first_step(config, monkeypatch):
    forward = Bridge.forward
    monkeypatch.setattr(
        Bridge, "forward", lambda self, patches_IPD: forward(self, patches_IPD).detach()
    )
    with pytest.raises(
        GuardError, match=r"got no gradient in the first step, the first of them bridge\."
    ):
        train.run(config)
    assert checkpoints.newest(config.out_dir) is None


def test_a_run_whose_encoder_changes_stops_after_its_first_step(config, monkeypatch):
    forward = VisionTower.forward

    def drifts(self, pixels_IHW3):
        self.mean_3.add_(1e-4)
        return forward(self, pixels_IHW3)

    monkeypatch.setattr(VisionTower, "forward", drifts)
    with pytest.raises(GuardError, match="has changed"):
        train.run(config)
    assert checkpoints.newest(config.out_dir) is None


def test_what_changes_later_is_noticed_at_the_end_before_it_is_saved(config, monkeypatch):
    forward, calls = VisionTower.forward, []

    def drifts(self, pixels_IHW3):
        calls.append(1)
        if len(calls) == 6:
            self.network.embeddings.class_embedding.data.add_(1e-4)
        return forward(self, pixels_IHW3)

    monkeypatch.setattr(VisionTower, "forward", drifts)
    with pytest.raises(GuardError, match="has changed"):
        train.run(config)
    assert checkpoints.newest(config.out_dir).step == 7
