"""One odd sample in a tar costs that sample, named with its reason: never the set."""

import io
import json
import os
import tarfile

import pytest

from pictures import make_tar, picture
from shards.files import ShardError
from shards.index import index_shards
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record, RecordError, Text
from shards.tar import members
from shards.verify import stats, verify

DEEP = b"[" * 100_000
CAPTION = {"id": "0", "task": "caption", "targets": ["a dog"]}


def jpeg():
    return picture("any")


def record(key, **text):
    fields = {"dataset": "toy", "split": "train", "image_id": "1"}
    return json.dumps({"key": key, **fields, "texts": [CAPTION | text]}).encode()


def index_of(tmp_path, files, tar_format=tarfile.USTAR_FORMAT):
    """Indexes a tar of these files, between two good samples; gives (read records, left out)."""
    around = [
        [(f"{key}.jpg", jpeg()), (f"{key}.txt", b"a good one")] for key in ("0first", "zlast")
    ]
    folder = make_tar(tmp_path / "set" / "x.tar", [*around[0], *files, *around[1]], tar_format)
    return read_back(folder)


def read_back(folder):
    manifest = index_shards(folder, "mine", "train", overwrite=True)
    reader = Reader(Manifest.open(folder))
    records = [reader.read(n).record for n in range(manifest.samples)]
    assert [reader.walk(n).record for n in range(manifest.samples)] == records
    assert verify(folder) == []
    skipped = folder / "skipped.jsonl"
    lines = skipped.read_text().splitlines() if skipped.exists() else []
    assert manifest.skipped == len(lines)
    return records, [json.loads(line) for line in lines]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"caption": 5}', 'its "caption" is 5'),
        (b'{"caption": NaN}', 'its "caption" is nan'),
        (b'{"caption": 0}', 'its "caption" is 0'),
        (b'{"caption": [["a", "b"]]}', 'its "caption" is'),
        (b'{"caption": ["a dog", 7]}', 'its "caption" is'),
        (b'{"caption": {"en": "a dog", "de": "ein Hund"}}', 'its "caption" is'),
        (b'{"caption": "\\ud800"}', "surrogates not allowed"),
        (b'{"caption": "\xed\xa0\x80"}', "can't decode"),
        (b'{"caption": "caf\xe9"}', "can't decode"),
        (DEEP, "recursion"),
        (b'{"caption": ' + b"9" * 5000 + b"}", "cannot be read"),
        (record("odd", targets="abc"), "'targets' is 'abc'"),
        (record("odd", targets={"en": "a", "de": "b"}), "'targets' is"),
        (record("odd", targets=[1]), "holds 1, which is no text"),
        (record("odd", targets=[["a"]]), "which is no text"),
        (record("odd", targets=[float("nan")]), "holds nan"),
        (record("odd", task="vqa", prompt="Is it?", targets=["yes", 5]), "holds 5"),
        (record("odd", task="vqa", prompt=5), "'prompt' is 5"),
        (record("odd", task=["vqa"]), "task is"),
        (record("odd", meta="x"), "'meta' is 'x'"),
        (record("odd", meta=[1]), "'meta' is"),
        (record("odd", id={}), "the id must be a string"),
        (record("odd", targets=["\ud800"]), "surrogates not allowed"),
        (record("odd").replace(b'"texts"', b'"texts": [], "texts_"'), "'texts' is empty"),
        (b'{"texts": 5}', "cannot be read"),
    ],
    ids=lambda value: str(value[:40]),
)
def test_a_text_that_is_none_costs_its_sample(tmp_path, content, says):
    records, left_out = index_of(tmp_path, [("odd.jpg", jpeg()), ("odd.json", content)])
    assert [record.key for record in records] == ["0first", "zlast"]
    (line,) = left_out
    assert line["key"] == "odd"
    assert says in line["reason"]


