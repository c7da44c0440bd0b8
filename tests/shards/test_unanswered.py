"""Questions without answers are built, read, checked and shown; nothing is learnt or scored."""

import json

import pytest

from pictures import OFFICIAL, fill
from shards.build import build
from shards.files import ShardError
from shards.index import index_shards
from shards.loader import Loader
from shards.manifest import INDEX, Manifest
from shards.read import Reader, records
from shards.record import Record, RecordError, Text
from shards.verify import stats, verify

QUESTIONS = OFFICIAL / "vqav2" / "v2_OpenEnded_mscoco_val2014_questions.json"
REFUSED = "4 of its 4 records are questions without answers.*`harness predict RUN --images"


@pytest.fixture
def test_dev(tmp_path):
    """The set, built of official files as those of test-dev are."""
    document = json.loads(QUESTIONS.read_text()) | {"data_subtype": "test-dev2015"}
    (tmp_path / "questions.json").write_text(json.dumps(document))
    names = [f"COCO_test2015_{number:012d}.jpg" for number in (42, 73, 74, 133)]
    images = fill(tmp_path / "test2015", names)
    given = {"images": images, "questions": tmp_path / "questions.json", "split": "test-dev"}
    summary = build("vqav2", tmp_path / "vqav2", **given)
    assert (
        summary.total("texts")
        == summary.notes["questions without answers, which can only be predicted"]
    )
    assert summary.total("targets") == 0
    return tmp_path / "vqav2" / "test-dev"


def test_questions_of_a_split_whose_answers_are_withheld_are_built_checked_and_counted(test_dev):
    manifest = Manifest.open(test_dev)
    assert manifest.unanswered == manifest.samples == 4
    record = Reader(manifest, answered=False).read(0).known
    asked = [question["question"] for question in json.loads(QUESTIONS.read_text())["questions"]]
    assert record.texts[0].prompt in asked
    assert {text.targets for text in record.texts} == {()}
    assert not record.is_answered
    assert Record.from_json(record.to_json()) == record
    assert b'"targets":null' in record.to_json()
    assert verify(test_dev) == []
    assert stats(test_dev)["tasks"]["vqa"]["targets"] == 0
    loader = Loader([str(test_dev)], global_batch=4, answered=False)
    assert [len(samples) for _, samples in loader.iterate(epochs=1)] == [4]


def test_they_are_refused_wherever_something_could_be_learnt_or_scored(test_dev):
    with pytest.raises(ShardError, match=REFUSED):
        Reader(Manifest.open(test_dev))
    with pytest.raises(ShardError, match=REFUSED):
        Loader([str(test_dev)], global_batch=4)
    with pytest.raises(ShardError, match=REFUSED):
        next(records([str(test_dev)]))


def test_an_index_made_anew_says_so_too_and_one_that_says_nonsense_is_refused(test_dev):
    (test_dev / INDEX).unlink()
    assert index_shards(test_dev, "vqav2", "test-dev").unanswered == 4
    document = json.loads((test_dev / INDEX).read_text())
    (test_dev / INDEX).write_text(json.dumps(document | {"unanswered": -1}))
    with pytest.raises(ShardError, match="is not a complete index"):
        Manifest.open(test_dev)


def test_a_record_is_answered_whole_or_not_at_all_and_a_caption_always_is():
    asked = Text("q", "vqa", (), "Is it red?")
    Record("k", "toy", "test", "1", (asked,)).check()
    for other in (Text("r", "vqa", ("no",), "Is it?"), Text("c", "caption", ("a dog",))):
        with pytest.raises(RecordError, match="null in some of its texts alone"):
            Record("k", "toy", "test", "1", (asked, other)).check()
    with pytest.raises(RecordError, match="holds an empty text or none at all"):
        Record("k", "toy", "test", "1", (Text("c", "caption", ()),)).check()
    with pytest.raises(RecordError, match=r"'targets' is \[\], expected a list of texts"):
        Record.from_json(
            Record("k", "toy", "test", "1", (asked,)).to_json().replace(b"null", b"[]", 1)
        )
