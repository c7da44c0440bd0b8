"""DeepSpeed ZeRO on two processes, started once by the shipped launch file: every stage learns what
one process learns, a skipped step leaves nothing behind, and a checkpoint of any engine is gone on
from by any other.
"""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from rank_program import NotFinite, SamplesRead
from tiny_models import tiny_decoder
from toy_runs import losses, make_config
from zero_rank_program import tuned

pytest.importorskip("deepspeed", reason="deepspeed is not installed")

from harness import checkpoint as checkpoints
from harness.config import schema
from harness.config.load import dump
from harness.errors import ConfigError
from harness.machine.launch_file import read_launch
from harness.machine.launcher import launch
from harness.train import run as train
from harness.train import zero

CPU = {"device": "cpu", "pin_memory": True}
SPLIT = {
    "stage3_param_persistence_threshold": 0,
    "stage3_max_reuse_distance": 0,
}  # else nothing so small is split
STAGES = {
    "zero-0": {"stage": 0},
    "zero-1": {"stage": 1},
    "zero-2": {"stage": 2},
    "zero-3": {"stage": 3, **SPLIT},
    "zero-2-offload": {"stage": 2, "offload_optimizer": CPU},
    "zero-3-offload": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU, **SPLIT},
}
LONG = {
    "epochs": 5,
    "dev": False,
    "save_every": 100,
    "evaluate_every": 100,
}  # 20 steps of 4, 4, 4 and 2 images
HALF = {**LONG, "max_steps": 10}
SKIPPED = {"epochs": 2, "dev": False, "save_every": 100, "evaluate_every": 100}
IN_BF16 = {**SKIPPED, "precision": "bf16"}
BAD = [2, 5]


def plan():
    """Returns the runs of the launched processes, in order."""

    def run(name, zero, settings=LONG, tuning="qlora", resume=None, not_finite=()):
        return dict(locals())

    runs = [run(name, settings) for name, settings in STAGES.items()]
    runs += [run(f"skipped-{name}", STAGES[name], SKIPPED, not_finite=BAD) for name in STAGES]
    runs += [
        run("lora-2", STAGES["zero-2"], SKIPPED, "lora"),
        run("full-3", STAGES["zero-3"], SKIPPED, "full"),
        run("decoder-2", STAGES["zero-2"], SKIPPED, "decoder"),
        run("bf16-3", STAGES["zero-3"], IN_BF16, "lora"),
        run("checkpointed-3", STAGES["zero-3"], {**LONG, "activation_checkpointing": True}),
    ]
    runs += [
        run("from-zero-3", STAGES["zero-3"], HALF),
        run("from-ddp", STAGES["zero-2"], LONG, resume="auto"),
    ]
    runs += [
        run("from-zero-2", STAGES["zero-2"], HALF),
        run("from-zero-2", STAGES["zero-3-offload"], resume="auto"),
    ]
    return [*runs, run("observed", STAGES["zero-3"], {"epochs": 1, "save_every": 100})]


def config_of(root, name, tuning="qlora", **settings):
    return tuned(make_config(root, root / "clip", root / "t5", name, **settings), tuning)


@pytest.fixture(scope="module")
def alone(root):
    """Trains on one process the 20 steps that all others must equal; tells what it read."""
    read = SamplesRead()
    train.run(config_of(root, "alone", **LONG), observers=[read])
    return SimpleNamespace(losses=losses(root / "alone"), samples=read.steps)


@pytest.fixture(scope="module")
def ranks(root, alone):
    """Returns what both processes tell of their runs; DDP on two begins one to go on with."""
    (root / "plan.json").write_text(json.dumps(plan()))
    tiny_decoder(root / "decoder", "qwen2")
    (root / "from-ddp.yaml").write_text(dump(config_of(root, "from-ddp", **HALF)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2] / "support"))
        launch([str(root / "from-ddp.yaml")], 2, launch_file=read_launch("cpu"))
        launch([str(root)], 2, launch_file=read_launch("zero2"), module="zero_rank_program")
    return [json.loads((root / f"{rank}.json").read_text()) for rank in (0, 1)]