def test_a_sound_pair_of_escapes_and_numbers_that_are_no_text_are_no_fault(tmp_path):
    content = b'{"caption": "a \\ud83d\\ude00 face", "similarity": NaN, "nested": [[1]]}'
    records, left_out = index_of(tmp_path, [("a.jpg", jpeg()), ("a.json", content)])
    assert records[1].texts[0].targets == ("a \U0001f600 face",)
    assert not left_out


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_a_link_or_a_pipe_costs_its_sample(tmp_path, kind):
    folder = make_tar(tmp_path / "set" / "x.tar", [("a.jpg", jpeg()), ("a.txt", b"a dog")])
    with tarfile.open(folder / "x.tar", "a") as tar:
        link = tarfile.TarInfo("b.jpg")
        link.type = kind
        link.linkname = "/etc/passwd"
        link.size = 5  # of what it leads to: no content follows
        tar.addfile(link)
    records, left_out = read_back(folder)
    assert [record.key for record in records] == ["a"]
    assert "link or special file" in left_out[0]["reason"]


def test_two_files_of_one_name_cost_their_sample(tmp_path):
    twice = [("a.jpg", jpeg()), ("a.txt", b"a dog"), ("a.jpg", jpeg())]
    records, left_out = index_of(tmp_path, twice)
    assert len(records) == 2
    assert "a.jpg occurs twice" in left_out[0]["reason"]


def test_what_a_mac_adds_is_left_out_and_does_not_tear_samples_apart(tmp_path):
    files = [
        ("./._a.jpg", b"\0\5\26\7"),
        ("./a.jpg", jpeg()),
        ("./._a.txt", b"\0\5\26\7"),
        ("./a.txt", b"a dog"),
        ("./.DS_Store", b"x"),
    ]
    records, left_out = index_of(tmp_path, files)
    assert [record.texts[0].targets[0] for record in records] == [
        "a good one",
        "a dog",
        "a good one",
    ]
    assert [line["key"] for line in left_out] == ["./._a.jpg", "./._a.txt", "./.DS_Store"]
    assert all("Mac" in line["reason"] for line in left_out)


def test_a_list_of_what_was_left_out_that_is_damaged_is_a_problem_of_the_set(tmp_path):
    index_of(tmp_path, [("a.jpg", jpeg())])
    for content in (b"[1]\n", b"{}\n", b'{"shard": "y.tar", "offset": 1}\n', b"[" * 9000):
        (tmp_path / "set" / "skipped.jsonl").write_bytes(content)
        assert "skipped.jsonl does not name what" in verify(tmp_path / "set")[-1]
    (tmp_path / "set" / "skipped.jsonl").unlink()
    assert "skipped.jsonl does not name what" in verify(tmp_path / "set")[-1]


def test_stats_count_what_cannot_be_read_and_go_on(tmp_path):
    files = [
        (f"{n}.{end}", data) for n in range(3) for end, data in (("jpg", jpeg()), ("txt", b"x"))
    ]
    folder = make_tar(
        tmp_path / "set" / "x.tar", [*files, ("9.jpg", b"no picture"), ("9.txt", b"x")]
    )
    index_shards(folder, "mine", "train")
    offset = int(Manifest.open(folder).sidecar["payload_offset"][1])
    data = bytearray((folder / "x.tar").read_bytes())
    data[offset] ^= 1
    (folder / "x.tar").write_bytes(data)
    found = stats(folder)
    assert (found["records_read"], found["unreadable"], found["images_measured"]) == (2, 2, 2)


def test_keys_that_differ_only_outside_ascii_are_two_samples(tmp_path):
    keys = ("日本", "中国", "a/b", "a_b", "a b")
    files = [
        (f"{key}.{end}", data) for key in keys for end, data in (("jpg", jpeg()), ("txt", b"x"))
    ]
    records, left_out = index_of(tmp_path, files)
    assert not left_out
    assert len({record.key for record in records}) == 7
    assert [record.image_id for record in records][1:-1] == list(keys)


