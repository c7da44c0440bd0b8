"""Products on a CPU, LoRA's and the loss's own forward passes: equal to the plain ones within
rounding.
"""

import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from transformers.activations import NewGELUActivation

import toy_batch
from harness.model import products
from harness.model.language import lora, loss
from harness.model.language.loss import Kept, weighted_loss

CLOSE = 1e-5  # of the largest value


def far(one, other) -> float:
    return ((one - other).abs().max() / other.abs().max()).item()


@pytest.fixture
def always(monkeypatch):
    """Every product by oneDNN, whatever its size and whatever processor this is."""
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "LEAST_PRODUCT", 0)


def test_a_linear_layer_gives_the_results_and_gradients_of_fp32_and_leaves_no_switch_behind(always):
    before = torch.get_float32_matmul_precision()
    torch.manual_seed(0)
    plain = nn.Linear(96, 40).double()
    own = nn.Sequential(nn.Linear(96, 40))
    own[0].load_state_dict(plain.state_dict())
    products.use_products(own)
    assert type(own[0]) is products.Linear
    x = torch.randn(3, 17, 96, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    weights = torch.randn(3, 17, 40)
    for made, entered in ((own(x), x), (plain(exact), exact)):
        (made * weights).sum().backward()
        assert entered.grad is not None
    assert far(own(x).double(), plain(exact)) < CLOSE
    assert far(x.grad.double(), exact.grad) < CLOSE
    for name, parameter in own[0].named_parameters():
        assert far(parameter.grad.double(), plain.get_parameter(name).grad) < CLOSE, name
    assert torch.get_float32_matmul_precision() == before


def test_products_of_several_threads_leave_no_switch_behind(always):
    before = torch.get_float32_matmul_precision()
    first, second = threading.Barrier(2, timeout=60), threading.Barrier(2, timeout=60)

    def one_that_ends_first():
        with products._LOWERED:
            first.wait()
        second.wait()

    thread = threading.Thread(target=one_that_ends_first)
    thread.start()
    with products._LOWERED:
        first.wait()
        second.wait()
        assert torch.get_float32_matmul_precision() == "medium"
    thread.join()
    assert torch.get_float32_matmul_precision() == before


def test_a_frozen_layer_keeps_no_input_and_gets_no_gradient(always):
    layer = products.Linear(8, 4).requires_grad_(False)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        layer(torch.randn(5, 8, requires_grad=True)).sum().backward()
    assert kept == [(4, 8)]


def test_small_products_and_other_processors_stay_as_they_are(monkeypatch):
    layer = products.Linear(64, 32)
    x = torch.randn(7, 64)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    monkeypatch.setattr(products, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(products, "LEAST_PRODUCT", 0)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("tuning", ["lora", "qlora"])
def test_lora_gives_the_loss_and_the_gradients_of_peft(tiny_t5_folder, tuning, monkeypatch, always):
    model = toy_batch.model(tiny_t5_folder, tuning=tuning)
    batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
    fused = [m for m in model.modules() if isinstance(m, lora._Fused)]
    assert len(fused) > 20
    calls = []
    plain = lora.is_plain
    monkeypatch.setattr(lora, "is_plain", lambda *t: (calls.append(len(t)) or True) and plain(*t))
    own_loss, own = toy_batch.gradients(model, batch)
    assert calls.count(3) > 20  # it was not peft's own
    monkeypatch.setattr(lora._Fused, "_one_adapter", lambda self: None)
    calls.clear()
    pefts_loss, pefts = toy_batch.gradients(model, batch)
    assert not calls.count(3)
    assert own_loss == pytest.approx(pefts_loss, rel=CLOSE)
    assert toy_batch.furthest(own, pefts) < CLOSE


def test_what_is_more_than_plain_lora_is_left_to_peft(tiny_t5_folder):
    model = toy_batch.model(tiny_t5_folder, tuning="lora")
    batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
    with torch.no_grad():
        with_lora = model.loss(batch).sum
        with model.lm.lm.disable_adapter():
            without = model.loss(batch).sum
    assert abs(with_lora - without) > 1e-3
    dropping = toy_batch.model(
        tiny_t5_folder, tuning="lora", lora={"r": 4, "alpha": 8, "dropout": 0.5}
    )
    torch.manual_seed(1)
    first = dropping.loss(batch).sum
    assert dropping.loss(batch).sum != first  # another mask
    assert dropping.eval().loss(batch).sum == dropping.loss(batch).sum


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "most", "chunks"), [(3, 16, 4), (1000, 16, 1), (1, 2, 2)])
def test_the_loss_in_chunks_is_the_loss_and_logits_are_never_whole(
    monkeypatch, smoothing, rows, most, chunks
):
    monkeypatch.setattr(loss, "ROWS_ON_CPU", rows)
    monkeypatch.setattr(loss, "MOST_CHUNKS", most)
    batch = toy_batch_of_ten()
    torch.manual_seed(0)
    head = nn.Linear(16, 50).requires_grad_(False)
    seen = []
    head.register_forward_hook(lambda module, given, made: seen.append(len(made)))
    results = []
    for trains_head in (False, True):
        hidden = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(0))
        hidden.requires_grad_()
        seen.clear()
        ((rows_T, part),) = batch.target_groups(True)
        kept_KD = hidden.flatten(0, 1).index_select(0, rows_T.kept_K)
        out = weighted_loss(
            [Kept(rows_T, part, kept_KD)],
            batch,
            head,
            smoothing,
            whole=False,
            trains_head=trains_head,
        )
        (out.sum / out.weight).backward()
        assert trains_head or (len(seen) == chunks and max(seen) <= max(rows, 10 / chunks))
        results.append((out.sum.detach(), out.sum_T, hidden.grad))
    for own, plain in zip(*results, strict=True):
        assert far(own, plain) < CLOSE


def toy_batch_of_ten():
    """A batch of four targets of up to five tokens, ten of which count, one double."""
    labels = torch.arange(20).reshape(4, 5)
    weight = torch.zeros(4, 5)
    for row, length in enumerate((4, 1, 3, 2)):
        weight[row, :length] = 1.0
    weight[0, 0] = 2.0
    none = torch.zeros(4, 0, dtype=torch.long)
    return toy_batch.Batch(
        prompt_ids_CL=none,
        prompt_mask_CL=none.bool(),
        image_of_C=torch.zeros(4, dtype=torch.long),
        labels_TL=labels,
        weight_TL=weight,
        context_of_T=torch.arange(4),
    )


def test_gelu_as_one_kernel_is_that_of_t5(tiny_t5_folder):
    model = toy_batch.model(tiny_t5_folder, tuning="lora")
    acts = [module.act for module in model.lm.base.modules() if hasattr(module, "act")]
    x = torch.linspace(-6, 6, 1001)
    theirs = NewGELUActivation()
    for act in acts:
        assert 0 < (act(x) - theirs(x)).abs().max() < 1e-6  # another kernel, the same function
        assert torch.equal(act(x.half()), theirs(x.half()))
    assert acts
