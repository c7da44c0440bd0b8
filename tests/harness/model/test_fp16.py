"""fp16 as a T4 computes it, by the very scaler and loop of a GPU run, on a T5 whose feed-forward
exceeds fp16's range.

The CPU has fp16 autocast and the GradScaler too: only the choice of the precision, refused to users
there, is replaced.
"""

import json
import math
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from harness import checkpoint as checkpoints
from harness.data.collate import Collator
from harness.errors import GuardError
from harness.machine.precision import choose
from harness.model.vlm import VisionLanguageModel
from harness.plan.skeleton import Skeleton, weights
from harness.plan.workload import Sizes
from harness.train import engine as engines
from harness.train import prepare
from harness.train import run as train
from harness.train.engine import Engine
from harness.train.guards import first_nonfinite
from toy_runs import losses, make_config

T4 = replace(choose("auto", torch.device("cuda"), (7, 5)), device_type="cpu")
FP32 = choose("fp32", torch.device("cpu"))
LARGEST = torch.finfo(torch.float16).max
# Not `wo`: a LoRA matrix fed with values of 100,000 makes 16 steps chaotic. Two fp32 runs whose
# `wi` differ by 0.05%
# are 10% apart then, and nothing could be said of fp16.
TARGETS = ("q", "k", "v", "o", "wi_0", "wi_1")
STEPS = 16


@pytest.fixture(scope="module")
def overflowing_t5(tiny_t5_folder, tmp_path_factory):
    """`wi` x 100 makes the product before `wo` exceed fp16; `wo` / 1000 leaves a model that can
    still learn.
    """
    folder = shutil.copytree(tiny_t5_folder, tmp_path_factory.mktemp("fp16") / "t5")
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        weight *= 100.0 if ".wi_" in name else 1e-3 if ".wo." in name else 1.0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def config_of(tmp_path, tiny_clip_folder, overflowing_t5, monkeypatch):
    def make(name="run", precision=T4, targets=TARGETS, tuning="qlora", **settings):
        monkeypatch.setattr(engines, "choose", lambda *_: precision)
        config = make_config(
            tmp_path, tiny_clip_folder, overflowing_t5, name, False, **{"epochs": 4, **settings}
        )
        lora = config.model.lm.lora.model_copy(update={"targets": targets})
        lm = config.model.lm.model_copy(update={"lora": lora, "tuning": tuning})
        return config.model_copy(update={"model": config.model.model_copy(update={"lm": lm})})

    return make


def logged(config, name):
    rows = [
        json.loads(line) for line in (config.out_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return [
        float(row["values"][f"train/{name}"]) for row in rows if f"train/{name}" in row["values"]
    ]


def steps_taken(config) -> set[float]:
    """The optimizer's own count, over all that is trained: finite losses alone would not tell that
    something moved.
    """
    moments = checkpoints.newest(config.out_dir).optimizer()
    return {value.item() for name, value in moments.items() if name.startswith("step/")}


def scale_at_first(monkeypatch, scale: float) -> None:
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, init_scale=scale))


def when_built(monkeypatch, change) -> None:
    build = VisionLanguageModel.build

    def changed(*given, **named):
        model = build(*given, **named)
        change(model)
        return model

    monkeypatch.setattr(VisionLanguageModel, "build", changed)


def feed_forwards(model) -> dict:
    return {
        name: module for name, module in model.named_modules() if name.endswith("DenseReluDense")
    }


