"""Planted cheats: no model that reads no content is called `image used`, honest ones are.

What each reads, and how that is planted: tests/support/cheats.py. Seed 0 runs in the usual suite,
seeds 1 and 2 with `-m long`; benchmarks/cheats.py judges them on more pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

pytest.importorskip("easy_vqa", reason="the package easy-vqa is not installed")

from cheats import CASES, ENCODER, MEAN, Case, World, floors_made_once, judged, make_world
from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.images import ImageDecoder
from harness.evaluate.image_use.evidence import SCORE_MARGIN, ImageUse
from harness.evaluate.run import evaluate_model
from harness.model.vlm import VisionLanguageModel
from shards.loader import Loader
from tiny_models import tiny_t5

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]
BY_NAME = {case.name: case for case in CASES}
TEST, TRAIN, TREES = 300, 2000, 10


@pytest.fixture(scope="module", autouse=True)
def _floors_made_once() -> Iterator[None]:
    with floors_made_once(TREES):
        yield


@pytest.fixture(scope="module")
def uses(tmp_path_factory) -> Callable[[Case, int], dict[str, ImageUse]]:
    """The verdicts of a case and seed by task; each set is made once."""

    @cache
    def world(kind: str, seed: int) -> World:
        return make_world(tmp_path_factory.mktemp("world"), kind, seed, test=TEST, train=TRAIN)

    @cache
    def found(case: str, seed: int) -> dict[str, ImageUse]:
        return judged(BY_NAME[case], world(BY_NAME[case].kind, seed))

    return lambda case, seed: found(case.name, seed)


# Names that came out beside those that were expected, and why: docs/is-the-image-used.md.
OTHERWISE = {
    ("brightness", "vqa"): ("not enough evidence",),  # its cost is about the margin
    ("brightness", "caption"): ("not enough evidence",),
    # A donor shares no caption, so that its file has another size where that tells the colour.
    ("file size", "caption"): ("retrieval is as good",),
    ("statistics neighbour", "caption"): ("retrieval is as good",),
    # One template for all is better than the consensus of several.
    ("honest, known combinations", "caption"): ("image used",),
}
FOOLED = {
    ("statistics neighbour", "vqa"),
    ("statistics forest", "vqa"),
    ("statistics forest", "caption"),
}
WHY = (
    "image used: what reads all statistics, and learnt from more drawings than the shallow floor, "
    "tells their content (as a captioner at times: retrieval is as good)"
)


def cases() -> list:
    """Returns (case, task); strictly expected to fail where the gate is fooled."""
    return [
        pytest.param(
            case,
            task,
            id=f"{case.name}, {task}",
            marks=[pytest.mark.xfail(strict=True, raises=AssertionError, reason=WHY)]
            if (case.name, task) in FOOLED
            else [],
        )
        for case in CASES
        for task in case.expected
    ]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("case", "task"), cases())
def test_a_model_gets_the_name_of_what_it_reads(case: Case, task: str, seed: int, uses):
    use = uses(case, seed)[task]
    assert use.verdict in (*case.expected[task], *OTHERWISE.get((case.name, task), ())), use.reason


def test_no_cheat_may_be_named_image_used():
    for case in CASES:
        if not case.is_honest:
            for task, names in case.expected.items():
                allowed = (*names, *OTHERWISE.get((case.name, task), ()))
                assert not any(name.startswith("image used") for name in allowed)


def trained(config: Config, epochs: int) -> VisionLanguageModel:
    """A model after so many passes over its training set."""
    torch.manual_seed(0)
    model = VisionLanguageModel.build(config, ENCODER).train()
    collate = Collator.of(config, model.tokenizer)
    loader = Loader(
        [config.data.train[0].path], global_batch=50, decode=ImageDecoder(32, "crop", 1)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for step, (_, samples) in enumerate(loader.iterate(epochs=epochs)):
        batch = collate(samples)
        if step == 0:
            model.bridge.calibrate(batch.features_IPD.float())
        loss = model.loss(batch)
        optimizer.zero_grad()
        (loss.sum / loss.weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def test_a_model_that_is_trained_on_mean_colours_alone_is_not_found_to_use_the_image(
    tmp_path: Path,
):
    world = make_world(tmp_path, "plain", 0, test=TEST, train=1500, seen=MEAN, captioned=False)
    config = Config(
        name="mean-colour",
        data={
            "train": [{"path": world.train[0]}],
            "test": [{"path": world.test[0]}],
            "texts_per_image": 5,
        },
        model={
            "bridge": {"kind": "mean_pool"},
            "lm": {"kind": "t5", "id": str(tiny_t5(tmp_path / "t5", layers=1)), "tuning": "full"},
        },
        generate={"vqa": {"max_new_tokens": 6}},
        evaluation={"batch_images": 50},
        tracking={"kind": "none"},
    )
    model = trained(config, epochs=6)
    found = evaluate_model(model, world.test, config)
    use = found.tasks["vqa"].image_use
    assert use is not None
    assert use.score_gap.low > SCORE_MARGIN, f"it learnt nothing of the colour: {use.reason}"
    assert not use.used, use.reason
