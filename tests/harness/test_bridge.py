"""Bridges: patch tokens of any scale in, tokens of the language model's width and scale out."""

import pytest
import torch

from harness.config import Bridge as BridgeConfig
from harness.model.bridge import Bridge, BridgeOutput

KINDS = {"qformer": 4, "mean_pool": 1, "linear": 7}


def bridge(kind: str, **settings) -> Bridge:
    torch.manual_seed(0)
    small = {"query_tokens": 4, "layers": 2, "width": 32, "heads": 4}
    return Bridge(
        BridgeConfig(kind=kind, **(small | settings)), patch_width=24, lm_width=64, patches=7, embedding_rms=9.5
    )


@pytest.mark.parametrize(("kind", "tokens"), KINDS.items())
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_calibrated_tokens_are_centred_and_have_the_scale_of_the_lms_embeddings(kind, tokens, scale):
    made = bridge(kind)
    # Channels of very different size, and much that all images have in common, as CLIP's inner layers have.
    patches_IPD = scale * (torch.randn(16, 7, 24) * torch.logspace(-2, 1, 24) + 3 * torch.randn(24))
    made.calibrate(patches_IPD)
    out_IQD = made(patches_IPD)
    assert out_IQD.shape == (16, tokens, 64)
    assert out_IQD.pow(2).mean().sqrt().item() == pytest.approx(9.5, rel=1e-3)
    assert out_IQD.mean(dim=0).abs().max() < 1e-3 * 9.5
    normed_IPD = made.patch_norm(patches_IPD)
    assert normed_IPD.mean(dim=(0, 1)).abs().max() < 1e-2
    assert normed_IPD.std(dim=(0, 1)).median().item() == pytest.approx(1, rel=1e-2)


def test_calibration_on_one_image_scales_and_keeps_what_it_says():
    made = bridge("qformer")
    patches_1PD = torch.randn(1, 7, 24)
    made.calibrate(patches_1PD)
    out_1QD = made(patches_1PD)
    assert out_1QD.isfinite().all()
    assert out_1QD.pow(2).mean().sqrt().item() == pytest.approx(9.5, rel=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_gets_a_gradient_and_each_image_only_its_own(kind):
    made = bridge(kind)
    patches_IPD = torch.randn(3, 7, 24, requires_grad=True)
    (made(patches_IPD)[1] * torch.randn(64)).sum().backward()
    assert [n for n, p in made.named_parameters() if p.grad is None] == []
    moved_I = patches_IPD.grad.abs().sum(dim=(1, 2)) > 0
    assert moved_I.tolist() == [False, True, False]


def test_the_queries_look_at_the_image_in_every_nth_layer():
    every, second = bridge("qformer", layers=4), bridge("qformer", layers=4, cross_attention_frequency=2)

    def looking(made: Bridge) -> list[int]:
        layers = made.body.qformer.encoder.layer
        return [at for at, layer in enumerate(layers) if layer.has_cross_attention]

    assert looking(every) == [0, 1, 2, 3]
    assert looking(second) == [0, 2]
    second(torch.randn(2, 7, 24)).pow(3).sum().backward()
    assert [n for n, p in second.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("queries", [1, 16, 64])
def test_as_many_tokens_as_queries(queries):
    assert bridge("qformer", query_tokens=queries)(torch.randn(2, 7, 24)).shape == (2, queries, 64)


def test_a_bridge_that_is_not_trained_is_frozen_whole():
    assert not any(p.requires_grad for p in bridge("qformer", trainable=False).parameters())
    assert all(p.requires_grad for p in bridge("qformer").parameters())


def test_counterfactual_tokens_are_other_rows_or_none_and_leave_the_true_ones_alone():
    true = BridgeOutput(torch.randn(2, 4, 8), torch.tensor([0, 0, 1]))
    shuffled, none = true.with_rows(torch.tensor([1, 1, 0])), true.without_tokens()
    assert shuffled.tokens_NQD is true.tokens_NQD
    assert shuffled.token_row_of_C.tolist() == [1, 1, 0]
    assert none.tokens_NQD.shape == (2, 0, 8)
    assert true.token_row_of_C.tolist() == [0, 0, 1]
