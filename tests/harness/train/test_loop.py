"""The loop: one global batch is one step however it is cut, bad steps are skipped, and the user
sees what goes on.
"""

import gc
import io
import json
import math
import re
import shutil
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import harness
from harness import checkpoint as checkpoints
from harness.config.known_mistakes import KnownMistakesConfig
from harness.config.load import dump
from harness.data.collate import Collator
from harness.errors import ConfigError, GuardError
from harness.model.vlm import VisionLanguageModel
from harness.report import terminal as terminals
from harness.report.pictures import Shown
from harness.report.terminal import Terminal
from harness.train import between_steps, prepare
from harness.train import engine as engines
from harness.train import run as train
from harness.train.__main__ import main
from harness.train.clock import Clock
from harness.train.state import Observer
from plan_cases import changed
from rank_program import NotFinite, with_scaler
from shards.record import Record
from shards.write import write_shards
from toy_runs import losses, make_config, make_shards, picture, texts

PROJECTION = "bridge.projection.linear.weight"


@pytest.fixture
def config_of(tmp_path, tiny_clip_folder, tiny_t5_folder):
    def make(name="run", dev=False, **settings):
        return make_config(tmp_path, tiny_clip_folder, tiny_t5_folder, name, dev, **settings)

    return make


def lines(out, name):
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: float(row["values"][name]) for row in rows if name in row["values"]}


def test_image_tokens_begin_at_a_wrong_scale_where_that_is_asked_for(config_of):
    gains = []
    for scale in ("right", "twentyfold"):
        mistakes = KnownMistakesConfig(image_token_scale=scale)
        config = config_of().model_copy(update={"known_mistakes": mistakes})
        model = prepare.build_model(config)
        prepare.calibrate(model, config)
        gains.append(model.bridge.projection.gain_D)
    torch.testing.assert_close(gains[1], 20 * gains[0])


def test_the_loss_of_a_step_is_the_sum_over_the_global_batch_by_its_weight_however_it_is_cut(
    config_of,
):
    runs = {}
    for size in (1, 3, 4):
        config = config_of(f"micro-{size}", micro_batch=size, max_steps=3)
        train.run(config)
        runs[size] = list(losses(config.out_dir).values())
    assert runs[1] == pytest.approx(runs[4], rel=1e-5)
    assert runs[3] == pytest.approx(runs[4], rel=1e-5)

    engine = engines.Engine(config.train)
    loader = prepare.make_loader(config, engine)
    _, samples = next(loader.iterate(epochs=1))
    model = VisionLanguageModel.build(config).train()
    prepare.calibrate(model, config)
    collate = Collator(model.tokenizer, config.data, config.prompts, config.seed)
    parts = [model.loss(collate([sample])) for sample in samples]
    weights = [part.weight.item() for part in parts]
    right = sum(part.sum.item() for part in parts) / sum(weights)
    averaged = sum(part.sum.item() / part.weight.item() for part in parts) / len(parts)
    assert len(set(weights)) > 1
    assert runs[3][0] == pytest.approx(right, rel=1e-5)
    assert averaged != pytest.approx(
        right, rel=1e-5
    )  # an average of averages would fail the line above


def test_the_bridge_starts_from_32_images_at_most_in_micro_batches_whatever_the_global_batch(
    config_of, tmp_path
):
    config = config_of(global_batch=64, micro_batch=4)
    shards = str(make_shards(tmp_path / "many", 48))
    config = changed(config, data={"train": [{"path": shards}]})
    model = VisionLanguageModel.build(config)
    encoded, calibrated = [], []
    patch_tokens, calibrate = model.patch_tokens, model.bridge.calibrate

    def encode(batch):
        encoded.append(batch.images)
        return patch_tokens(batch)

    def start(patches_IPD, *prompts):
        calibrated.append(len(patches_IPD))
        calibrate(patches_IPD, *prompts)

    model.patch_tokens, model.bridge.calibrate = encode, start
    prepare.calibrate(model, config)
    assert encoded == [4] * 8
    assert calibrated == [32]


class FirstGradient(Observer):
    """Keeps the gradient of the bridge's projection in the first step, and its samples."""

    def batches_made(self, run, samples, batches):
        self.samples = samples

    def step_taken(self, run, step):
        moments = run.engine.optimizer_state()
        self.loss = step.loss
        self.gradient = moments[f"exp_avg/{PROJECTION}"] / (1 - run.config.train.betas[0])


