"""The engine's one step: shares add up, what is not finite moves nothing, and state goes in and out
by name.
"""

import math
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

from harness.config.schema import BridgeConfig, TrainConfig
from harness.errors import ConfigError
from harness.model.bridge import Bridge
from harness.train import engine as engines
from harness.train import engines as wanted
from harness.train.engine import Engine
from harness.train.schedule import learning_rate
from harness.train.state import TrainState
from shards.stream import StreamState


@pytest.fixture(params=["plain", "loss scaler", "fused", "loss scaler and fused"])
def make_engine(request, monkeypatch):
    """Makes engines for the CPU, with a GradScaler and the fused AdamW of a GPU (which work there
    too) or without.
    """
    choose = engines.choose
    if "loss scaler" in request.param:
        monkeypatch.setattr(
            engines, "choose", lambda *given: replace(choose(*given), loss_scaler=True)
        )

    def make(**train) -> tuple[Engine, nn.Module]:
        engine = Engine(TrainConfig(**{"learning_rate": 0.1, **train}))
        assert engine.fused  # on a CPU too
        engine.fused = "fused" in request.param or None
        torch.manual_seed(0)
        return engine, engine.prepare(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)))

    return make


def take(engine, model, rows=((1.0, 2.0, 3.0), (-1.0, 0.5, 0.0)), factor=1.0, skip=False, rate=0.1):
    for index, row in enumerate(rows):
        with engine.micro_step(last=index == len(rows) - 1):
            engine.backward(model(torch.tensor([row])).sum() * factor / len(rows))
    assert engine.await_gradients(torch.tensor([2.0, 3.0])) == [2.0, 3.0]
    return engine.step(rate, skip=skip)


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        value.equal(other[name]) for name, value in one.items()
    )


@pytest.mark.parametrize(
    "bad", [{"factor": float("nan")}, {"factor": float("inf")}, {"skip": True}], ids=str
)
def test_a_skipped_step_moves_nothing_and_nothing_of_it_is_in_the_next(make_engine, bad):
    engine, model = make_engine()
    take(engine, model)
    before, moments = weights(model), engine.optimizer_state()
    assert take(engine, model, **bad) is None
    assert equal(weights(model), before)
    assert equal(engine.optimizer_state(), moments)
    assert all(parameter.grad is None for parameter in model.parameters())
    norm = take(engine, model)

    other, untouched = make_engine()
    take(other, untouched)
    assert take(other, untouched) == norm
    assert equal(weights(model), weights(untouched))


def test_a_loss_on_another_rank_skips_here_though_our_own_gradients_are_finite(make_engine):
    engine, model = make_engine()
    before = weights(model)
    assert take(engine, model, skip=True) is None
    assert equal(weights(model), before)
    assert engine.optimizer_state() == {}


def test_the_norm_is_that_before_clipping_and_the_step_is_that_after_it(make_engine):
    engine, model = make_engine(clip_norm=None)
    norm = take(engine, model, factor=50.0)
    clipped, other = make_engine(clip_norm=1e-4)
    seen = []
    clipped.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.clone() for p in other.parameters())
    )
    assert take(clipped, other, factor=50.0) == norm > 1
    assert torch.cat([grad.flatten() for grad in seen]).norm().item() == pytest.approx(
        1e-4, rel=1e-2
    )


def test_biases_are_not_decayed_and_every_step_takes_the_rate_it_is_given(make_engine):
    engine, model = make_engine(weight_decay=0.5)
    bias, weight = model[0].bias.clone(), model[0].weight.clone()
    take(engine, model, factor=0.0, rate=0.1)
    assert model[0].bias.equal(bias)
    assert torch.allclose(model[0].weight, weight * (1 - 0.1 * 0.5))
    assert {group["lr"] for group in engine.optimizer.param_groups} == {0.1}


@pytest.fixture
def bridge():
    torch.manual_seed(0)
    config = BridgeConfig(query_tokens=4, width=8, heads=2, layers=1)
    made = Bridge(config, patch_width=8, lm_width=8, patches=5, embedding_rms=1.0)
    made.projection.mean_QD.data.normal_()
    return nn.ModuleDict({"bridge": made})


def decayed(model, decays_queries):
    """The names of what a step without any gradient moves."""
    engine = Engine(TrainConfig(weight_decay=0.5))
    engine.prepare(model, decays_queries)
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    engine.await_gradients()
    engine.step(0.1)
    return {name for name, value in weights(model).items() if not value.equal(before[name])}


def test_query_tokens_and_per_token_means_are_not_decayed_and_all_other_matrices_are(bridge):
    matrices = {name for name, p in bridge.named_parameters() if p.ndim > 1}
    spared = {"bridge.body.query_tokens", "bridge.projection.mean_QD"}
    assert spared < matrices
    assert decayed(bridge, decays_queries=False) == matrices - spared