def equal(found, expected, rel):
    assert list(found) == list(expected)
    assert list(found.values()) == pytest.approx(list(expected.values()), rel=rel, nan_ok=True)


@pytest.mark.parametrize("name", STAGES)
def test_every_stage_learns_what_one_process_learns(root, alone, ranks, name):
    """20 steps, 4-bit base, micro-batches of unequal size, an uneven share of the last step of an
    epoch.
    """
    assert len(alone.losses) == 20
    equal(losses(root / name), alone.losses, 1e-4)


@pytest.mark.parametrize("name", STAGES)
def test_the_engine_is_the_one_that_was_asked_for_and_casts_nothing(ranks, name):
    for told in ranks:
        assert told[name]["engine"] == [
            "DeepSpeedEngine",
            f"DeepSpeed ZeRO {STAGES[name]['stage']}",
            2,
        ]
        assert told[name]["dtypes"] == ["torch.float32"]
        assert told[name]["partitioned"] == (STAGES[name]["stage"] == 3)


@pytest.mark.parametrize("name", STAGES)
def test_every_sample_is_read_once_an_epoch_by_one_rank(ranks, alone, name):
    parts = zip(*(told[name]["samples"] for told in ranks), strict=True)
    assert [sorted(one + other) for one, other in parts] == [sorted(step) for step in alone.samples]
    assert sorted(itertools.chain(*alone.samples[:4])) == [f"{n:04d}" for n in range(14)]


@pytest.mark.parametrize("name", STAGES)
def test_a_step_skipped_for_one_rank_is_skipped_by_all_and_leaves_nothing_behind(root, ranks, name):
    if not (root / "skipped-alone").exists():
        train.run(config_of(root, "skipped-alone", **SKIPPED), observers=[NotFinite(set(BAD))])
    equal(losses(root / f"skipped-{name}"), losses(root / "skipped-alone"), 1e-5)
    assert checkpoints.newest(root / f"skipped-{name}").state["train"]["skipped"] == 2


@pytest.mark.parametrize(
    ("name", "tuning"), [("lora-2", "lora"), ("full-3", "full"), ("decoder-2", "decoder")]
)
def test_the_other_tunings_learn_alike_too(root, ranks, name, tuning):
    train.run(config_of(root, f"alone-{tuning}", tuning, **SKIPPED))
    equal(losses(root / name), losses(root / f"alone-{tuning}"), 1e-4)


def test_activations_computed_again_find_partitioned_weights(root, alone, ranks):
    equal(losses(root / "checkpointed-3"), alone.losses, 1e-4)


def test_frozen_weights_in_bf16_beside_trained_ones_in_fp32_are_partitioned_too(root, ranks):
    """Rounded to bf16, sums over other groups of rows differ by about 1e-3."""
    train.run(config_of(root, "alone-bf16", "lora", **IN_BF16))
    equal(losses(root / "bf16-3"), losses(root / "alone-bf16"), 5e-3)


def test_the_learning_rate_is_that_of_the_step_whatever_the_world_size(root, ranks):
    """A scheduler that Accelerate prepares would run ahead, by the number of processes."""

    def rates(name):
        rows = [
            json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()
        ]
        return [
            row["values"]["train/learning_rate"]
            for row in rows
            if "train/learning_rate" in row["values"]
        ]

    assert rates("zero-2") == rates("zero-3") == rates("alone")
    assert len(set(rates("alone"))) > 15