@pytest.mark.parametrize("tuning", ["qlora", "lora"])
def test_a_t5_that_overflows_fp16_learns_as_in_fp32(config_of, monkeypatch, tuning):
    whole = config_of("fp32", FP32, tuning=tuning)
    train.run(whole)
    peaks = []

    def watch(model):
        for part in feed_forwards(model).values():
            part.wo.register_forward_pre_hook(
                lambda _, given: peaks.append(given[0].abs().max().item())
            )

    when_built(monkeypatch, watch)
    config = config_of("fp16", tuning=tuning)
    train.run(config)
    assert max(peaks) > LARGEST, "this model does not overflow: the test says nothing"
    expected, found = losses(whole.out_dir), losses(config.out_dir)
    assert len(found) == STEPS
    assert found == pytest.approx(expected, rel=0.02)
    assert found[STEPS] < found[1] - 1
    assert found != expected, "nothing was computed in fp16"
    assert logged(config, "skipped_steps")[-1] == 0
    assert steps_taken(config) == {STEPS}
    assert (
        checkpoints.newest(config.out_dir).state["scaler"]["_growth_tracker"] == STEPS
    )  # in a row, the scaler says
    weights = load_file(checkpoints.newest(config.out_dir).model / "model.safetensors")
    assert all(weight.any() for name, weight in weights.items() if "lora_B" in name), (
        "LoRA's B starts as zeros"
    )


@pytest.mark.parametrize("tuning", ["lora", "frozen", "full"])
@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_frozen_base_on_a_t4_is_stored_in_fp16_but_for_what_overflows_and_so_planned(
    config_of, tiny_t5_folder, tiny_gpt2_folder, kind, tuning
):
    config = config_of(targets="all_linear", tuning=tuning)
    base = {"kind": kind, "id": str(tiny_t5_folder if kind == "t5" else tiny_gpt2_folder)}
    lm = config.model.lm.model_copy(update=base)
    config = config.model_copy(update={"model": config.model.model_copy(update={"lm": lm})})
    model = VisionLanguageModel.build(config, precision=T4)
    halved = {name for name, p in model.lm.named_parameters() if p.dtype == torch.float16}
    linear = {".wi_0", ".wi_1", ".q", ".k", ".v", ".o"} if kind == "t5" else {".c_attn", ".c_fc"}
    if tuning == "full":
        assert halved == set()
    else:
        assert all(any(f"{end}." in name for name in halved) for end in linear)
        kept = (".wo.", "lm_head", "norm", "ln_", "shared", "wte", "wpe", "lora_", "relative_")
        assert not [name for name in halved if any(part in name for part in kept)]
    skeleton = Skeleton(config, T4)
    assert weights(skeleton.model) == weights(model)
    passed = skeleton.run(Sizes(1, 1, 8, 4, 1.0), 2, checkpointing=False, gradients_held=False)
    assert set(passed.flops) == {"float16", "float32"}


def test_lora_on_wo_as_by_default_gets_the_gradient_of_fp32(config_of):
    configs = [
        config_of(name, kind, "all_linear", max_steps=1) for name, kind in (("a", FP32), ("b", T4))
    ]
    for config, precision in zip(configs, (FP32, T4), strict=True):
        config_of("again", precision)
        train.run(config)
    for name in ("loss", "grad_norm"):
        assert logged(configs[1], name) == pytest.approx(logged(configs[0], name), rel=2e-3)


def halve_wo(model):
    for part in feed_forwards(model).values():
        part.wo.half()


def whole_wo(model):
    for part in feed_forwards(model).values():
        part.wo.float()


@pytest.mark.parametrize(
    ("precision", "change"),
    [(replace(T4, lm=torch.float16), lambda model: None), (T4, halve_wo)],
    ids=["the language model under autocast", "wo in fp16"],
)
def test_any_other_policy_learns_nothing_and_the_run_stops(
    config_of, monkeypatch, precision, change
):
    when_built(monkeypatch, change)
    config = config_of(precision=precision, max_skipped_in_a_row=3)
    with pytest.raises(
        GuardError,
        match=r"3 steps in a row .* of the last one: the (input|output) of lm\.lm\..*\.wo",
    ):
        train.run(config)
    assert steps_taken(config) == set()


def test_an_overflow_on_purpose_is_counted_and_said_and_the_run_learns_on(
    config_of, monkeypatch, capfd
):
    scale_at_first(monkeypatch, 2.0**22)
    config = config_of()
    train.run(config)
    skipped = logged(config, "skipped_steps")
    count = int(skipped[-1])
    assert skipped[0] == 1
    assert 1 < count < STEPS / 2
    assert sum(math.isnan(norm) for norm in logged(config, "grad_norm")) == count
    assert steps_taken(config) == {STEPS - count}
    saved = checkpoints.newest(config.out_dir).state
    assert saved["train"]["skipped"] == count
    assert saved["scaler"]["scale"] == logged(config, "loss_scale")[-1] == 2.0 ** (22 - count)
    loss = losses(config.out_dir)
    assert loss[STEPS] < loss[1] - 1
    said = capfd.readouterr().err
    assert all(f"not finite, step skipped ({n} so far)" in said for n in range(1, count + 1))


