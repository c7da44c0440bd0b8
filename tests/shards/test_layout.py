"""Shards of other makers: which of a sample's files is the picture, and where its text stands."""

import json
from dataclasses import replace

import pytest

from pictures import make_tar, picture
from shards import sidecar
from shards.files import ShardError
from shards.index import how_read, index_shards
from shards.layout import Layout
from shards.loader import Loader
from shards.manifest import Manifest
from shards.read import Reader
from shards.verify import verify


def document(**fields):
    return json.dumps({"url": "https://example.com/a.jpg", "width": 24, **fields}).encode()


def names(tmp_path):
    file = tmp_path / "classes.txt"
    file.write_text("cat\ndog\n")
    return file


# What lies beside `N.` in a sample, the options, and the text that is read.
FORMS = [
    ({"input.jpg": b"", "outputs.txt": b"a dog\n"}, (["input.jpg"], "outputs.txt"), ("a dog",)),
    ({"jpg": b"", "json": document(text="a dog")}, ([], None, "text"), ("a dog",)),
    ({"png": b"", "json": document(TEXT="a dog"), "txt": b"no"}, ([], None, "TEXT"), ("a dog",)),
    ({"jpg": b"", "json": document(captions=["a", "b"])}, ([], None, "captions"), ("a", "b")),
    ({"meta.json": document(caption="a dog"), "jpg": b""}, ([], ".meta.json"), ("a dog",)),
    ({"cls": b"1", "jpg": b""}, ([], None, None, names), ("dog",)),
    ({"in.image": b"", "jpg": b"other", "txt": b"a dog"}, (["IN.image"],), ("a dog",)),
]


@pytest.mark.parametrize(("files", "options", "texts"), FORMS)
def test_shards_of_other_makers_are_read_verified_and_sought_like_our_own(
    tmp_path, files, options, texts
):
    given = [option(tmp_path) if callable(option) else option for option in options]
    members = [
        (f"{n}.{end}", data or picture(str(n))) for n in range(6) for end, data in files.items()
    ]
    for shard in range(2):
        make_tar(tmp_path / "set" / f"{shard}.tar", [(f"{shard}{n}", d) for n, d in members])
    layout = Layout.of(*given)
    made = index_shards(tmp_path / "set", "theirs", "train", layout=layout)
    assert (made.samples, made.skipped) == (12, 0)
    assert how_read(made) == layout.told()
    manifest = Manifest.open(tmp_path / "set")
    reader = Reader(manifest)
    for read in (reader.read, reader.walk):
        assert read(7).record.texts[0].targets == texts
        assert read(7).payload == picture("1")
    assert verify(tmp_path / "set") == []
    loader = Loader([str(tmp_path / "set")], global_batch=4, shuffle=True)
    batches = [[s.known.key for s in batch] for _, batch in loader.iterate(epochs=1)]
    assert sorted(key for batch in batches for key in batch) == sorted(
        f"{shard}{n}" for shard in range(2) for n in range(6)
    )
    unlike = replace(manifest, layout=None)
    assert unlike.digest != manifest.digest  # other texts: another set


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (
            {"input.jpg": b"", "outputs.txt": b"a dog"},
            r"files are \.input\.jpg, \.outputs\.txt: say --image-member input\.jpg "
            r"--text-member outputs\.txt",
        ),
        ({"jpg": b"", "json": document(TEXT="a dog")}, r"say --text-field TEXT"),
        ({"jpg": b"", "json": document(alt=1)}, r"--text-field with one of its fields url, width"),
        ({"jpg": b"", "cls": b"3"}, r"--class-names FILE"),
        ({"jpg": b"no picture", "npy": b"1"}, r"none of them is a picture"),
    ],
)
def test_an_unknown_layout_is_refused_with_its_files_and_the_options_that_help(
    tmp_path, monkeypatch, files, says
):
    monkeypatch.setattr(sidecar, "NOT_UNDERSTOOD", 3)
    members = [
        (f"{n}.{end}", data or picture(str(n))) for n in range(5) for end, data in files.items()
    ]
    folder = make_tar(tmp_path / "set" / "0.tar", members)
    with pytest.raises(ShardError, match=says):
        index_shards(folder, "theirs", "train")
    assert [path.name for path in folder.iterdir()] == ["0.tar"]


def test_what_is_found_without_options_is_said_and_a_class_without_name_is_left_out(tmp_path):
    files = [("0.jpg", picture("0")), ("0.json", document(caption="a dog"))]
    found = index_shards(make_tar(tmp_path / "a" / "0.tar", files), "theirs", "train")
    assert how_read(found) == 'pictures from .jpg, records or their "caption" from .json'
    files = [("0.jpg", picture("0")), ("0.cls", b"1"), ("1.jpg", picture("1")), ("1.cls", b"2")]
    folder = make_tar(tmp_path / "b" / "0.tar", files)
    layout = Layout.of(class_names=names(tmp_path))
    assert index_shards(folder, "theirs", "train", layout=layout).skipped == 1
    assert "holds '2', expected a number from 0 to 1" in (folder / "skipped.jsonl").read_text()
    assert verify(folder) == []
