"""Records without a picture: asked for by name, built, read, checked and shown like any other."""

import io
import json
import tarfile

import numpy as np
import pytest
import safetensors.numpy
import webdataset

from pictures import fill
from shards.build import build
from shards.files import ShardError
from shards.index import how_read, index_shards
from shards.loader import Loader
from shards.manifest import INDEX, Manifest
from shards.read import Reader
from shards.record import Record, RecordError, Text
from shards.statistics import rows_of
from shards.verify import stats, verify
from shards.write import write_shards
from toy_runs import make_shards, picture

ROWS = (
    "image,question,answer\na.jpg,what is it?,a dog\n,what is two and two?,four\n ,and three?,six\n"
)
TURNS = [{"from": "human", "value": "Name a colour."}, {"from": "gpt", "value": "Red."}]
CHOICE = "--text-only keeps"


def record(number: int, **fields) -> Record:
    text = Text(f"{number}t", "vqa", ("four",), "what is two and two?")
    return Record(f"{number:04d}", "words", "train", str(number), (text,), **fields)


def rows(tmp_path, **options):
    (tmp_path / "rows.csv").write_text(ROWS)
    photos = fill(tmp_path / "photos", ["a.jpg"])
    return build(
        "image-folder",
        tmp_path / "out",
        images=photos,
        csv=tmp_path / "rows.csv",
        **options,
    )


def test_rows_that_name_no_image_are_left_out_by_name_unless_they_are_asked_for(tmp_path):
    summary = rows(tmp_path)
    assert (summary.total("records"), summary.unusable_texts) == (1, 2)
    named = [json.loads(line) for line in summary.skipped.read_text().splitlines()]
    assert [line["name"] for line in named] == ["line 3", "line 4"]
    assert all(CHOICE in line["reason"] for line in named)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_built_set_of_both_is_read_checked_and_counted(tmp_path, monkeypatch, workers):
    monkeypatch.setattr("shards.prepare._WORTH_PROCESSES", 1)
    summary = rows(tmp_path, text_only=True, workers=workers)
    assert summary.notes == {"records without a picture, of rows that name no image": 2}
    assert summary.skipped.read_text() == ""
    folder = tmp_path / "out" / "train"
    manifest = Manifest.open(folder)
    assert (manifest.samples, manifest.without_picture, manifest.has_pictures) == (3, 2, True)
    samples = [Reader(manifest).read(index) for index in range(3)]
    assert [sample.known.has_picture for sample in samples] == [True, False, False]
    assert [sample.payload is None for sample in samples] == [False, True, True]
    assert [sample.known.texts[0].targets for sample in samples] == [
        ("a dog",),
        ("four",),
        ("six",),
    ]
    assert samples == [Reader(manifest).walk(index) for index in range(3)]
    assert verify(folder) == []
    assert stats(folder)["without_picture"] == 2
    assert sum(stats(folder)["image_sizes"].values()) == 1
    known = np.isfinite(rows_of(manifest, range(3))).all(axis=1)
    assert known.tolist() == [True, False, False]
    plain = list(webdataset.WebDataset(f"{folder}/train-000000.tar", shardshuffle=False))
    assert ["jpg" in sample for sample in plain] == [True, False, False]


def test_a_conversation_about_no_image_is_kept_or_named(tmp_path):
    photos = fill(tmp_path / "photos", ["a.jpg"])
    talks = [{"image": "a.jpg", "conversations": TURNS}, {"conversations": TURNS}]
    (tmp_path / "llava.json").write_text(json.dumps(talks))
    given = {"images": photos, "json": tmp_path / "llava.json"}
    left_out = build("image-folder", tmp_path / "one", **given)
    assert (left_out.total("records"), left_out.texts_without_image) == (1, 1)
    assert CHOICE in left_out.skipped.read_text()
    kept = build("image-folder", tmp_path / "both", text_only=True, **given)
    assert (kept.total("records"), kept.texts_without_image) == (2, 0)
    said = Reader(Manifest.open(tmp_path / "both" / "train")).read(1).known
    assert (said.has_picture, said.texts[0].prompt) == (False, "Name a colour.")


