"""A plan of an evaluation: shared by so many processes, and what it holds."""

from dataclasses import replace
from pathlib import Path

import pytest

from harness.config.load import load
from harness.machine import devices
from harness.machine.launch_file import read_launch
from harness.plan.evaluation import plan_evaluation
from harness.plan.facts import located
from harness.plan.planner import Planner
from harness.plan.report import gb
from harness.plan.workload import Sizes, Workload
from toy_runs import make_config

ROOT = Path(__file__).resolve().parents[3]
WORK = Workload(Sizes(2, 2, 8, 6, 1.0), None, None, "of a test")


@pytest.fixture(scope="module")
def config(tmp_path_factory, tiny_clip_folder, tiny_t5_folder):
    return make_config(tmp_path_factory.mktemp("plan"), tiny_clip_folder, tiny_t5_folder)


def test_more_processes_answer_fewer_batches_each_and_hold_as_much(config):
    one, eight = (plan_evaluation(config, 20_000, "a100-40", many) for many in (1, 8))
    assert (one.images, one.batches, one.rounds) == (eight.images, eight.batches, one.batches)
    assert eight.rounds == -(-one.batches // 8)
    assert one.seconds / 8.5 < eight.seconds < one.seconds / 6
    assert one.parts == eight.parts
    assert "20,000 texts" in eight.table()
    assert eight.to_json()["peak_bytes"] == sum(eight.parts.values())


def test_the_pages_table_is_what_is_planned(silent_hub):
    config = located(load(ROOT / "configs/vqav2_t4.yaml"), with_vision=True).config
    planned = plan_evaluation(config, 214_354, "a100-40", 8)
    row = f"| a100-40 | 8 | {planned.seconds / 60:.0f} min | {gb(planned.peak_bytes)} |"
    assert row in (ROOT / "docs/scaling.md").read_text(encoding="utf-8")


def test_twice_the_beams_take_longer_and_larger_batches_hold_more(config):
    def made(**changes):
        settings = config.model_dump(mode="json")
        settings["generate"]["vqa"] |= {"beams": changes.get("beams", 1)}
        settings["evaluation"] |= {"batch_images": changes.get("batch_images", 64)}
        return plan_evaluation(type(config)(**settings), 20_000, "cpu", 2)

    assert made(beams=5).seconds > 1.1 * made().seconds
    assert made(batch_images=128).peak_bytes > made().peak_bytes


def test_with_zero_3_an_evaluation_that_needs_more_than_a_step_decides(config):
    settings = config.evaluation.model_copy(update={"batch_images": 20_000})
    large = config.model_copy(update={"evaluation": settings})
    launch = read_launch("zero3_offload")
    planner = Planner(large, devices.device("a100-40"), launch, 8, WORK, None)
    whole = sum(planner.weights.values())
    step = planner.bytes(planner.images)
    needed = sum(planner.evaluation.values())
    assert needed > max(whole, step)
    assert planner.plan(brief=True).limits["GPU memory"][0] == needed
    data = config.data.model_copy(update={"dev": (), "test": ()})
    alone = replace(planner, config=large.model_copy(update={"data": data}))
    assert alone.evaluation == {}
    assert alone.plan(brief=True).limits["GPU memory"][0] == max(step, alone.without_gradients)
