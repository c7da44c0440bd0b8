"""An index describes its files exactly, or opening the set says which file does not match."""

import json
import pickle
import shutil
from dataclasses import replace

import fsspec
import numpy as np
import pytest

from faulty_server import faulty_server
from shards import manifest as manifests
from shards.cache import Cache
from shards.files import ShardError, UnreachableError
from shards.index import upgrade_index
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record, Text
from shards.write import write_shards


def captioned(n):
    text = Text("a", "caption", (f"caption {n}", "é"))
    return Record(f"key{n:02d}", "toy", "train", str(n), (text,)), bytes([n]) * (100 + n), "jpg"


@pytest.fixture
def folder(tmp_path):
    write_shards(
        map(captioned, range(10)),
        tmp_path / "toy" / "train",
        dataset="toy",
        split="train",
        max_shard_samples=4,
    )
    return tmp_path / "toy" / "train"


def test_an_opened_set_is_the_one_that_was_written(tmp_path):
    written = write_shards(
        map(captioned, range(10)),
        tmp_path / "train",
        dataset="toy",
        split="train",
        max_shard_samples=4,
    )
    opened = Manifest.open(tmp_path / "train")
    assert opened == written
    assert (opened.samples, opened.texts, opened.kind, opened.split) == (10, 10, "images", "train")
    assert opened.starts.tolist() == [0, 4, 8, 10]
    assert opened.key(7) == "key07"
    assert opened.sidecar["targets"].tolist() == [2] * 10
    assert opened.sidecar["characters"].tolist() == [len("caption 0") + 1] * 10


def test_the_sidecar_stays_a_file_and_does_not_travel_with_a_pickle(folder):
    manifest = Manifest.open(folder)
    pickled = pickle.dumps(manifest)
    assert b"key07" not in pickled
    assert pickle.loads(pickled).sidecar["key"][7] == b"key07"


def test_the_digest_tells_other_content_and_not_another_place(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "elsewhere")
    assert Manifest.open(tmp_path / "elsewhere").digest == Manifest.open(folder).digest
    other = write_shards(
        map(captioned, range(11)), tmp_path / "other", dataset="toy", split="train"
    )
    assert other.digest != Manifest.open(folder).digest


def test_a_missing_shard_is_named(folder):
    (folder / "train-000001.tar").unlink()
    with pytest.raises(ShardError, match=r"train-000001\.tar is missing"):
        Manifest.open(folder)


def test_a_shard_of_another_size_is_named_with_found_and_expected(folder):
    shard = folder / "train-000002.tar"
    expected = shard.stat().st_size
    shard.write_bytes(shard.read_bytes()[:700])
    with pytest.raises(ShardError, match=rf"train-000002\.tar has 700 bytes, expected {expected}"):
        Manifest.open(folder)


def test_a_sidecar_of_another_set_is_refused(folder):
    sidecar = folder / "samples.bin"
    data = bytearray(sidecar.read_bytes())
    data[3] ^= 1
    sidecar.write_bytes(data)
    with pytest.raises(ShardError, match=r"samples\.bin has sha256 \w+, expected \w+"):
        Manifest.open(folder)


def test_a_sidecar_with_another_number_of_rows_is_refused(folder):
    manifest = Manifest.open(folder)
    with pytest.raises(ShardError, match=r"samples\.bin has \d+ bytes, expected 8 rows of \d+"):
        _ = replace(manifest, shards=manifest.shards[:2]).sidecar


def change(folder, edit):
    document = json.loads((folder / "index.json").read_text())
    edit(document)
    (folder / "index.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d.update(split="test"), "says digest"),
        (lambda d: d.pop("shards"), "'shards'"),
        (lambda d: d["shards"][0].update(samples="4"), "samples is '4', not a count"),
        (lambda d: d["shards"][0].update(name="../x.tar"), "leads out of the folder"),
        (lambda d: d.update(format=99), "format 99, expected 1"),
    ],
)
def test_an_index_that_was_changed_is_refused(folder, edit, says):
    change(folder, edit)
    with pytest.raises(ShardError, match=says):
        Manifest.open(folder)


def test_a_folder_that_is_no_set_says_what_to_do(folder, tmp_path):
    with pytest.raises(ShardError, match=r"there is no folder of shards at .*nowhere"):
        Manifest.open(tmp_path / "nowhere")
    with pytest.raises(ShardError, match="holds the splits train: name one of them"):
        Manifest.open(folder.parent)
    (folder / "index.json").unlink()
    with pytest.raises(ShardError, match="harness shards index"):
        Manifest.open(folder)
    (folder / "index.json").write_text("{")
    with pytest.raises(ShardError, match=r"index\.json cannot be read as JSON"):
        Manifest.open(folder)


@pytest.fixture
def remote(folder):
    """The set in fsspec's memory file system, as a remote one."""
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/sets/train", recursive=True)
    yield "memory://sets/train"
    memory.rm("/sets", recursive=True)


