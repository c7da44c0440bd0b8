"""`harness gate`: a model that was trained elsewhere is judged as one of ours, or by a file of what
it says to the pictures that the gate would have shown it.
"""

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from harness.evaluate.elsewhere import judge_answers, write_donors
from harness.evaluate.published import PublishedModel, evaluate_published
from harness.model.language.loss import Generated
from published_models import tiny_blip2
from shards.record import Record, Text
from shards.write import write_shards

IMAGES = 80
ASKED = "is the square left or right?"
SIDES = ("left", "right")


def side_of(key: str) -> str:
    return SIDES[int(key) % 2]


def drawing(index: int) -> bytes:
    """A square on the left or on the right, which neither brightness nor colours tell."""
    rng = np.random.default_rng(index)
    pixels = np.empty((32, 32, 3), np.uint8)
    pixels[:] = rng.integers(60, 120, 3)
    left = 2 if side_of(str(index)) == "left" else 18
    pixels[10:22, left : left + 12] = rng.integers(150, 250, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "BMP")
    return file.getvalue()


def texts_of(index: int, captions: bool) -> tuple[Text, ...]:
    side = side_of(str(index))
    if captions:
        return (Text(f"c{index}", "caption", (f"a square on the {side} side",)),)
    return (
        Text(f"{index}a", "vqa", (side,), ASKED),
        Text(f"{index}b", "vqa", ("yes" if side == "left" else "no",), "is it on the left?"),
    )


def drawings(folder, split="test", captions=False, images=IMAGES) -> str:
    rows = [
        (Record(f"{i:03d}", "squares", split, str(i), texts_of(i, captions)), drawing(i), "bmp")
        for i in range(images)
    ]
    write_shards(rows, folder, dataset="squares", split=split, max_shard_samples=16)
    return str(folder)


def reader(line: dict) -> str:
    """What a model says that sees where the square is."""
    side = side_of(line["image"])
    if line["prompt"] is None:
        return f"a square on the {side} side"
    return side if line["prompt"] == ASKED else ("yes" if side == "left" else "no")


def guesser(line: dict) -> str:
    """What a model says that knows the answers by heart and looks at nothing."""
    return reader({**line, "image": line["text_id"].strip("abc")})


def answered(folder, data, say, **given):
    """The lines of `data` with what `say` says to each."""
    asked = folder / "donors.jsonl"
    write_donors(asked, data, **given)
    lines = [json.loads(row) for row in asked.read_text().splitlines()]
    return written(folder, [line | {"answer": say(line)} for line in lines])


def written(folder, lines):
    file = folder / "answered.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def read(file):
    return [json.loads(row) for row in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def questions(tmp_path_factory) -> str:
    return drawings(tmp_path_factory.mktemp("questions") / "test")


def test_a_file_of_a_model_that_sees_is_image_used_and_one_that_looks_at_nothing_is_not(
    questions, tmp_path
):
    seen = judge_answers(answered(tmp_path, [questions], reader), [questions])["tasks"]["vqa"]
    assert seen["verdict"] == "image used"
    assert seen["accuracy"] == 100
    assert seen["exchange_advantage_low"] > 1
    assert seen["matched_exchange_advantage_low"] > 1
    assert seen["shallow_floor_advantage_low"] > 1
    assert (seen["texts"], seen["gate_images"]) == (2 * IMAGES, IMAGES)
    assert seen["loss_nats"] is None
    assert seen["p_eos_first"] is None
    (tmp_path / "donors.jsonl").unlink()
    blind = judge_answers(answered(tmp_path, [questions], guesser), [questions])["tasks"]["vqa"]
    assert blind["verdict"] == "image ignored"
    assert blind["accuracy"] == 100


def test_of_captions_what_needs_a_model_stands_in_the_verdict_as_not_measured(tmp_path):
    data = drawings(tmp_path / "test", captions=True)
    seen = judge_answers(answered(tmp_path, [data], reader), [data])["tasks"]["caption"]
    assert seen["verdict"] == "image used (not measured: recall, neighbour floor)"
    assert seen["recall_missing"] == "the model gives no finite loss"


def test_the_pictures_to_show_are_those_that_the_gate_shows_to_a_model_of_its_own(
    questions, tmp_path, monkeypatch
):
    """A model that is run here, over the same part of the set, sees each text with the same
    pictures.
    """
    given = {"overrides": ["evaluation.counterfactual_texts=30", "evaluation.batch_images=16"]}
    write_donors(tmp_path / "donors.jsonl", [questions], **given)
    lines = read(tmp_path / "donors.jsonl")
    conditions = Counter(line["condition"] for line in lines)
    assert conditions["true"] == 2 * IMAGES
    assert conditions["shuffled"] == 32  # a whole batch
    assert 0 < conditions["matched"] <= 32
    assert {line["prompt"] for line in lines} == {ASKED, "is it on the left?"}
    assert all(
        (line["condition"] == "true") == (line["text_id"][:-1] == line["image_id"])
        for line in lines
    )
    key_of = {
        np.asarray(Image.open(io.BytesIO(drawing(i)))).tobytes(): f"{i:03d}" for i in range(IMAGES)
    }
    shown = set()

    def seen(self, batch, decoding, tokens):
        for context, row in zip(batch.contexts, tokens.token_row_of_C.tolist(), strict=True):
            shown.add((context.text.id, key_of.get(tokens.tokens_NQD[row].tobytes())))
        count = len(batch.contexts)
        return Generated(["left"] * count, [[1]] * count, torch.zeros(count))

    monkeypatch.setattr(PublishedModel, "generate", seen)
    monkeypatch.chdir(tmp_path)
    evaluate_published(str(tiny_blip2(tmp_path / "blip2")), [questions], **given)
    known = {(text, key) for text, key in shown if key}  # blank and noise pictures aside
    assert {(line["text_id"], line["image"]) for line in lines} == known
