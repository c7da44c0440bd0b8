"""`harness shards build hf`: data sets of the package `datasets` as the hub stores them, without
the hub.
"""

import json
import time

import pytest

from pictures import fill, picture
from shards.build import build
from shards.files import ShardError
from shards.manifest import Manifest
from shards.read import Reader
from shards.sources import flickr8k, hf

datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")
pyarrow = pytest.importorskip("pyarrow", reason="the extra `hub` is not installed")
NAMES = [f"{n}.jpg" for n in range(6)]
TEXTS = datasets.List(datasets.Value("string"))


def stored(name: str) -> dict:
    return {"bytes": picture(name), "path": name}


def table(path, **columns):
    """A parquet file without the metadata of `datasets`: columns are what they are."""
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def said(source, split="train") -> list[list[tuple]]:
    return [
        [(t.task, t.prompt, t.targets) for t in item.record.texts] for item in source.splits[split]
    ]


@pytest.fixture
def captioned(tmp_path):
    images = [stored(name) for name in NAMES]
    return table(
        tmp_path / "some.parquet", image=images, caption=[[f"one {n}", f"two {n}"] for n in NAMES]
    )


def test_real_images_and_captions_come_out_of_the_shards_as_they_went_into_a_parquet(
    shared_data, tmp_path
):
    folder = shared_data / "flickr8k"
    official = flickr8k.load(folder / "images", folder / "Flickr8k.token.txt", folder).splits[
        "dev"
    ][:20]
    rows = {
        "image": [
            {"bytes": (folder / "images" / i.image).read_bytes(), "path": i.image} for i in official
        ],
        "id": [item.record.image_id for item in official],
        "caption": [list(item.record.texts[0].targets) for item in official],
    }
    features = datasets.Features(image=datasets.Image(), id=datasets.Value("string"), caption=TEXTS)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "dev.parquet")

    build(
        "hf",
        tmp_path / "out",
        dataset=str(tmp_path / "dev.parquet"),
        split="dev",
        text_columns=["caption"],
        id_column="id",
    )
    manifest = Manifest.open(str(tmp_path / "out" / "dev"))
    samples = [Reader(manifest).read(index) for index in range(manifest.samples)]
    assert [sample.record.texts for sample in samples] == [item.record.texts for item in official]
    assert [sample.record.key for sample in samples] == [item.record.key for item in official]
    assert [sample.payload for sample in samples] == [image["bytes"] for image in rows["image"]]


def test_every_form_of_a_data_set_on_disk_gives_the_same_records_and_bytes(tmp_path, captioned):
    images = fill(tmp_path / "files", NAMES)
    captions = [[f"one {n}", f"two {n}"] for n in NAMES]
    features = datasets.Features(image=datasets.Image(), caption=TEXTS)
    made = datasets.Dataset.from_dict(
        {"image": [stored(n) for n in NAMES], "caption": captions}, features=features
    )
    made.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict(train=made, test=made).save_to_disk(tmp_path / "split")
    made.to_parquet(tmp_path / "folder" / "train-00000-of-00001.parquet")
    lines = (
        json.dumps({"file_name": n, "caption": c}) + "\n"
        for n, c in zip(NAMES, captions, strict=True)
    )
    (images / "metadata.jsonl").write_text("".join(lines))
    table(tmp_path / "bytes.parquet", image=[picture(n) for n in NAMES], caption=captions)
    table(tmp_path / "paths.parquet", image=[f"files/{n}" for n in NAMES], caption=captions)
    table(tmp_path / "whole.parquet", image=[str(images / n) for n in NAMES], caption=captions)
    expected = hf.load(str(captioned), "train", text_columns=["caption"])
    for name in (
        "saved",
        "split",
        "folder",
        "files",
        "bytes.parquet",
        "paths.parquet",
        "whole.parquet",
    ):
        source = hf.load(str(tmp_path / name), "train", text_columns=["caption"])
        assert said(source) == said(expected), name
        assert [source.images.read(item.image) for item in source.splits["train"]] == [
            picture(n) for n in NAMES
        ], name
        assert not source.skipped, name
        source.images.close()


def test_several_caption_columns_are_the_captions_of_one_text(tmp_path):
    path = table(
        tmp_path / "c.parquet",
        image=[stored("a")],
        first=["A dog ."],
        second=[["A cat .", "A hat ."]],
    )
    for columns in (["first,second"], ["first", "second"]):
        assert said(hf.load(str(path), "train", text_columns=columns)) == [
            [("caption", None, ("A dog .", "A cat .", "A hat ."))]
        ]