def test_names_that_are_not_utf_8_are_read(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(
        folder / "x.tar", "w", format=tarfile.USTAR_FORMAT, encoding="latin-1"
    ) as tar:
        for name, data in (("café.jpg", jpeg()), ("café.txt", b"a cup"), ("cafè.jpg", jpeg())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    records, left_out = read_back(folder)
    assert [record.image_id for record in records] == ["caf\\xe9"]
    assert [line["key"] for line in left_out] == ["caf\\xe8"]


@pytest.mark.parametrize(
    "fields",
    [
        {"size": "abc"},
        {"size": "-5"},
        {"size": "9" * 5000},
        {"size": "99999999999999"},
        {"path": ""},
        {"path": "\0"},
        {"mtime": "never", "uid": "x", "comment": "5 size=7\n"},
    ],
    ids=str,
)
def test_pax_fields_of_nonsense_cost_nothing_where_the_header_holds(tmp_path, fields):
    folder = tmp_path / "set"
    folder.mkdir()
    with tarfile.open(folder / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in (
            ("a.jpg", jpeg()),
            ("a.txt", b"a dog"),
            ("b.jpg", jpeg()),
            ("b.txt", b"x"),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.pax_headers = fields if name == "a.txt" else {}
            tar.addfile(info, io.BytesIO(data))
    records, left_out = read_back(folder)
    assert [record.key for record in records] == ["a", "b"]
    assert not left_out


def test_a_name_that_is_too_long_costs_its_sample(tmp_path):
    long = "x" * 300
    files = [(f"{long}.jpg", jpeg()), (f"{long}.txt", b"a dog")]
    records, left_out = index_of(tmp_path, files, tarfile.PAX_FORMAT)
    assert len(records) == 2
    assert "has 300 bytes" in left_out[0]["reason"]


def test_a_description_larger_than_any_is_not_read_into_memory():
    header = tarfile.TarInfo("long")
    header.type = tarfile.GNUTYPE_LONGNAME
    header.size = 2**30
    with pytest.raises(ShardError, match="1073741824 bytes"):
        next(members(lambda offset, n: header.tobuf()[:n], 2**31))


@pytest.mark.parametrize(
    ("name", "says"),
    [("x.tgz", "1 compressed tars"), ("x.tar", r"x\.tar: it is compressed \(gzip\)")],
)
def test_a_compressed_tar_is_called_that(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"\x1f\x8b\x08" + bytes(2000))
    with pytest.raises(ShardError, match=says):
        index_shards(tmp_path, "mine", "train")


def test_a_tar_beside_its_compressed_form_is_read(tmp_path):
    folder = make_tar(tmp_path / "set" / "x.tar", [("a.jpg", jpeg()), ("a.txt", b"a dog")])
    (folder / "x.tar.gz").write_bytes(b"\x1f\x8b")
    assert index_shards(folder, "mine", "train").samples == 1


def test_a_pipe_in_the_place_of_a_tar_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(ShardError, match="no plain file"):
        index_shards(tmp_path, "mine", "train")


def test_what_img2dataset_writes_beside_a_tar_is_no_problem(tmp_path):
    folder = make_tar(tmp_path / "set" / "00000.tar", [("a.jpg", jpeg()), ("a.txt", b"a dog")])
    index_shards(folder, "mine", "train")
    for name in ("00000_stats.json", "00000.parquet"):
        (folder / name).write_bytes(b"")
    assert verify(folder) == []
    (folder / "00001.parquet").write_bytes(b"")
    assert "00001.parquet is not named" in verify(folder)[0]


def test_a_record_that_cannot_be_written_says_why():
    for text in (Text("a", "caption", ("\ud800",)), Text("a", "caption", ("x",), meta={"a": {1}})):
        with pytest.raises(RecordError, match="record k cannot be written as JSON"):
            Record("k", "toy", "train", "1", (text,)).to_json()
