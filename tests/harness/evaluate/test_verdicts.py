"""The gate on models that are trained here, each known to be sound or broken in one way: the
verdict must say so.

Features of four colours in real shards, a tiny language model trained whole; each broken one
differs as its name says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
import torch

from harness.config.schema import Config
from harness.data.collate import Collator
from harness.data.features import CONTROLS
from harness.data.images import ImageDecoder
from harness.evaluate.image_use.evidence import EXCHANGE_NOTICED, LOSS_MARGIN, SCORE_MARGIN
from harness.evaluate.run import evaluate_model
from harness.evaluate.small_gate import small_gate, small_gate_metrics, small_set
from harness.model.batch import Batch
from harness.model.vlm import VisionLanguageModel
from shards.loader import Loader
from shards.record import Record, Text
from shards.statistics import COLUMNS
from shards.write import write_shards
from tiny_models import tiny_gpt2, tiny_t5

COLOURS = ("red", "green", "blue", "white")
PATCHES, WIDTH = 2, 64
ENCODER = {
    "kind": "clip",
    "id": "toy",
    "hash": "toy",
    "layer": -2,
    "image_size": 32,
    "tokens": PATCHES,
    "width": WIDTH,
}
TRAIN, TEST = 32, 64  # images


def colour_of(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def content(index: int) -> np.ndarray:
    """Patches that show a colour, each image in its own way."""
    noise_PD = np.random.default_rng(index).normal(size=(PATCHES, WIDTH))
    return (
        np.random.default_rng(10_000 + COLOURS.index(colour_of(index))).normal(size=WIDTH)
        + 0.5 * noise_PD
    )


def identity(index: int) -> np.ndarray:
    """Patches that name the image and show nothing of it."""
    return np.broadcast_to(
        np.random.default_rng(20_000 + index).normal(size=WIDTH), (PATCHES, WIDTH)
    ).copy()


def write_set(
    folder, features: Callable[[int], np.ndarray], split: str, first: int, images: int
) -> str:
    def record(index: int) -> Record:
        colour = colour_of(index)
        texts = (
            Text(f"{index}a", "vqa", (colour,), "what colour is it?"),
            Text(
                f"{index}b",
                "vqa",
                ("yes" if colour in COLOURS[:2] else "no",),
                "is it red or green?",
            ),
            Text(f"{index}c", "caption", (f"a {colour} dress",)),
        )
        return Record(f"{index:04d}", "toy", split, str(index), texts)

    def statistics(index: int) -> np.ndarray:
        """Of pictures whose brightness and colours tell nothing."""
        return np.random.default_rng(30_000 + index).random(len(COLUMNS)).astype(np.float32)

    def payload(patches_PD: np.ndarray) -> bytes:
        return safetensors.numpy.save({"patches_PD": patches_PD.astype(np.float16)})

    noise_KPD = np.random.default_rng(0).normal(size=(4, PATCHES, WIDTH)).astype(np.float16)
    controls = {"blank_PD": np.zeros((PATCHES, WIDTH), np.float16), "noise_KPD": noise_KPD}
    write_shards(
        (
            (record(i), payload(features(i)), "safetensors", statistics(i))
            for i in range(first, first + images)
        ),
        folder,
        dataset="toy",
        split=split,
        kind="features",
        encoder=ENCODER,
        extra_files={CONTROLS: safetensors.numpy.save(controls)},
    )
    return str(folder)


@pytest.fixture(scope="session")
def sets(tmp_path_factory):
    """(training, test) by what the features are: every set has the same records."""
    root = tmp_path_factory.mktemp("verdicts")
    return {
        kind.__name__: tuple(
            write_set(root / kind.__name__ / split, kind, split, *where)
            for split, where in (("train", (0, TRAIN)), ("test", (500, TEST)))
        )
        for kind in (content, identity)
    }


@pytest.fixture(scope="session")
def language_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-layer")
    return {"t5": tiny_t5(folder / "t5", layers=1), "gpt2": tiny_gpt2(folder / "gpt2", layers=1)}


@pytest.fixture
def config_of(sets, language_models):
    """A config over features of a kind, with `data` and `lm` settings of a broken one."""

    def make(features="content", kind="t5", data=None, lm=None) -> Config:
        return Config(
            name="verdict",
            data={
                "train": [{"path": sets[features][0]}],
                "test": [{"path": sets[features][1]}],
                **(data or {}),
            },
            model={
                "bridge": {"kind": "mean_pool"},
                "lm": {
                    "kind": kind,
                    "id": str(language_models[kind]),
                    "tuning": "full",
                    **(lm or {}),
                },
            },
            prompts={"caption": "photo"},
            generate={"vqa": {"max_new_tokens": 6}, "caption": {"max_new_tokens": 20}},
            evaluation={"batch_images": 32, "bootstrap": 500},
            tracking={"kind": "none"},
        )

    return make


def trained(
    config: Config,
    steps: int = 25,
    change: Callable[[Batch], Batch] = lambda batch: batch,
    prepare: Callable[[VisionLanguageModel], object] = lambda model: None,
) -> VisionLanguageModel:
    """A model after so many steps over all training images at once; `change` is done to each batch,
    `prepare` to the model before the first.
    """
    model = VisionLanguageModel.build(config, ENCODER).train()
    collate = Collator.of(config, model.tokenizer)
    loader = Loader(
        [config.data.train[0].path], global_batch=TRAIN, decode=ImageDecoder(32, "crop", 1)
    )
    ((_, samples),) = loader.iterate(epochs=1)
    batch = collate(samples)
    model.bridge.calibrate(batch.features_IPD.float())
    prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(steps):
        loss = model.loss(change(batch))
        optimizer.zero_grad()
        (loss.sum / loss.weight).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model


def gate(
    model: VisionLanguageModel, config: Config, split: str = "test", epochs: float | None = None
):
    """ImageUse by task."""
    (dataset,) = getattr(config.data, split)
    found = evaluate_model(model, [dataset.path], config, epochs=epochs)
    return {task: result.image_use for task, result in found.tasks.items()}


def said(uses) -> dict[str, str]:
    return {task: use.verdict for task, use in uses.items()}


def both(verdict: str) -> dict[str, str]:
    return {"caption": verdict, "vqa": verdict}


def test_a_sound_model_uses_the_image(config_of):
    config = config_of()
    model = trained(config)
    uses = gate(model, config)
    # A caption is its training neighbours' here, so that copying theirs is as good.
    assert said(uses) == {"vqa": "image used", "caption": "retrieval is as good"}, uses
    assert uses["vqa"].scores["true"] > 90
    assert [term.name for term in uses["vqa"].terms if term.passed] == [
        "exchange",
        "matched exchange",
        "shallow floor",
    ]
    assert [term.name for term in uses["caption"].terms if not term.passed] == ["neighbour floor"]
    # The small gate: one text of each task and image, the model goes on training.
    model.train()
    for name, verdict in (("test", EXCHANGE_NOTICED), ("train", EXCHANGE_NOTICED)):
        looking = config.model_copy(
            update={"data": config.data.model_copy(update={"dev": getattr(config.data, name)})}
        )
        small = small_set(model, looking)
        assert [
            (stratum.task, batch.images, len(batch.contexts)) for stratum, batch in small.batches
        ] == [("caption", 32, 32), ("vqa", 32, 32)]
        found = small_gate(model, small, looking)
        assert {stratum.task: use.verdict for stratum, use in found.items()} == both(verdict)
        metrics = small_gate_metrics(found)
        assert metrics["vqa/exchange_noticed"] == 1.0
        assert not any("image_used" in name for name in metrics)
        assert metrics["vqa/true_accuracy"] > 90
    assert model.training


def test_a_sound_model_stopped_too_early_gives_not_enough_evidence(config_of):
    config = config_of()
    use = gate(trained(config, steps=2), config)[
        "vqa"
    ]  # its loss depends on the image by now, no answer does
    assert use.verdict == "not enough evidence", use.reason
    assert "the loss depends on the image" in use.reason
    begun = trained(config, steps=0)
    untrained = gate(begun, config)["vqa"]
    assert not untrained.used, untrained.reason
    assert untrained.score_gap.high < SCORE_MARGIN
    uses = gate(begun, config, epochs=0.1)
    # Captions of a model that has learnt nothing never end.
    assert said(uses) == {"vqa": "not enough evidence", "caption": "endless captions"}
    assert "after 0.1 of the first epoch it is too early to tell" in uses["vqa"].reason


def test_features_replaced_by_noise_are_ignored(config_of):
    config = config_of("identity")

    def noise(batch: Batch) -> Batch:
        return replace(batch, features_IPD=torch.randn(batch.features_IPD.shape).half())

    torch.manual_seed(0)
    uses = gate(trained(config, change=noise), config)
    assert said(uses) == both("image ignored"), uses


def test_a_bridge_cut_off_from_the_language_model_is_ignored(config_of):
    config = config_of()

    def cut(model: VisionLanguageModel) -> None:
        model.bridge.projection.gain_D.requires_grad_(False).zero_()

    uses = gate(trained(config, prepare=cut), config)
    assert said(uses) == both("image ignored"), uses
    assert uses["vqa"].loss_moved == 0.0


def test_labels_whose_padding_counts_as_eos_collapse_and_the_cause_is_named(config_of):
    """The published failure: GPT-2, padding = EOS with weight in the labels, and a BOS in
    generation alone.
    """
    padded = {"loss_on_padding": True, "max_target_tokens": 16}
    config = config_of(kind="gpt2", data=padded, lm={"bos": "generation_only"})
    uses = gate(trained(config, steps=10), config)
    assert said(uses) == both("EOS collapse"), uses
    for use in uses.values():
        padding, bos, share = use.causes
        assert "lies on padding behind the first EOS" in padding
        assert "begins with a BOS token that training never showed" in bos
        assert "EOS carries" in share
        assert padding in use.reason


def test_a_model_that_reads_which_image_it_is_but_not_what_it_shows_is_not_found_to_use_images(
    config_of,
):
    config = config_of("identity")
    model = trained(config, steps=40)
    new, known = gate(model, config, "test"), gate(model, config, "train")
    assert said(new) == both("not enough evidence"), new
    assert "follows which image it is and not what it shows" in new["vqa"].reason
    # On its training images it looks as sound as can be, so that these give no verdict of use.
    assert known["vqa"].scores["true"] > 90
    assert known["vqa"].loss_gap.low > LOSS_MARGIN
    assert known["vqa"].score_gap.low > SCORE_MARGIN
    assert said(known) == both("not enough evidence")
    assert f"{TRAIN} of the {TRAIN} images were trained on" in known["vqa"].reason