def test_vqav2_as_the_hub_has_it_is_one_record_an_image_with_ids_types_and_ten_answers(tmp_path):
    answers = [
        [{"answer": a, "answer_id": n} for n, a in enumerate(["red"] * 9 + [""])],
        [{"answer": "two"}] * 10,
    ]
    path = table(
        tmp_path / "vqa.parquet",
        image=[stored("a"), stored("b"), stored("a")],
        image_id=[7, 8, 7],
        question_id=[70, 80, 71],
        question=["What color?", "How many?", "How many?"],
        answer_type=["other", "number", "number"],
        answers=[answers[0], answers[1], answers[1]],
    )
    columns = {"question_column": "question", "answer_column": "answers"}
    for id_column in ("image_id", None):  # by its id, or because its bytes are the same
        source = hf.load(str(path), "val", id_column=id_column, **columns)
        first, second = source.splits["val"]
        assert [t.id for t in first.record.texts] == ["70", "71"]
        assert first.record.texts[0].targets == ("red",) * 9 + ("",)
        assert first.record.texts[0].meta == {"answer_type": "other"}
        assert said(source, "val")[1] == [("vqa", "How many?", ("two",) * 10)]
        assert [item.record.image_id for item in (first, second)] == (
            ["7", "8"] if id_column else ["00000000", "00000001"]
        )
        assert source.notes["rows that show the image of an earlier one, joined with it"] == 1
    table(path, image=[stored(n) for n in "abc"], q=[" ", "Why?", "Why?"], a=["x", "", "so"])
    source = hf.load(str(path), "val", question_column="q", answer_column="a")
    assert said(source, "val") == [[("vqa", "Why?", ("so",))]]
    assert [s.name for s in source.skipped if s.kind == "empty text"] == ["row 0", "row 1"]
    table(path, image=[stored("a"), stored("b")], n=[1, 1], q=["?", "?"], a=["x", "y"])
    with pytest.raises(ShardError, match="row 1: n '1' came before, with another image"):
        hf.load(str(path), "val", question_column="q", answer_column="a", id_column="n")


def test_a_limit_ends_the_reading_and_says_so(captioned):
    source = hf.load(str(captioned), "train", text_columns=["caption"], limit=2)
    assert said(source) == said(hf.load(str(captioned), "train", text_columns=["caption"]))[:2]
    (note,) = [note for note, n in source.notes.items() if n and "--limit 2 stopped" in note]
    assert source.notes[note] == 2


def test_what_cannot_be_used_is_left_out_and_named(tmp_path):
    path = table(
        tmp_path / "dirty.parquet",
        image=[
            stored("a"),
            None,
            {"bytes": b"no image", "path": None},
            {"bytes": None, "path": "gone.jpg"},
            stored("b"),
        ],
        caption=["A dog .", "A cat .", "A hat .", "A bat .", " "],
    )
    summary = build(
        "hf", tmp_path / "out", dataset=str(path), split="train", text_columns=["caption"]
    )
    assert summary.splits["train"]["records"] == 1
    found = [json.loads(line) for line in summary.skipped.read_text().splitlines()]
    assert {(row["kind"], row["name"]) for row in found} == {
        ("text without image", "row 1"),
        ("undecodable image", "row 2"),
        ("text without image", "row 3"),
        ("empty text", "row 4"),
        ("image without text", "row 4"),
    }


@pytest.mark.parametrize(
    "path", ["/etc/hostname", "http://localhost/x.jpg", "file:///etc/hostname"]
)
def test_a_data_set_of_the_hub_reads_no_file_of_this_machine_and_asks_no_other_server(
    tmp_path, path
):
    images = hf.RowImages(hf.Path("owner/name"))
    with pytest.raises(ValueError, match="is not there"):
        images.add(0, {"bytes": None, "path": path})
    inside = "hf://datasets/owner/name@main/1.jpg"
    assert images.add(1, {"bytes": None, "path": inside}) == (inside, inside)
    with pytest.raises(ValueError, match="is not there"):
        hf.RowImages(tmp_path).add(0, inside)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"text_columns": ["captoin"]},
            r"--text-columns captoin: .* no such column; did you mean caption\? It has",
        ),
        (
            {"text_columns": ["caption"], "image_column": "picture"},
            r"--image-column picture: .* It has image, caption",
        ),
        ({}, r"needs --text-columns, or --question-column and --answer-column"),
        ({"question_column": "caption"}, r"belong together"),
        ({"text_columns": ["caption"], "limit": 0}, r"--limit is 0"),
        (
            {"text_columns": ["caption"], "dataset": "owner/none"},
            r"no file or folder here, and as an id of the hub: ",
        ),
        ({"text_columns": ["caption"], "dataset": "/no/such"}, r"there is no such file or folder"),
        (
            {"text_columns": ["caption"], "dataset": "broken.parquet"},
            r"cannot be opened: Parquet magic bytes",
        ),
        ({"text_columns": ["caption"], "dataset": "notes.txt"}, r"a file must be one of \.parquet"),
        ({"text_columns": ["caption"], "dataset": "empty"}, r"cannot be opened: .*any data files"),
        (
            {"text_columns": ["caption"], "dataset": "two", "split": "trian"},
            r"--split trian: .* did you mean train\?",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence_that_names_the_option(
    tmp_path, monkeypatch, captioned, options, says
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.parquet").write_bytes(b"no parquet at all")
    (tmp_path / "notes.txt").touch()
    (tmp_path / "empty").mkdir()
    if options.get("dataset") == "two":
        rows = datasets.Dataset.from_dict({"image": ["x"], "caption": ["y"]})
        datasets.DatasetDict(train=rows, test=rows).save_to_disk("two")
    given = {"dataset": str(captioned), "split": "train", **options}
    with pytest.raises(ShardError, match=says):
        hf.load(**given)


def test_without_a_network_nobody_waits_for_the_hub(monkeypatch):
    def unreachable():
        raise OSError("no route to host")

    monkeypatch.setattr("huggingface_hub.get_session", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    started = time.monotonic()
    with pytest.raises(ShardError, match="as an id of the hub: Couldn't reach 'owner/none'"):
        hf.load(dataset="owner/none", split="train", text_columns=["caption"])
    assert time.monotonic() - started < 10
    assert datasets.config.HF_HUB_OFFLINE
