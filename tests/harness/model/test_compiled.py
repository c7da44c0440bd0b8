"""train.compile: losses and gradients as without, in few graphs, and nothing of it in a checkpoint.

torch's "aot_eager" traces as inductor does and compiles nothing; the long test takes inductor.
"""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from harness import checkpoint as checkpoints
from harness.data.collate import Collator
from harness.errors import ConfigError
from harness.machine.launch_file import read_launch
from harness.model import compiled
from harness.model.vlm import VisionLanguageModel
from harness.plan.plan import plan
from harness.train import run as train
from plan_cases import changed
from toy_batch import gradients, moved, outputs, pixel_batch, samples
from toy_runs import make_config


@pytest.fixture
def config(tmp_path, tiny_clip_folder, tiny_t5_folder):
    return make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, dev=False)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    torch._dynamo.reset()


def both(config):
    as_written = VisionLanguageModel.build(config)
    model = VisionLanguageModel.build(changed(config, train={"compile": True}))
    return moved(as_written), moved(model)


def check_alike(as_written, model):
    assert list(model.state_dict()) == list(as_written.state_dict())
    batch = pixel_batch(model)
    expected = gradients(as_written.train(), batch)
    found = gradients(model.train(), batch)
    assert model.compilations.count > 0
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    for name, gradient in expected[1].items():
        assert torch.allclose(found[1][name], gradient, rtol=1e-3, atol=1e-5), name
    count = model.compilations.count
    one, other = outputs(as_written, batch), outputs(model, batch)
    assert one[0].equal(other[0])
    assert one[2] == other[2]
    assert model.compilations.count == count, "an evaluation takes the forward as it is written"


def test_a_compiled_step_is_that_of_the_forward_as_it_is_written(config, backend):
    check_alike(*both(config))


@pytest.mark.long
def test_a_step_compiled_by_inductor_is_that_of_the_forward_as_it_is_written(config):
    torch._dynamo.reset()
    check_alike(*both(config))


@pytest.mark.slow
def test_other_sizes_of_a_batch_and_of_its_prompts_compile_little(config, backend):
    config = changed(config, bridge={"question_aware": True}, train={"compile": True})
    model = VisionLanguageModel.build(config).train()
    whole = pixel_batch(model)
    collate = Collator.of(config, model.tokenizer)
    assert Collator.of(config, model.tokenizer, training=False).prompt_multiple == 1
    seen = []
    for length in (3, 11, 14, 20):
        made = samples()
        for sample in made:
            sample.payload, sample.extension = whole.pixels_IHW3[0].numpy(), "jpg"
            texts = [replace(t, prompt="a " * length) for t in sample.record.texts if t.prompt]
            sample.record = replace(sample.record, texts=tuple(texts))
        for several in (made, made[:1]):
            batch = collate(several)
            assert batch.prompt_ids_CL.shape[1] % compiled.PROMPT_MULTIPLE == 0
            gradients(model, batch)
            seen.append(model.compilations.count)
    assert seen[-1] <= 8, seen
    assert seen[-1] == seen[-4], "the last lengths are known"


@pytest.mark.slow
def test_a_run_leaves_its_warm_up_out_of_the_rates_and_no_trace_in_its_checkpoint(
    config, backend, capfd
):
    config = changed(config, train={"compile": True, "epochs": 1, "save_every": 2, "max_steps": 2})
    train.run(config)
    said = capfd.readouterr().err
    assert "compiled, a warm-up of" in said
    saved = checkpoints.newest(config.out_dir)
    assert not [n for n in load_file(saved.model / "model.safetensors") if "_orig_mod" in n]
    rows = [json.loads(row) for row in (config.out_dir / "metrics.jsonl").read_text().splitlines()]
    first = next(row["values"] for row in rows if "train/loss" in row["values"])
    assert "train/images_per_second" not in first
    train.run(changed(config, train={"compile": False, "max_steps": 3}), resume="auto")
    assert checkpoints.newest(config.out_dir).state["train"]["step"] == 3


def test_what_cannot_be_compiled_is_said_in_one_sentence(config, monkeypatch):
    config = changed(config, train={"compile": True})
    refused = plan(config, "a100-80", read_launch("zero3_offload"), brief=True).refused
    assert refused.startswith("train.compile and ZeRO-3")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler \(no-such-compiler\)"):
        VisionLanguageModel.build(config)
