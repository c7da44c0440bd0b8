"""The host does not wait for a GPU but where it must, and nothing lies on the wrong device; found
out without one.
"""

from collections import Counter
from contextlib import closing

import pytest
import torch

import toy_batch
from harness.config.schema import DecodingConfig, VisionConfig
from harness.data import collate as batches
from harness.evaluate.image_use.gate import exchanged
from harness.evaluate.predict import select
from harness.model.vision import load_vision
from harness.report.terminal import Terminal
from harness.tracking.tracker import JournalTracker
from harness.train.engine import Engine
from harness.train.prepare import build_model, make_loader
from harness.train.state import Run, TrainState
from harness.train.step import StepLog, StepTaker
from plan_cases import changed
from second_device import moved, second_device
from tiny_models import tiny_decoder
from toy_batch import BRIDGES, LANGUAGES
from toy_runs import make_config


@pytest.fixture
def made(tiny_t5_folder, tiny_gpt2_folder, tiny_clip_folder, monkeypatch, tmp_path):
    """A function: kinds of language model and bridge, images or features -> model and batch, in
    groups of like length.
    """
    monkeypatch.setattr(batches, "MIN_PADDING_SAVED", 30)

    def make(language: str, bridge: str, images: bool = False, **settings):
        folder = tiny_t5_folder if language == "t5" else tiny_gpt2_folder
        if language == "llama":
            folder = tiny_decoder(tmp_path, language)
        lm = LANGUAGES.get(language, {"kind": "decoder"}) | {"tuning": "lora"}
        model = toy_batch.model(folder, bridge=BRIDGES[bridge], **lm, **settings)
        batch = toy_batch.collator(model.tokenizer)(toy_batch.samples())
        if images:
            vision = VisionConfig(kind="clip", id=str(tiny_clip_folder), image_size=32, layer=-2)
            model.vision = load_vision(vision)
            batch = toy_batch.pixel_batch(model)
        assert len(batch.groups) == 2
        return model, batch.indexed()

    return make


@pytest.mark.parametrize(
    ("language", "bridge", "images"),
    [
        *(("t5", bridge, False) for bridge in BRIDGES),
        ("t5", "qformer", True),
        ("gpt2", "linear", False),
        ("llama", "qformer", False),
        ("gpt2 with cross-attention", "question-aware", False),
    ],
)
def test_a_micro_batch_is_learnt_from_and_evaluated_without_a_wait(made, language, bridge, images):
    model, batch = made(language, bridge, images)
    chosen = select(batch, [0, 2, 3])
    other_C = torch.tensor([1, 1, 1, 0, 0])
    with second_device() as waits:
        moved(model)
        there = batch.to("meta")
        model(there).sum.backward()
        assert not waits.places, Counter(waits.places)
        # as the evaluation and the gates do
        model.eval()
        with torch.no_grad():
            tokens = model.bridge_tokens(there)
            others = exchanged(model, there, tokens, other_C.to("meta", non_blocking=True))
            model.loss(there, tokens)
            model.loss(there, others)
            model.loss(chosen.to("meta"))
            if bridge != "linear":
                model.loss(there, tokens.without_tokens())
    assert not waits.places, Counter(waits.places)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert all(p.grad.device.type == "meta" for p in trained.values())


@pytest.mark.parametrize("bridge", BRIDGES)
def test_the_bridge_is_calibrated_without_a_wait(made, bridge):
    model, batch = made("t5", bridge)
    with second_device() as waits:
        moved(model)
        there = batch.to("meta")
        model.bridge.calibrate(*model.bridge_inputs(there, model.patch_tokens(there)))
    assert not waits.places, Counter(waits.places)


# what is answered to transformers ends its loop after one word
@pytest.mark.parametrize(("beams", "answer"), [(1, 1.0), (3, 0.0)])
@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_wait_where_transformers_asks_whether_all_have_ended_and_at_their_end(
    made, language, beams, answer
):
    model, batch = made(language, "qformer")
    model.eval()
    with second_device(answer) as waits:
        moved(model)
        model.generate(batch.to("meta"), DecodingConfig(max_new_tokens=3, beams=beams))
    ours = [where for where in waits.places if "in transformers/" not in where]
    assert ours == ["tolist in harness/model/language/interface.py:_answers"]
    assert waits.places


def test_a_step_waits_once_for_its_device_whatever_the_number_of_its_micro_batches(
    root, monkeypatch
):
    train = {"micro_batch": 1, "log_every": 1, "clip_norm": 1.0}
    config = make_config(root, root / "clip", root / "t5", dev=False, **train)
    config = changed(config, lm={"tuning": "lora"})
    engine = Engine(config.train)
    loader = make_loader(config, engine)
    model = build_model(config, precision=engine.precision).train()
    state = TrainState(loader.at(0, 0))
    run = Run(config, engine, model, model, loader, state, Terminal(False), JournalTracker())
    monkeypatch.setattr(Engine, "device", torch.device("meta"))
    taker = StepTaker(run, stop_asked=lambda: 0, save_due=lambda: False)
    with closing(taker.batches()) as shares:
        first, second = next(shares), next(shares)
    log = StepLog(run)
    with run.terminal.progress(2, 0), second_device(answer=0.0) as waits:
        engine.prepare(moved(model))
        # AdamW's own steps are counted on the host, where it is not fused
        monkeypatch.setattr(engine.optimizer, "step", lambda: None)
        for number, share in enumerate((first, second), 1):
            step = taker.take(*share)
            log.write(step, at_once=True)
            assert step.gradient_norm == 0.0
            assert waits.places == ["tolist in harness/train/engine.py:_read"] * number


def test_what_is_wrong_is_found(made):
    """As the loss once was: by masks, by a list made on the device, by a number asked for."""
    batch = made("t5", "qformer")[1]
    with second_device() as waits:
        there = batch.to("meta")
        there.labels_TL[:, 0][there.weight_TL[:, 0] != 0]
        torch.tensor([1, 2], device="meta")
        there.weight.item()
        batch.weight_TL.to("meta")
        there.weight_TL.cpu()
        assert [where.split(" in ")[0] for where in waits.places] == [
            "index.Tensor by a mask",
            "torch.tensor(..., device)",
            "_local_scalar_dense",
            "a copy to the device",
            "a copy to the host",
        ]
        with pytest.raises(RuntimeError, match="device"):
            there.weight_TL + torch.ones(1)
