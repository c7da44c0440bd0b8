"""`harness gate`: a model that was trained elsewhere is judged as one of ours, or by a file of what
it says to the pictures that the gate would have shown it.
"""

import io
import json
from collections import Counter
from functools import partial

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image

from harness.errors import ConfigError
from harness.evaluate import floors
from harness.evaluate.elsewhere import image_sets, judge_answers, write_donors
from harness.evaluate.official import ScoreError
from harness.evaluate.published import PublishedModel, evaluate_published
from harness.model.language.loss import Generated
from published_models import tiny_blip2
from shards.manifest import Manifest
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


def feature_set(folder, **given) -> str:
    record = Record("000", "squares", "test", "0", texts_of(0, captions=False))
    row = (record, safetensors.torch.save({"patches_PD": torch.zeros(1, 1)}), "safetensors")
    encoder = {"kind": "clip"}
    named = {"dataset": "squares", "split": "test", "kind": "features", "encoder": encoder}
    write_shards([row], folder, **named, **given)
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


@pytest.fixture(autouse=True)
def a_small_forest(monkeypatch):
    monkeypatch.setattr(floors, "shallow_answers", partial(floors.shallow_answers, trees=10))


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
    assert seen["beside"]["squares_test"]["interaction"]["score"] == 100
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


def test_official_results_alone_are_not_enough_and_the_reason_says_what_is(questions, tmp_path):
    file = tmp_path / "results.json"
    known = [text for i in range(IMAGES) for text in texts_of(i, captions=False)]
    said = [{"question_id": text.id, "answer": text.targets[0]} for text in known]
    file.write_text(json.dumps(said))
    report = judge_answers(file, [questions], tmp_path / "out")
    found = report["tasks"]["vqa"]
    assert (found["verdict"], found["accuracy"]) == ("not enough evidence", 100)
    assert found["reason"].startswith(
        "the exchange was not measured (no text was answered with another image); it is"
    )
    assert "harness gate --donors" in found["advice"]
    assert found["exchange_missing"] == found["matched_exchange_missing"]
    assert found["shuffled_accuracy"] is None
    assert found["shallow_floor_advantage_low"] > 1
    left = json.loads((tmp_path / "out" / "scores.json").read_text(), parse_constant=pytest.fail)
    assert left == json.loads(json.dumps(report))
    assert len(json.loads((tmp_path / "out" / "squares_test_answers.json").read_text())) == 160


def test_official_captions_stand_under_the_ids_of_images(tmp_path):
    data = drawings(tmp_path / "test", captions=True)
    file = tmp_path / "results.json"
    said = [{"image_id": i, "caption": texts_of(i, True)[0].targets[0]} for i in range(IMAGES)]
    file.write_text(json.dumps(said))
    found = judge_answers(file, [data])["tasks"]["caption"]
    assert found["texts"] == IMAGES
    assert found["verdict"] == "not enough evidence"


def test_a_file_with_gaps_is_refused_by_the_first_and_partly_judged_where_that_is_asked_for(
    questions, tmp_path
):
    file = answered(tmp_path, [questions], reader)
    lines = read(file)
    rest = [line for line in lines if line["text_id"] not in ("3a", "7b", lines[0]["text_id"])]
    lacking = len(lines) - len(rest)
    written(tmp_path, [*rest, *(line for line in lines if line["text_id"] == "3a")][:-1])
    first = f"the first to text {lines[0]['text_id']} of squares_test with picture"
    with pytest.raises(ScoreError, match=f"lacks {lacking - 2} of {len(lines)} answers, {first}"):
        judge_answers(file, [questions])
    found = judge_answers(file, [questions], partial=True)["tasks"]["vqa"]
    assert found["verdict"] == "image used"
    assert (found["texts"], found["gate_texts"], found["left_out"]) == (157, 157, 3)
    assert found["shuffled_accuracy"] == pytest.approx(found["exchange_score"], abs=0.01)
    written(tmp_path, [line for line in lines if line["prompt"] == ASKED])
    half = judge_answers(file, [questions], partial=True)["tasks"]["vqa"]
    assert (half["gate_texts"], half["exchange_images"]) == (IMAGES, IMAGES)
    assert half["verdict"] == "image used"


def test_a_file_of_one_task_is_judged_by_that_task(tmp_path):
    rows = []
    for i in range(34):
        texts = texts_of(i, captions=False) + texts_of(i, captions=True)
        rows.append((Record(f"{i:03d}", "squares", "test", str(i), texts), drawing(i), "bmp"))
    write_shards(rows, tmp_path / "test", dataset="squares", split="test")
    data = [str(tmp_path / "test")]
    file = answered(tmp_path, data, reader)
    assert judge_answers(file, data)["tasks"].keys() == {"vqa", "caption"}
    written(tmp_path, [line for line in read(file) if line["prompt"] is None])
    assert judge_answers(file, data)["tasks"].keys() == {"caption"}