def test_a_run_that_skips_every_step_stops(config_of, monkeypatch):
    scale_at_first(monkeypatch, 2.0**120)
    config = config_of(max_skipped_in_a_row=4)
    with pytest.raises(
        GuardError, match=r"4 steps in a row .* the gradient of .* \(loss scale 1\.66\d+e\+35\)"
    ):
        train.run(config)
    assert logged(config, "skipped_steps") == [1, 2, 3]


def test_the_engine_leaves_wo_norms_and_embeddings_in_fp32(config_of):
    config = config_of()
    engine = Engine(config.train)
    model = VisionLanguageModel.build(config, precision=engine.precision)
    prepared = engine.prepare(model)
    model.loss(first_batch(config, model)).sum.backward()
    for part in (prepared, model):
        whole = {
            name: parameter.dtype
            for name, parameter in part.named_parameters()
            if any(
                word in name
                for word in (
                    ".wo.",
                    "norm",
                    "shared",
                    "lm_head",
                    "relative_attention_bias",
                    "bridge.",
                )
            )
        }
        assert len(whole) > 20
        assert set(whole.values()) == {torch.float32}
    for language in (model.lm.t5.encoder, model.lm.t5.decoder):
        seen = {
            layer.compute_dtype for layer in language.modules() if hasattr(layer, "compute_dtype")
        }
        assert seen == {torch.float16}


# ---- what overflowed first -----------------------------------------------------------------------


def first_batch(config, model):
    loader = prepare.make_loader(config, None)
    return Collator(model.tokenizer, config.data, config.prompts, config.seed)(
        next(loader.iterate())[1]
    )


def diagnosed(config, precision=T4, change=lambda model: None, scale=1.0):
    model = VisionLanguageModel.build(config, precision=precision).train()
    change(model)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    found = first_nonfinite(model, first_batch(config, model), scale)
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(parameter.grad is None for parameter in model.parameters())
    return found


def poison(name):
    def change(model):
        model.get_parameter(name).data[0] = math.nan

    return change


def test_what_is_finite_is_not_blamed(config_of):
    assert diagnosed(config_of(), scale=2.0**16) is None


# Under autocast a frozen `wo` is stored in fp16, and T5 casts what it hands to `wo` to its dtype:
# the input overflows. To a `wo` in fp32 it hands fp32, and autocast's cast is inside the layer.
@pytest.mark.parametrize(
    ("changes", "change", "what", "module"),
    [
        ({"lm": torch.float16}, lambda model: None, "input", "wo"),
        ({"lm": torch.float16}, whole_wo, "output", "wo"),
        ({}, halve_wo, "input", "wo"),
        ({"lm_dtype": torch.float16}, lambda model: None, "input", "dropout"),
    ],
    ids=[
        "the language model under autocast",
        "under autocast, wo in fp32",
        "wo in fp16",
        "all but wo in fp16",
    ],
)
def test_the_first_place_that_overflows_is_named(config_of, changes, change, what, module):
    found = diagnosed(config_of(), replace(T4, **changes), change)
    assert found.startswith(f"the {what} of lm.")
    assert found.endswith(f"encoder.block.0.layer.1.DenseReluDense.{module}")


def test_what_is_broken_in_the_weights_is_named_first(config_of):
    assert (
        diagnosed(config_of(), change=poison("bridge.projection.gain_D"))
        == "the weight bridge.projection.gain_D"
    )


def test_a_loss_scale_that_is_too_large_is_told_by_a_gradient(config_of):
    assert diagnosed(config_of(), scale=2.0**120).startswith("the gradient of the output of lm.")
