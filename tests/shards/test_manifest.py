"""An index describes its files exactly, or opening the set says which file does not match."""

import json
import pickle
import shutil
from dataclasses import replace

import fsspec
import pytest

from shards.cache import Cache
from shards.files import ShardError
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