def test_a_sets_loss_weight_is_its_tasks_share_of_loss_and_gradient(config_of, tmp_path):
    sets = [
        {"path": str(make_shards(tmp_path / "captions", 8, questions=False))},
        {"path": str(make_shards(tmp_path / "questions", 8, captions=False))},
    ]
    seen = {}
    for weight in (1.0, 0.1):
        sets[0]["loss_weight"] = weight
        settings = {"clip_norm": None, "max_steps": 1, "global_batch": 8}
        config = changed(config_of(f"weight-{weight}", **settings), data={"train": sets})
        seen[weight] = FirstGradient()
        train.run(config, observers=[seen[weight]])

    model = VisionLanguageModel.build(config).train()
    prepare.calibrate(model, config)
    collate = Collator.of(config, model.tokenizer)
    nats, weights, gradients = [], [], []
    for place in range(2):
        batch = collate([sample for sample in seen[1.0].samples if sample.set_index == place])
        out = model.loss(batch)
        (gradient,) = torch.autograd.grad(out.sum, model.get_parameter(PROJECTION))
        nats.append(out.sum.item())
        weights.append(out.weight.item())
        gradients.append(gradient)
    assert weights[0] > 3 * weights[1], "captions outweigh answers"
    for weight, first in seen.items():
        whole = weight * weights[0] + weights[1]
        assert first.loss == pytest.approx((weight * nats[0] + nats[1]) / whole, rel=1e-5)
        right = (weight * gradients[0] + gradients[1]) / whole
        assert torch.allclose(first.gradient, right, rtol=1e-3, atol=1e-6)


def test_the_rate_the_counts_and_the_speed_are_logged_and_the_loss_falls(config_of):
    config = config_of(epochs=4)
    runs = []

    class Keeps(Observer):
        def step_taken(self, run, step):
            runs.append(run)

    train.run(config, observers=[Keeps()])
    loss = losses(config.out_dir)
    assert loss[16] < loss[1] - 1
    assert all(seconds > 0 for seconds in runs[0].clock.spent.values()), runs[0].clock.spent
    assert lines(config.out_dir, "train/learning_rate")[16] < 1e-4
    for name in (
        "images_per_second",
        "targets_per_second",
        "memory_mb",
        "grad_norm",
        "image_token_rms",
    ):
        assert lines(config.out_dir, f"train/{name}")[1] > 0
    assert 0 <= lines(config.out_dir, "train/data_wait")[1] <= 1
    assert lines(config.out_dir, "train/truncated_texts")[16] == 0


def test_steps_that_are_not_finite_are_skipped_and_many_in_a_row_end_the_run(config_of, capfd):
    config = config_of(max_skipped_in_a_row=3)
    with pytest.raises(
        GuardError, match=r"3 steps in a row .* last good checkpoint is .*step-000006"
    ):
        train.run(config, observers=[NotFinite({1, 4, 5, 6})])
    skipped = lines(config.out_dir, "train/skipped_steps")
    assert [skipped[step] for step in (1, 2, 3, 4, 5, 6)] == [0, 1, 1, 1, 2, 3]
    assert math.isnan(lines(config.out_dir, "train/grad_norm")[2])
    good = checkpoints.newest(config.out_dir)
    assert good.state["train"]["skipped_in_a_row"] == 2
    moments = good.optimizer()
    assert {moments[name].item() for name in moments if name.startswith("step/")} == {3.0}
    assert all(value.isfinite().all() for value in moments.values())
    assert "step 2: loss or gradient not finite, step skipped (1 so far)" in capfd.readouterr().err


def test_an_overflow_halves_the_loss_scale_which_a_resumed_run_takes_over(config_of, monkeypatch):
    with_scaler(monkeypatch.setattr)
    scaler = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *a, **k: scaler(*a, **k, growth_interval=3))
    # The first step too: the gradient guard waits for one that counts.
    bad = {0, 4}
    whole = config_of("whole")
    train.run(whole, observers=[NotFinite(bad)])
    assert checkpoints.newest(whole.out_dir).state["scaler"]["scale"] == 2.0**16
    cut = config_of("cut", max_steps=5)
    train.run(cut, observers=[NotFinite(bad)])
    assert checkpoints.newest(cut.out_dir).state["scaler"]["scale"] == 2.0**15
    train.run(config_of("cut"), "auto", [NotFinite(bad)])
    assert [str(loss) for loss in losses(cut.out_dir).values()] == [
        str(loss) for loss in losses(whole.out_dir).values()
    ]
    assert (
        checkpoints.newest(cut.out_dir).state["scaler"]
        == checkpoints.newest(whole.out_dir).state["scaler"]
    )