def test_texts_alone_make_a_set_without_any_folder_of_images(tmp_path):
    lines = [{"question": f"what is {n}?", "answers": [str(n)]} for n in range(20)]
    (tmp_path / "texts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    given = {"jsonl": tmp_path / "texts.jsonl", "dev_share": 0.25}
    with pytest.raises(ShardError, match="needs --images, or --text-only"):
        build("image-folder", tmp_path / "out", **given)
    with pytest.raises(ShardError, match="--text-only goes with --jsonl or"):
        build("image-folder", tmp_path / "out", text_only=True)
    summary = build("image-folder", tmp_path / "out", text_only=True, **given)
    assert {split: n["records"] for split, n in summary.splits.items()} == {"train": 15, "dev": 5}
    manifest = Manifest.open(tmp_path / "out" / "train")
    assert (manifest.has_pictures, how_read(manifest)) == (
        False,
        'no pictures, records or their "caption" from .json',
    )
    assert verify(manifest.folder) == []


def test_a_set_of_texts_alone_goes_with_features_and_nothing_of_it_is_decoded(tmp_path):
    def refuse(sample):
        raise AssertionError(sample)

    write_shards(
        ((record(n, has_picture=False), b"", "") for n in range(4)),
        tmp_path / "words",
        dataset="words",
        split="train",
    )
    loader = Loader([str(tmp_path / "words")], global_batch=4, decode=refuse)
    ((_, samples),) = loader.iterate(epochs=1)
    assert [(s.weight, s.error, s.payload, s.extension) for s in samples] == [
        (1, None, None, "")
    ] * 4
    made = safetensors.numpy.save({"patches_PD": np.zeros((2, 3), np.float16)})
    write_shards(
        ((record(n), made, "safetensors") for n in range(4)),
        tmp_path / "features",
        dataset="words",
        split="train",
        kind="features",
        encoder={"id": "x"},
    )
    both = [str(tmp_path / "words"), str(tmp_path / "features")]
    found = [s for _, batch in Loader(both, global_batch=4).iterate(epochs=1) for s in batch]
    assert [s.payload is None for s in found].count(True) == 4
    assert len(found) == 8
    make_shards(tmp_path / "images", 4)
    with pytest.raises(ShardError, match="one run reads sets of one kind"):
        Loader([*both, str(tmp_path / "images")], global_batch=4)


def test_a_lost_image_stays_an_error_and_is_no_record_without_a_picture(tmp_path):
    alone = record(1, has_picture=False)
    samples = [
        (record(0), None),
        (alone, None),
        (record(2), picture(2)),
        (record(3, has_picture=False), picture(3)),
    ]
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "a.tar", "w") as tar:
        for each, image in samples:
            for name, data in (("json", each.to_json()), ("png", image)):
                if data is not None:
                    info = tarfile.TarInfo(f"{each.key}.{name}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    made = index_shards(tmp_path / "tars", "words", "train")
    assert (made.samples, made.without_picture, made.skipped) == (2, 1, 2)
    reasons = (tmp_path / "tars" / "skipped.jsonl").read_text()
    assert "no images file" in reasons
    assert "says that it has no picture, and there is .png" in reasons
    assert verify(tmp_path / "tars") == []


def test_the_index_and_the_writer_hold_to_what_the_record_says(tmp_path):
    folder = make_shards(tmp_path / "set", 6, text_only=(1, 4))
    assert verify(folder) == []
    document = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(document | {"without_picture": 1}))
    assert any("1 records are without a picture, the sidecar has 2" in p for p in verify(folder))
    (folder / INDEX).write_text(json.dumps(document | {"without_picture": -1}))
    with pytest.raises(ShardError, match="without_picture is no count"):
        Manifest.open(folder)
    bad = [(record(0, has_picture=False), picture(0), "png")]
    with pytest.raises(ShardError, match="expected none, since its record has no picture"):
        write_shards(bad, tmp_path / "bad", dataset="words", split="train")
    with pytest.raises(ShardError, match="extension '' in a set of images"):
        write_shards([(record(0), b"", "")], tmp_path / "bad", dataset="words", split="train")


def test_a_record_says_that_it_has_no_picture_and_others_are_written_as_ever():
    assert b"has_picture" not in record(0).to_json()
    alone = record(0, has_picture=False)
    assert Record.from_json(alone.to_json()) == alone
    with pytest.raises(RecordError, match="has_picture is 'no', not true or false"):
        Record.from_json(alone.to_json().replace(b'"has_picture":false', b'"has_picture":"no"'))