def test_images_of_another_set_are_asked_for_too(tmp_path):
    sets = [drawings(tmp_path / split, split, images=32) for split in ("test", "dev")]
    # The keys of both are the same, and so are the ids of their texts.
    file = answered(tmp_path, sets, reader)
    conditions = Counter(line["condition"] for line in read(file))
    assert conditions["true"] == conditions["another set"] == 128
    found = judge_answers(file, sets)["tasks"]["vqa"]
    assert found["sets"].keys() == {"squares_test", "squares_dev"}
    assert found["verdict"] == "image used"
    written(tmp_path, [{**line, "answer": guesser(line)} for line in read(file)])
    blind = judge_answers(file, sets)["tasks"]["vqa"]
    assert blind["verdict"] == "image ignored"
    assert blind["sets"]["squares_dev"]["images_of_another_set_advantage"] == 0
    without_set = [{k: v for k, v in line.items() if k != "set"} for line in read(file)]
    written(tmp_path, without_set)
    with pytest.raises(ScoreError, match=r"line 1: text_id .* stands in squares_test, squares_dev"):
        judge_answers(file, sets)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"text_id": "99x"}, r"line 1: text_id 99x of set squares_test is not in .*test"),
        ({"answer": None}, r"line 1 \(text .*\) has null as \"answer\", expected a text"),
        ({"answer": 3}, r"line 1 \(text .*\) has 3 as \"answer\", expected a text"),
        ({"text_id": None}, r"line 1 has null as \"text_id\", expected a whole number or a text"),
        ({"image": "099"}, "with picture 099, which the gate does not show with it"),
        ({"image": True}, r"line 1 has true as \"image\""),
    ],
)
def test_a_line_that_cannot_be_used_is_named(questions, tmp_path, changed, sentence):
    file = answered(tmp_path, [questions], reader)
    first, *others = read(file)
    written(tmp_path, [first | changed, *others])
    with pytest.raises(ScoreError, match=sentence):
        judge_answers(file, [questions])


def test_what_is_no_file_of_answers_is_said_in_a_sentence(questions, tmp_path):
    file = answered(tmp_path, [questions], reader)
    with pytest.raises(ConfigError, match=r"donors\.jsonl is there already"):
        write_donors(tmp_path / "donors.jsonl", [questions])
    with pytest.raises(ScoreError, match=r'donors.jsonl: line 1 \(text .*\) has no "answer"'):
        judge_answers(tmp_path / "donors.jsonl", [questions])
    with pytest.raises(ScoreError, match="holds no answers"):
        judge_answers(tmp_path / "donors.jsonl", [questions], partial=True)
    lines = read(file)
    written(tmp_path, [*lines, lines[0]])
    with pytest.raises(ScoreError, match=f"line {len(lines) + 1} answers text .* once more"):
        judge_answers(file, [questions])
    file.write_bytes(b'{"text_id": "1"\n')
    with pytest.raises(ScoreError, match=r"line 1 is not JSON .*: expected a JSON document a line"):
        judge_answers(file, [questions])
    file.write_text("[1]")
    with pytest.raises(ScoreError, match=r'answered\.jsonl: entry 1 has no "text_id"'):
        judge_answers(file, [questions])
    file.write_bytes("[]".encode("utf-16"))
    with pytest.raises(ScoreError, match="is not UTF-8 text: it looks like UTF-16"):
        judge_answers(file, [questions])


def test_a_set_of_features_is_judged_by_the_pictures_that_it_was_made_from(questions, tmp_path):
    features = feature_set(tmp_path / "features", origin=Manifest.open(questions))
    assert image_sets([features, questions]) == [questions, questions]


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_judges_a_model_of_the_hub_with_the_lines_of_evaluate(
    questions, tmp_path, monkeypatch, harness
):
    monkeypatch.chdir(tmp_path)
    model = tiny_blip2(tmp_path / "tiny-blip-2")
    short = ("--override", "generate.vqa.max_new_tokens=2")
    code, out, _ = harness("gate", model, questions, "--limit", 34, *short, "--out", "found")
    assert code == 0
    assert "vqa, tiny-blip-2: image ignored\n" in out
    assert "points above words, colours and sizes" in out
    report = json.loads((tmp_path / "found" / "scores.json").read_text())
    assert report["tasks"]["vqa"]["loss_nats"] > 0
    assert report["tasks"]["vqa"]["gate_images"] == 34


def test_the_command_writes_donors_and_judges_their_answers(questions, tmp_path, harness):
    donors = tmp_path / "donors.jsonl"
    code, out, _ = harness("gate", "--donors", donors, questions, "--limit", 40)
    assert code == 0
    assert f"harness gate {donors} {questions}" in out
    again = donors.with_name("fewer.jsonl")
    _, out, _ = harness("gate", "--donors", again, questions, "--limit", 31)
    assert f"harness gate {again} {questions} --limit 31" in out
    lines = [line | {"answer": reader(line)} for line in read(donors)]
    file = written(tmp_path, lines)
    code, out, _ = harness("gate", file, questions, "--limit", 40, "--json")
    assert code == 0
    found = json.loads(out, parse_constant=pytest.fail)["tasks"]["vqa"]
    assert (found["verdict"], found["gate_images"]) == ("image used", 40)
    code, _, error = harness("gate", file, questions, "--limit", 30)
    assert code == 2
    assert "for the same data and --limit" in error


def test_the_command_refuses_in_sentences(questions, tmp_path, harness):
    features = feature_set(tmp_path / "features")
    for given, sentence in (
        (("nowhere.jsonl", questions), "nowhere.jsonl: there is no such file of answers"),
        ((tmp_path / "model",), "give the sets to judge"),
        (("--donors", tmp_path / "d.jsonl", tmp_path / "no"), "there is no folder of shards at"),
        (
            ("--donors", tmp_path / "d.jsonl", features),
            "holds features, and the pictures that they were made from are not at hand",
        ),
        ((tmp_path, questions), "): give an image-text-to-text model: a folder in the hub's"),
    ):
        code, _, error = harness("gate", *given)
        assert code == 2
        assert sentence in error