def test_memory_does_not_grow_with_the_number_of_steps(config_of):
    config = config_of(epochs=40, global_batch=14, micro_batch=14, save_every=1000, log_every=5)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"dev": ()})}
    )  # evaluated every epoch
    package = str(Path(harness.__file__).parent)
    ours = [
        tracemalloc.Filter(True, f"{folder}/*")
        for folder in (package, package.replace("harness", "shards"))
    ]
    held = {}

    class Memory(Observer):
        def step_taken(self, run, step):
            if run.state.step in (15, 39):
                gc.collect()
                found = tracemalloc.take_snapshot().filter_traces(ours)
                held[run.state.step] = sum(trace.size for trace in found.traces)

    tracemalloc.start()
    try:
        train.run(config, observers=[Memory()])
    finally:
        tracemalloc.stop()
    # Bytes; the figures of a step are some 800; 4,300 in all seen under load.
    assert held[39] - held[15] < 24 * 400


def test_a_run_that_ignores_its_images_ends_when_asked_to_after_an_epoch(config_of, monkeypatch):
    evaluate_model = between_steps.evaluate_model

    def ignored(*given, **named):
        result = evaluate_model(*given, **named)
        for task in result.tasks.values():
            for name, use in task.uses.items():
                task.uses[name] = replace(use, verdict="image ignored", reason="no gap")
        return result

    monkeypatch.setattr(between_steps, "evaluate_model", ignored)
    config = config_of(dev=True, stop_if_image_ignored=True)
    with pytest.raises(GuardError, match=r"after step 4 the images are ignored \(.*: no gap\)"):
        train.run(config)  # evaluated after step 3 too, within the first epoch: too early to tell
    assert checkpoints.newest(config.out_dir).step == 4
    assert (config.out_dir / "answers" / "step-000004.html").exists()


def test_a_sample_that_cannot_be_read_is_counted_and_named_and_does_not_stop_the_run(config_of):
    config = config_of()
    path = config.data.train[0].path
    shutil.rmtree(path)
    rows = [
        (Record(f"{i:04d}", "toy", "train", str(i), texts(i)), picture(i), "png") for i in range(14)
    ]
    rows[5] = (rows[5][0], b"no picture", "png")
    write_shards(rows, path, dataset="toy", split="train", max_shard_samples=4)
    train.run(config)
    assert lines(config.out_dir, "train/quarantined_samples")[8] == 1
    assert "key 0005" in (config.out_dir / "quarantine.jsonl").read_text()


def test_an_observer_hears_what_a_step_will_read_and_what_it_did(config_of):
    read = {}
    told = {}

    class Listener(Observer):
        def batches_made(self, run, samples, batches):
            read[run.state.step] = (len(samples), sum(batch.images for batch in batches))

        def step_taken(self, run, step):
            told[run.state.step] = step.loss

    config = config_of(epochs=1)
    train.run(config, observers=[Listener()])
    assert told == losses(config.out_dir)
    assert [samples for samples, _ in read.values()] == [4, 4, 4, 2]
    assert list(read) == [0, 1, 2, 3]
    assert all(samples <= images for samples, images in read.values())


def test_a_second_run_into_the_same_folder_is_refused(config_of):
    config = config_of(max_steps=1)
    train.run(config)
    with pytest.raises(ConfigError, match="--resume auto"):
        train.run(config)


def test_the_module_takes_a_config_and_overrides_and_answers_bad_input_with_a_sentence(
    config_of, tmp_path, capfd
):
    file = tmp_path / "run.yaml"
    file.write_text(dump(config_of()))
    assert main([str(file), "train.max_steps=1"]) == 0
    assert (
        capfd.readouterr().out
        == f"checkpoint: {tmp_path / 'run' / 'checkpoints' / 'step-000001'}\n"
    )
    assert main([str(file), "train.max_step=1"]) == 2
    said = capfd.readouterr().err
    assert said.startswith("harness: ")
    assert "did you mean train.max_steps?" in said