def test_a_run_begun_when_query_tokens_were_decayed_goes_on_so(bridge):
    state = TrainState(StreamState(3, 2, "digest"), step=7)
    today = asdict(state)
    assert TrainState.from_json(today) == state
    assert not state.decays_queries
    of_then = {name: value for name, value in today.items() if name != "decays_queries"}
    resumed = TrainState.from_json(of_then)
    assert TrainState.from_json(asdict(resumed)).decays_queries, "also when it is resumed again"
    matrices = {name for name, p in bridge.named_parameters() if p.ndim > 1}
    assert decayed(bridge, resumed.decays_queries) == matrices


def test_saved_moments_and_the_scaler_go_on_bit_for_bit(make_engine):
    engine, model = make_engine()
    take(engine, model)
    take(engine, model, factor=float("inf"))  # halves the scale
    saved, scaler, start = engine.optimizer_state(), engine.scaler_state(), weights(model)
    saved = {name: value.clone() for name, value in saved.items()}
    assert set(saved) == {
        f"{key}/{n}.{p}" for key in engines.MOMENTS for n in (0, 2) for p in ("weight", "bias")
    }
    take(engine, model)

    other, resumed = make_engine()
    resumed.load_state_dict(start)
    other.load_optimizer_state(saved)
    other.load_scaler_state(scaler)
    assert other.scaler_state() == scaler
    if scaler:
        assert scaler["scale"] == 2.0**15
    take(other, resumed)
    assert equal(weights(model), weights(resumed))
    assert equal(engine.optimizer_state(), other.optimizer_state())


@pytest.mark.parametrize("fused", [None, True])
def test_a_fused_optimizer_finds_its_step_beside_the_weights(fused):
    engine = Engine(TrainConfig())
    model = nn.Linear(2, 1, bias=False)
    engine.prepare(model)
    take(engine, model, rows=((1.0, 2.0),))
    saved = engine.optimizer_state()
    elsewhere = nn.Parameter(torch.empty(1, 2, device="meta"), requires_grad=True)
    engine.named = {"weight": elsewhere}
    engine.fused = fused
    engine.load_optimizer_state(saved)
    assert engine.optimizer.state[elsewhere]["step"].device.type == ("meta" if fused else "cpu")
    assert engine.optimizer.state[elsewhere]["exp_avg"].device.type == "meta"


def test_moments_of_another_model_are_refused_by_name():
    engine = Engine(TrainConfig())
    engine.prepare(nn.Linear(2, 1))
    with pytest.raises(ConfigError, match=r"exp_avg/bias and 4 more"):
        engine.load_optimizer_state({"exp_avg/weight": torch.zeros(1, 2)})
    engine.load_optimizer_state({})
    assert engine.optimizer_state() == {}


def test_a_launcher_that_started_fewer_processes_than_it_said_is_caught(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="asked for 2 processes but Accelerate runs 1"):
        Engine(TrainConfig())


def test_accelerate_that_started_one_process_in_place_of_two_and_said_nothing_is_caught(
    monkeypatch,
):
    """What `accelerate launch --cpu --num_processes 2` leaves in the environment."""
    for name, value in {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "ACCELERATE_MIXED_PRECISION": "no",
    }.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        ConfigError, match=r"has started one: take --config_file launch/accelerate/cpu\.yaml"
    ):
        wanted.make_engine(TrainConfig())
    monkeypatch.delenv("MASTER_PORT")
    assert type(wanted.make_engine(TrainConfig())) is Engine


def test_ranks_wait_for_one_that_saves_or_reads_longer_than_nccls_ten_minutes():
    assert Engine(TrainConfig()).accelerator.init_handler.timeout.total_seconds() >= 1800


def test_the_rate_warms_up_and_falls_along_a_cosine_to_its_end():
    config = TrainConfig(learning_rate=1.0, warmup=0.1, final_learning_rate=0.2)
    rates = [learning_rate(config, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert max(rates) == 1.0
    assert rates[55] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * 45 / 90)))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0.2 < rates[-1] < 0.201
    constant = config.model_copy(update={"schedule": "constant", "warmup": 0.0})
    assert {learning_rate(constant, step, 100) for step in (0, 50, 99)} == {1.0}


def test_a_step_whose_gradients_were_not_awaited_is_a_mistake_and_no_skipped_step(make_engine):
    engine, model = make_engine()
    take(engine, model)
    engine.backward(model(torch.ones(1, 3)).sum())
    with pytest.raises(AssertionError, match="await_gradients"):
        engine.step(0.1)
