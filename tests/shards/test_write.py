"""Shards appear whole or not at all, equal input gives equal bytes, and any WebDataset reader can
read them.
"""

import hashlib
import os

import pytest
import webdataset

from shards.files import ShardError
from shards.manifest import Manifest
from shards.record import Record, RecordError, Text
from shards.write import write_shards


def captioned(n, extension="jpg", key=None):
    text = Text("a", "caption", (f"caption {n}",))
    return (
        Record(key or f"key{n:02d}", "toy", "train", str(n), (text,)),
        bytes([n]) * (100 + n),
        extension,
    )


def write(folder, samples, **other):
    return write_shards(samples, folder, dataset="toy", split="train", **other)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_equal_input_gives_equal_bytes_at_another_time(tmp_path, monkeypatch):
    write(tmp_path / "a", map(captioned, range(9)), max_shard_samples=4)
    monkeypatch.setattr("time.time", lambda: 2_000_000_000.5)
    write(tmp_path / "b", map(captioned, range(9)), max_shard_samples=4)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert len(digests(tmp_path / "a")) == 3 + 3


def test_the_index_says_what_the_files_are(tmp_path):
    manifest = write(tmp_path / "a", map(captioned, range(9)), max_shard_samples=4)
    for shard in manifest.shards:
        data = (tmp_path / "a" / shard.name).read_bytes()
        assert (shard.bytes, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert [shard.samples for shard in manifest.shards] == [4, 4, 1]


def test_a_shard_is_closed_before_it_passes_its_bound_in_bytes(tmp_path):
    manifest = write(tmp_path / "a", map(captioned, range(9)), max_shard_bytes=3 * 2048)
    assert [shard.samples for shard in manifest.shards] == [3, 3, 3]


@pytest.mark.parametrize("extension", ["jpg", "png"])  # sorted before and after .json
def test_plain_webdataset_reads_every_sample_with_its_security_on(tmp_path, monkeypatch, extension):
    monkeypatch.setattr(webdataset.utils, "enforce_security", True)
    write(tmp_path / "a", (captioned(n, extension) for n in range(9)), max_shard_samples=4)
    shards = [str(path) for path in sorted((tmp_path / "a").glob("*.tar"))]
    found = list(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in found] == [f"key{n:02d}" for n in range(9)]
    for n, sample in enumerate(found):
        record, payload, _ = captioned(n)
        assert sample[extension] == payload
        assert Record.from_json(sample["json"]) == record


def failing():
    yield captioned(0)
    raise OSError("the image folder went away")


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(OSError, match="went away"):
        write(tmp_path / "a", failing())
    assert list(tmp_path.iterdir()) == []


def test_a_failed_overwrite_leaves_the_old_set_whole(tmp_path):
    write(tmp_path / "a", map(captioned, range(3)))
    before = digests(tmp_path / "a")
    with pytest.raises(OSError, match="went away"):
        write(tmp_path / "a", failing(), overwrite=True)
    assert digests(tmp_path / "a") == before
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_at_the_last_file_leaves_nothing(tmp_path, monkeypatch):
    def full(manifest, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shards.write.write_index", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a", map(captioned, range(3)))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_build_left_is_removed_and_a_living_one_is_left_alone(tmp_path):
    host = os.uname().nodename
    living, killed, elsewhere = f".a.{host}.1", f".a.{host}.99999999", ".a.other.99999999"
    for name in (living, killed, elsewhere):
        (tmp_path / name).mkdir()
    write(tmp_path / "a", map(captioned, range(3)))
    assert {path.name for path in tmp_path.iterdir()} == {"a", living, elsewhere}


def test_an_existing_set_is_replaced_only_when_asked(tmp_path):
    write(tmp_path / "a", map(captioned, range(3)))
    with pytest.raises(ShardError, match="already holds shards"):
        write(tmp_path / "a", map(captioned, range(4)))
    write(tmp_path / "a", map(captioned, range(4)), overwrite=True)
    assert Manifest.open(tmp_path / "a").samples == 4
    assert os.listdir(tmp_path) == ["a"]


def killed(act, name, call):
    """Runs `act` in a process of its own that ends hard at the n-th call of os.NAME."""
    child = os.fork()
    if not child:
        real = getattr(os, name)
        calls = iter(range(1, call))

        def counted(*given, **named):
            if next(calls, None) is None:
                os._exit(9)
            return real(*given, **named)

        setattr(os, name, counted)
        act()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize(("name", "call"), [("rename", 1), ("rename", 2), ("rmdir", 1)])
def test_a_process_killed_while_it_replaces_a_set_leaves_one_that_the_next_call_settles(
    tmp_path, name, call
):
    write(tmp_path / "a", map(captioned, range(3)))
    killed(lambda: write(tmp_path / "a", map(captioned, range(4)), overwrite=True), name, call)
    if not (tmp_path / "a").exists():
        with pytest.raises(ShardError, match=r"was being replaced.*lies at .*\.a\.replaced"):
            Manifest.open(tmp_path / "a")
    with pytest.raises(ShardError, match="already holds shards"):
        write(tmp_path / "a", map(captioned, range(5)))
    assert Manifest.open(tmp_path / "a").samples == (4 if name == "rmdir" else 3)
    write(tmp_path / "a", map(captioned, range(5)), overwrite=True)
    assert Manifest.open(tmp_path / "a").samples == 5
    assert os.listdir(tmp_path) == ["a"], "nothing stays for ever"


def test_a_folder_with_other_files_is_refused_and_an_empty_one_taken(tmp_path):
    (tmp_path / "a").mkdir()
    write(tmp_path / "a", map(captioned, range(3)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ShardError, match="is not empty"):
        write(tmp_path / "b", map(captioned, range(3)))
    assert (tmp_path / "b" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("samples", "error", "says"),
    [
        ([captioned(1), captioned(2), captioned(1)], ShardError, "'key01' occurs twice"),
        ([captioned(1, "safetensors")], ShardError, "extension 'safetensors' in a set of images"),
        ([captioned(1, key="a.b")], RecordError, "key 'a.b'"),
        ([captioned(1, key="k" * 96)], ShardError, "more than 100 characters"),
        ([], ShardError, "no sample to write"),
    ],
)
def test_what_cannot_be_stored_is_named_and_nothing_is_written(tmp_path, samples, error, says):
    with pytest.raises(error, match=says):
        write(tmp_path / "a", samples)
    assert list(tmp_path.iterdir()) == []
