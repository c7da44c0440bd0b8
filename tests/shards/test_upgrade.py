"""An index of format 1 is read as it was, and rewritten when asked, whole or not at all; the set
stays the same one.
"""

import json
import os
import shutil
from contextlib import closing
from pathlib import Path

import pytest

from old_index import as_format_1
from pictures import make_tar, picture
from shards.files import ShardError
from shards.index import index_shards, upgrade_index
from shards.loader import Loader
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record, Text
from shards.stream import StreamState
from shards.verify import verify
from shards.write import write_shards

FORMATS = Path(__file__).parents[1] / "data" / "formats"
SETS = ("shards/train", "shards/dev", "features/train", "features/dev")


def captioned(n):
    text = Text("a", "caption", (f"caption {n}",))
    return Record(f"key{n:02d}", "toy", "train", str(n), (text,)), picture(str(n)), "jpg"


def read_all(folder):
    reader = Reader(Manifest.open(folder))
    return [reader.read(index) for index in range(reader.manifest.samples)]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def foreign(tmp_path):
    """Tars of others: captions in both places, more files than we need, samples to leave out."""
    found = [
        ("0.jpg", picture("0")),
        ("0.txt", b"a dog\n"),
        ("0.cls", b"3"),
        ("1.txt", b"beside"),
        ("1.jpg", picture("1")),
        ("1.json", json.dumps({"caption": ["a fox", "foxes"]}).encode()),
        ("2.jpg", picture("2")),
        ("3.json", json.dumps({"width": 32}).encode()),
        ("3.png", picture("3")),
        ("3.jpg", picture("4")),
        ("3.txt", b"none in .json"),
    ]
    folder = make_tar(tmp_path / "set" / "x.tar", found)
    index_shards(folder, "mine", "train")
    return as_format_1(folder)


@pytest.mark.parametrize("place", SETS)
def test_an_upgraded_set_gives_equal_records_and_bytes_and_is_the_same_set(tmp_path, place):
    folder = shutil.copytree(FORMATS / "version_1" / place, tmp_path / "set")
    document = json.loads((folder / "index.json").read_text())
    before = read_all(folder)
    old = Manifest.open(folder)
    new = upgrade_index(folder)
    assert (old.format, new.format, new.digest) == (1, 2, old.digest)
    assert read_all(folder) == before
    assert new.format_1_digest == document["digest"]
    assert Manifest.open(folder) == new
    assert not (folder / "index.bin").exists()
    kept = {name: data for name, data in files(folder).items() if "index" not in name}
    assert kept.pop("samples.bin")
    unchanged = files(FORMATS / "version_1" / place)
    assert kept == {name: data for name, data in unchanged.items() if "index" not in name}


def test_a_set_of_others_tars_is_upgraded_with_its_captions_and_what_it_left_out(foreign):
    before = read_all(foreign)
    assert [s.record.texts[0].targets for s in before] == [
        ("a dog",),
        ("a fox", "foxes"),
        ("none in .json",),
    ]
    assert [s.payload for s in before] == [picture("0"), picture("1"), picture("3")]
    new = upgrade_index(foreign)
    assert (new.skipped, new.format) == (1, 2)
    assert read_all(foreign) == before
    assert verify(foreign) == []
    assert new.digest == index_shards(foreign, "mine", "train", overwrite=True).digest


def test_an_upgrade_of_what_is_new_changes_nothing(foreign):
    upgrade_index(foreign)
    before = files(foreign)
    upgrade_index(foreign)
    assert files(foreign) == before


def test_a_set_that_is_not_as_its_index_says_is_left_as_it_was(foreign):
    tar = foreign / "x.tar"
    data = bytearray(tar.read_bytes())
    data[700] ^= 1
    tar.write_bytes(data)
    before = files(foreign)
    with pytest.raises(ShardError, match=r"not as their index says.*harness shards verify"):
        upgrade_index(foreign)
    assert files(foreign) == before


@pytest.mark.parametrize("moment", [("replace", "index.json"), ("unlink", "index.bin")])
def test_an_upgrade_that_is_killed_leaves_a_whole_set(foreign, monkeypatch, moment):
    before = read_all(foreign)
    owner = {"replace": os, "unlink": Path}[moment[0]]
    real = getattr(owner, moment[0])

    def killed(*paths, **options):
        if Path(paths[-1]).name == moment[1]:
            raise KeyboardInterrupt
        return real(*paths, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment[0], killed)
        with pytest.raises(KeyboardInterrupt):
            upgrade_index(foreign)
    assert Manifest.open(foreign).format == {"replace": 1, "unlink": 2}[moment[0]]
    assert read_all(foreign) == before
    upgrade_index(foreign)
    assert read_all(foreign) == before
    assert verify(foreign) == []


def test_a_state_of_format_1_goes_on_in_the_same_order_over_an_upgraded_or_rebuilt_set(tmp_path):
    def write():
        write_shards(
            map(captioned, range(12)),
            tmp_path / "train",
            dataset="toy",
            split="train",
            max_shard_samples=4,
            overwrite=True,
        )

    def keys(state=None):
        loader = Loader([str(tmp_path / "train")], global_batch=2, window_shards=2, seed=3)
        with closing(loader.iterate(state, 2)) as batches:
            return [[sample.record.key for sample in samples] for _, samples in batches], loader

    write()
    whole, _ = keys()
    as_format_1(tmp_path / "train")
    _, loader = keys()
    earlier = loader.digests[1]
    assert earlier != loader.digest
    state = StreamState(0, 6, earlier)  # as the version before format 2 wrote it
    for change in (lambda: None, lambda: upgrade_index(tmp_path / "train"), write):
        change()
        assert keys(state)[0] == whole[3:]
        assert keys(StreamState(0, 6, loader.digest))[0] == whole[3:]