@pytest.mark.parametrize("name", ["alone", *STAGES])
def test_a_checkpoint_holds_what_is_trained_and_nothing_of_the_base(root, ranks, name):
    place = checkpoints.place(root / name, 20)
    weights, moments = (
        load_file(place / "model" / "model.safetensors"),
        load_file(place / checkpoints.OPTIMIZER),
    )
    expected = load_file(checkpoints.place(root / "alone", 20) / "model" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all("lora_" in weight or weight.startswith("bridge.") for weight in weights)
    assert {weight: value.shape for weight, value in weights.items()} == {
        w: v.shape for w, v in expected.items()
    }
    for weight, value in weights.items():
        # A bias of keys moves no attention: its gradient is rounding, which Adam blows up to steps
        # of full size.
        assert weight.endswith("key.bias") or torch.allclose(value, expected[weight], atol=2e-4), (
            weight
        )
        assert moments[f"exp_avg/{weight}"].shape == value.shape
        assert moments[f"step/{weight}"] == 20


def test_a_run_begun_by_zero_3_on_two_processes_goes_on_by_one_without_deepspeed(
    root, alone, ranks
):
    read = SamplesRead()
    train.run(config_of(root, "from-zero-3", **LONG), "auto", [read])
    equal(losses(root / "from-zero-3"), alone.losses, 1e-5)
    assert read.steps == alone.samples[10:]


@pytest.mark.parametrize("name", ["from-ddp", "from-zero-2"])
def test_a_run_goes_on_by_another_engine_on_the_same_samples(root, alone, ranks, name):
    """Begun by DDP, gone on with by ZeRO-2; by ZeRO-2, and by ZeRO-3 with offload; each on two
    processes.
    """
    equal(losses(root / name), alone.losses, 1e-5)
    parts = zip(*(told[name]["samples"] for told in ranks), strict=True)
    assert [sorted(one + other) for one, other in parts] == [
        sorted(step) for step in alone.samples[10:]
    ]


def test_a_partitioned_model_is_evaluated_whole_and_trains_on(root, ranks):
    train.run(config_of(root, "observed-alone", epochs=1, save_every=100))
    equal(losses(root / "observed"), losses(root / "observed-alone"), 1e-5)

    def scores(name):
        rows = [
            json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()
        ]
        return {
            row["step"]: row["values"]["dev/vqa/loss"]
            for row in rows
            if "dev/vqa/loss" in row["values"]
        }

    assert list(scores("observed")) == [3, 4]
    equal(scores("observed"), scores("observed-alone"), 1e-4)


# ---- refused, in this process --------------------------------------------------------------------


def engine_of(monkeypatch, tmp_path, settings, **environment):
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(settings))
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return zero.ZeroEngine(schema.TrainConfig())


@pytest.mark.parametrize("engine", ["fp16", "bf16", "torch_autocast"])
def test_an_engine_that_casts_the_whole_model_is_refused(monkeypatch, tmp_path, engine):
    with pytest.raises(ConfigError, match=f"{engine} casts the whole model"):
        engine_of(
            monkeypatch, tmp_path, {engine: {"enabled": True}, "zero_optimization": {"stage": 2}}
        )


def test_the_variable_that_turns_zero_into_plain_ddp_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ConfigError, match="gives plain DDP in silence"):
        engine_of(
            monkeypatch, tmp_path, {"zero_optimization": {"stage": 2}}, ACCELERATE_USE_CPU="true"
        )


def test_plain_ddp_in_place_of_zero_is_noticed(monkeypatch, tmp_path):
    ddp = SimpleNamespace(distributed_type=SimpleNamespace(value="MULTI_GPU"))
    monkeypatch.setattr(zero, "Accelerator", lambda **_: ddp)
    with pytest.raises(ConfigError, match="DeepSpeed was asked for but Accelerate runs MULTI_GPU"):
        engine_of(monkeypatch, tmp_path, {"zero_optimization": {"stage": 2}})


def test_fp16_with_deepspeed_is_refused_and_ddp_named_as_the_way(monkeypatch):
    monkeypatch.setattr(
        zero.Engine, "__init__", lambda self, train: vars(self).update(precision=train)
    )
    with pytest.raises(ConfigError, match=r"launch/accelerate/multi_gpu\.yaml"):
        zero.ZeroEngine(SimpleNamespace(loss_scaler=True, reason="fp16"))


def test_an_older_deepspeed_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("deepspeed.__version__", "0.18.2")
    with pytest.raises(ConfigError, match=r"deepspeed 0\.18\.2 is too old"):
        engine_of(monkeypatch, tmp_path, {"zero_optimization": {"stage": 2}})