def test_what_went_wrong_on_another_rank_alone_is_said_there_after_a_while(
    config_of, tmp_path, monkeypatch, capfd
):
    slept = []
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_PORT": "1"}
    for name, value in {**torchrun, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", slept.append)
    assert main([str(tmp_path / "nope.yaml")]) == 2
    assert slept == [3]
    assert capfd.readouterr().err.startswith("harness, rank 1: ")


NUMBERS = {
    "loss": 1.5,
    "images_per_second": 3,
    "targets_per_second": 9,
    "data_wait": 0.25,
    "memory_mb": 7,
}


def test_a_log_has_lines_at_once_then_now_and_then_and_at_the_end_with_clock_and_time_left(
    capfd, monkeypatch
):
    now = [100.0]
    monkeypatch.setattr(terminals.time, "monotonic", lambda: now[0])
    shown = Terminal(True)
    with shown.progress(40, 0):
        for step in range(1, 41):
            shown.advance(step, NUMBERS)
            now[0] += 1
            if step == 20:
                with shown.evaluation("400 dev images") as advance:
                    for done in range(0, 401, 100):
                        advance(done, 400)
                        now[0] += 6
    lines = capfd.readouterr().err.splitlines()
    assert all(len(line) <= 100 for line in lines)
    said = [tuple(line.split("  ")[1:3]) for line in lines if "  " in line]
    assert said == [
        ("step 1/40", "0:00:00 left"),
        ("step 11/40", "0:00:26 left"),
        ("evaluating 200/400 images", "0:00:12 left"),
        ("evaluating 400/400 images", "now with other images"),
        ("step 25/40", "0:00:32 left"),
        ("step 35/40", "0:00:09 left"),
        ("step 40/40", "0:00:00 left"),
    ]
    assert all(re.match(r"\d\d:\d\d:\d\d  ", line) for line in lines if "step" in line)
    assert "evaluating on 400 dev images; this takes a while" in lines
    with shown.evaluation("400 dev images"):
        pass
    assert "the last one took 0:00:30" in capfd.readouterr().err
    silent = Terminal(False)
    with silent.progress(1, 0), silent.evaluation("nothing") as advance:
        advance(1, 1)
        silent.advance(1, NUMBERS)
        silent.say("nothing")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("columns", "seen", "left_out"),
    [(60, "left", "images"), (80, "images/s", "MB"), (130, "targets/s  7 MB", "nothing")],
)
def test_a_narrow_terminal_keeps_the_step_and_the_time_left(columns, seen, left_out, monkeypatch):
    narrow = Console(file=io.StringIO(), width=columns, force_terminal=True)
    monkeypatch.setattr(terminals, "Console", lambda **options: narrow)
    shown = Terminal(True)
    with shown.progress(123_456, 0):
        shown.advance(12_345, NUMBERS)
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", shown.console.file.getvalue()).splitlines()[-1]
    assert "12345/123456" in last
    assert " left" in last
    assert len(last.rstrip()) <= columns
    assert seen in last
    assert left_out not in last


def test_of_answers_to_the_same_images_only_the_changed_ones_are_shown_again(capfd):
    def answers(*said):
        return [Shown(None, f"what is {n // 2}?", ("a box",), text) for n, text in enumerate(said)]

    terminal = Terminal(True)
    terminal.answers(answers("red", "red", "red"))
    assert capfd.readouterr().err.count("red") == 3
    terminal.answers(answers("red", "a box", "red"))
    said = capfd.readouterr().err
    assert "answers to the same 3 images: 1 changed" in said
    assert said.count("what is 0?") == 1, "two pictures with one question"
    assert "what is 1?" not in said
    terminal.answers(answers("red", "a box", "red"))
    assert capfd.readouterr().err == "answers to the same 3 images: none changed\n"


def test_the_share_of_waiting_leaves_evaluations_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(terminals.time, "perf_counter", lambda: now[0])
    clock = Clock()
    for evaluation in (50, 0):
        for phase, seconds in (("data", 1), ("step", 3), ("rest", 1)):
            clock.enter(phase)
            now[0] += seconds
        clock.count(images=8, targets=16)
        with clock.during("evaluation"):
            now[0] += evaluation
            with clock.during("saving"):
                now[0] += 2
    assert clock.rates() == {"images_per_second": 2.0, "targets_per_second": 4.0, "data_wait": 0.25}
    clock.reset()
    assert clock.rates()["images_per_second"] == 0
    assert clock.spent == {"data": 2, "step": 6, "evaluation": 50, "saving": 4, "rest": 2}
    assert sum(clock.spent.values()) == now[0]