def test_a_remote_set_opens_like_a_local_one(folder, remote, tmp_path):
    cache = Cache(tmp_path / "cache", 10**6)
    for manifest in (Manifest.open(remote), Manifest.open(remote, cache)):
        assert manifest.digest == Manifest.open(folder).digest
        assert manifest.sidecar["key"][9] == b"key09"
    assert (cache.folder / manifest.sidecar_file.sha256).exists()


def test_reading_a_remote_set_without_a_cache_is_refused(remote):
    with pytest.raises(ShardError, match="needs a cache folder"):
        Reader(Manifest.open(remote))


def test_further_files_are_checked_by_hash(tmp_path):
    out = tmp_path / "train"
    write_shards(
        map(captioned, range(2)),
        out,
        dataset="d",
        split="train",
        extra_files={"controls.safetensors": b"abc"},
    )
    assert Manifest.open(out).read_file("controls.safetensors") == b"abc"
    (out / "controls.safetensors").write_bytes(b"abd")
    with pytest.raises(ShardError, match=r"controls\.safetensors has sha256"):
        Manifest.open(out).read_file("controls.safetensors")
    with pytest.raises(ShardError, match="names no file other"):
        Manifest.open(out).read_file("other")


@pytest.fixture
def by_shard(monkeypatch):
    """Every sidecar is too long to be read when its set is opened."""
    monkeypatch.setattr(manifests, "CHECKED_AT_ONCE", 0)


def damage(folder, row):
    with open(folder / "samples.bin", "r+b") as file:
        file.seek(row * manifests.sidecar_dtype(5).itemsize + 3)
        file.write(b"\xff")


def test_of_a_long_sidecar_the_rows_of_a_shard_are_checked_when_the_first_is_read(folder, by_shard):
    damage(folder, 5)
    opened = Manifest.open(folder)
    assert opened.is_checked_by_shard
    assert [opened.key(n) for n in (0, 3, 8, 9)] == ["key00", "key03", "key08", "key09"]
    for n in (4, 7):
        with pytest.raises(UnreachableError, match=r"the rows of train-000001\.tar have sha256"):
            opened.key(n)
    with pytest.raises(UnreachableError, match="it is damaged, or of another set"):
        _ = opened.sidecar["key"]
    assert Reader(opened).read(9).known.key == "key09"


def test_rows_that_are_read_shard_by_shard_are_the_same(folder, by_shard):
    opened = Manifest.open(folder)
    expected = np.fromfile(folder / "samples.bin", opened.sidecar.dtype)
    assert np.array_equal(opened.sidecar[1:9], expected[1:9])
    assert opened.sidecar["offset"].tolist() == expected["offset"].tolist()
    assert len(opened.sidecar[4:4]) == 0
    assert pickle.loads(pickle.dumps(opened)).sidecar[5] == expected[5]


def test_of_a_long_remote_sidecar_only_the_rows_that_are_read_are_fetched(
    folder, by_shard, tmp_path
):
    with faulty_server(folder) as server:
        opened = Manifest.open(server.url, Cache(tmp_path / "cache", 10**6))
        assert not server.sent["samples.bin"]
        assert [opened.key(n) for n in (4, 5, 9, 4)] == ["key04", "key05", "key09", "key04"]
        assert server.sent["samples.bin"] == 6 * opened.sidecar.dtype.itemsize
        again = Manifest.open(server.url, Cache(tmp_path / "cache", 10**6))
        assert again.key(8) == "key08"
        assert server.sent["samples.bin"] == 6 * opened.sidecar.dtype.itemsize, "it is in the cache"
        damage(folder, 1)
        with pytest.raises(ShardError, match=r"samples\.bin has sha256 \w+, expected \w+"):
            opened.key(0)


def test_a_process_reads_a_sidecar_once_however_often_the_set_is_opened(folder, monkeypatch):
    read = []
    before = manifests.Descriptor.read

    def counted(self, size, offset):
        read.append(self.path)
        return before(self, size, offset)

    monkeypatch.setattr(manifests.Descriptor, "read", counted)
    for _ in range(3):
        Manifest.open(folder)
    assert len(read) == 1
    damage(folder, 5)
    with pytest.raises(ShardError, match=r"samples\.bin has sha256"):
        Manifest.open(folder)


def test_an_index_without_hashes_of_rows_is_read_whole_and_gets_them_by_an_upgrade(
    folder, by_shard
):
    written = Manifest.open(folder)
    change(folder, lambda document: document.pop("rows_sha256"))
    older = Manifest.open(folder)
    assert (older.is_checked_by_shard, older.rows_sha256) == (False, ())
    assert older.digest == written.digest, "they are no part of what the set is"
    assert upgrade_index(folder) == Manifest.open(folder) == written
    change(folder, lambda document: document["rows_sha256"].pop())
    with pytest.raises(ShardError, match="rows_sha256 is no list of texts, one a shard"):
        Manifest.open(folder)
