"""A build leaves out the one odd text, line or image, named with its reason; and finds images that
are there under another spelling of their name.
"""

import json
import os
import unicodedata
import zipfile

import datasets
import pytest

from pictures import OFFICIAL, fill, picture
from shards.build import build
from shards.files import ShardError
from shards.manifest import Manifest
from shards.read import Reader

NESTED = b"[" * 100_000


def built(tmp_path, lines, images=None):
    """Builds an image folder; gives (targets by image id, {(kind, name): reason})."""
    if images is None:
        images = fill(tmp_path / "photos", ["a.jpg", "b.jpg"])
    rows = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(rows))
    out = tmp_path / "out"
    summary = build("image-folder", out, images=images, jsonl=tmp_path / "t.jsonl")
    left_out = [json.loads(line) for line in summary.skipped.read_text().splitlines()]
    assert summary.unusable_texts == sum(row["kind"] == "unusable text" for row in left_out)
    reader = Reader(Manifest.open(out / "train"))
    records = [reader.read(n).record for n in range(reader.manifest.samples)]
    return (
        {record.key: [text.targets for text in record.texts] for record in records},
        {(row["kind"], row["name"]): row["reason"] for row in left_out},
    )


GOOD = {"image": "a.jpg", "text": "a good one"}


@pytest.mark.parametrize(
    ("line", "name", "says"),
    [
        ({"image": "a.jpg", "text": 5}, "a.jpg", "the caption is 5, not a text"),
        (b'{"image": "a.jpg", "text": NaN}', "a.jpg", "the caption is nan"),
        ({"image": "a.jpg", "captions": [["x"]]}, "a.jpg", "the caption is ['x']"),
        ({"image": "a.jpg", "captions": {"en": "x", "de": "y"}}, "a.jpg", "the caption is {"),
        ({"image": "a.jpg", "text": None}, "a.jpg", "the caption is None"),
        ({"image": "a.jpg", "question": "x?", "answers": ["y", 1]}, "a.jpg, line 2", "is 1, not"),
        ({"image": "a.jpg", "question": ["x?"], "answers": "y"}, "a.jpg, line 2", "is ['x?']"),
        ({"image": "a.jpg", "question": "x?", "answers": {"y": 1}}, "a.jpg, line 2", "is {'y'"),
        ({"image": "a.jpg", "text": "\ud800"}, "line 2", "surrogates not allowed"),
        (b'{"image": "a.jpg", "text": "caf\xe9"}', "line 2", "can't decode"),
        (b'{"image": "a.jpg", "text": "x"', "line 2", "cannot be read"),
        (b'{"image": "a.jpg", "text": ' + NESTED, "line 2", "recursion"),
        (b"[1]", "line 2", "no field 'image'"),
        ({"text": "x"}, "line 2", "no field 'image'"),
        ({"image": "a.jpg", "title": "x"}, "line 2", "exactly one of"),
        ({"image": "a.jpg", "caption": "x", "text": "y"}, "line 2", "exactly one of"),
        ({"image": "a.jpg", "question": "x"}, "line 2", "exactly one of"),
        ({"image": "a.jpg", "text": "x", "split": 5}, "line 2", "'split' must be a text"),
        ({"image": "a.jpg", "text": "x", "id": [5]}, "line 2", "'id' a text"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_an_odd_line_costs_that_line(tmp_path, line, name, says):
    targets, left_out = built(tmp_path, [GOOD, line, {"image": "b.jpg", "text": "b"}])
    assert targets == {"a": [("a good one",)], "b": [("b",)]}
    assert says in left_out["unusable text", name]


def test_a_file_of_odd_lines_alone_says_what_is_wrong_with_them(tmp_path):
    with pytest.raises(
        ShardError, match=r"2 x unusable text, .*first: line 1, it needs exactly one"
    ):
        built(tmp_path, [{"image": "a.jpg", "title": "x"}] * 2)


def test_a_pipe_among_the_images_costs_its_texts_and_is_not_waited_for(tmp_path):
    images = fill(tmp_path / "photos", ["a.jpg"])
    os.mkfifo(images / "b.jpg")
    targets, left_out = built(tmp_path, [GOOD, {"image": "b.jpg", "text": "b"}], images)
    assert list(targets) == ["a"]
    assert "no plain file" in left_out["undecodable image", "b.jpg"]
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ShardError, match="cannot be read: it is no plain file"):
        build("image-folder", tmp_path / "o", images=images, jsonl=tmp_path / "pipe.jsonl")


def test_an_image_whose_name_is_not_utf_8_is_named(tmp_path):
    images = fill(tmp_path / "photos", ["a.jpg"])
    with open(os.fsencode(images) + b"/caf\xe9.jpg", "wb") as file:
        file.write(picture("b"))
    _, left_out = built(tmp_path, [GOOD], images)
    assert ("image without text", "caf\udce9.jpg") in left_out


def test_official_files_with_an_odd_text_lose_that_text(tmp_path):
    images = fill(tmp_path / "val2014", [f"COCO_val2014_{n:012d}.jpg" for n in (42, 73, 133)])

    def edited(name, change):
        document = json.loads((OFFICIAL / name).read_text())
        change(document)
        (tmp_path / "edited.json").write_text(json.dumps(document))
        return tmp_path / "edited.json"

    file = edited(
        "coco_captions/captions_val2014.json", lambda d: d["annotations"][0].update(caption=5)
    )
    found = build("coco-captions", tmp_path / "1", images=images, captions=file, split="val")
    assert found.unusable_texts == 1
    file = edited(
        "karpathy/dataset_coco.json", lambda d: d["images"][0]["sentences"][0].update(raw=["x"])
    )
    assert build("karpathy", tmp_path / "2", images=images, captions=file).unusable_texts == 1
    file = edited(
        "vqav2/v2_mscoco_val2014_annotations.json",
        lambda d: d["annotations"][0].update(answers=[3]),
    )
    questions = OFFICIAL / "vqav2/v2_OpenEnded_mscoco_val2014_questions.json"
    options = {"images": images, "questions": questions, "annotations": file, "split": "val"}
    assert build("vqav2", tmp_path / "3", **options).unusable_texts == 1


def test_an_odd_row_of_a_table_costs_that_row(tmp_path):
    rows = {
        "image": [{"bytes": picture(name), "path": None} for name in "abc"],
        "caption": [["a dog"], [], ["a cat", " "]],
        "answers": [[["x"]], [["y"]], [None]],
        "question": ["a?", "b?", "c?"],
    }
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "t.parquet")
    options = {"dataset": str(tmp_path / "t.parquet"), "split": "train"}
    with pytest.raises(ShardError, match=r"3 x unusable text.*row 0, the caption is .*not a text"):
        build("hf", tmp_path / "1", text_columns=["image"], **options)
    columns = {"question_column": "question", "answer_column": "answers"}
    found = build("hf", tmp_path / "2", text_columns=["caption"], **columns, **options)
    assert found.splits["train"]["targets"] == 4
    assert found.empty_texts == 2


FOUND = {
    "cats/1.jpg": "cats/1.jpg",
    "Cats/1.JPG": "cats/1.jpg",
    "photos/cats/1.jpg": "cats/1.jpg",
    "/elsewhere/photos/cats/1.jpg": "cats/1.jpg",
    "cats\\1.jpg": "cats/1.jpg",
    "./cats/../cats/1.jpg": "cats/1.jpg",
    "phone.jfif": "phone.jfif",
    unicodedata.normalize("NFD", "café.jpg"): "café.jpg",
    unicodedata.normalize("NFC", "naïve.jpg"): unicodedata.normalize("NFD", "naïve.jpg"),
    "X.jpg": "X.jpg",
    "x.jpg": "x.jpg",
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FOUND, ids=ascii)
def test_an_image_is_found_under_any_spelling_of_its_name(tmp_path, name, packed):
    images = fill(tmp_path / "photos", sorted(set(FOUND.values())))
    if packed:
        with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
            for file in images.rglob("*.j*"):
                archive.write(file, file.relative_to(tmp_path))  # photos/...: one folder holds all
        images = tmp_path / "photos.zip"
    targets, left_out = built(tmp_path, [{"image": name, "text": "here"}], images)
    assert list(targets.values()) == [[("here",)]]
    expected = set(FOUND.values()) - {FOUND[name]}
    assert {path.removeprefix("photos/") for _, path in left_out} == expected


def test_lines_that_spell_an_image_in_two_ways_are_one_record(tmp_path):
    lines = [GOOD, {"image": "photos/A.JPG", "text": "again"}]
    assert built(tmp_path, lines)[0] == {"a": [("a good one", "again")]}


@pytest.mark.parametrize("name", ["val/a.jpg", "/elsewhere/a.jpg", "../a.jpg", "b.jpg"])
def test_an_image_of_another_folder_is_not_taken_for_it(tmp_path, name):
    images = fill(tmp_path / "photos", ["a.jpg", "x/b.jpg"])
    _, left_out = built(tmp_path, [GOOD, {"image": name, "text": "x"}], images)
    assert ("text without image", name) in left_out


def test_two_images_whose_names_differ_in_case_alone_are_not_guessed_among(tmp_path):
    images = fill(tmp_path / "photos", ["a.jpg", "A.jpg"])
    with pytest.raises(ShardError, match=r"two images called A\.JPG"):
        built(tmp_path, [{"image": "A.JPG", "text": "x"}], images)
