"""An index that several processes make, or one that was killed between, is that of one to the
byte.
"""

import shutil
import subprocess
import sys
import threading

import pytest

from pictures import make_tar, picture
from shards.files import ShardError
from shards.index import Job, index_shards
from shards.manifest import INDEX, SIDECAR, SKIPPED, Manifest
from shards.parts import Share
from shards.sidecar import Indexing
from shards.verify import verify

TARS = 5
FILES = (INDEX, SIDECAR, SKIPPED)


def make(folder):
    """Five tars of three samples; in each but the first a picture without a text."""
    for tar in range(TARS):
        members = []
        for n in range(3):
            members += [(f"{tar}-{n}.jpg", picture("a")), (f"{tar}-{n}.txt", b"caption %d" % n)]
        if tar:
            members.append((f"{tar}-alone.jpg", picture("a")))
        make_tar(folder / f"{tar}.tar", members)
    return folder


@pytest.fixture
def folder(tmp_path):
    return make(tmp_path / "train")


@pytest.fixture
def expected(folder, tmp_path):
    """What one process makes of the same tars in an equal folder."""
    index_shards(folder, "mine", "train")
    made = {name: (folder / name).read_bytes() for name in FILES}
    for name in FILES:
        (folder / name).unlink()
    return made


def test_several_processes_make_the_bytes_that_one_makes(folder, expected):
    first = Job(folder, "mine", "train", share=Share(0, 3))
    writing = threading.Thread(target=first.write)
    writing.start()  # it waits for the others
    for rank in (2, 1):
        Job(folder, "mine", "train", share=Share(rank, 3)).index_own()
    writing.join(30)
    assert {name: (folder / name).read_bytes() for name in FILES} == expected
    assert sorted(path.suffix for path in folder.iterdir()) == sorted(
        [".tar"] * TARS + [".json", ".jsonl", ".bin"]
    )
    assert verify(folder) == []
    Job(folder, "mine", "train", share=Share(1, 3)).index_own()  # too late: it is there
    assert len(list(folder.iterdir())) == TARS + 3


def test_what_was_killed_goes_on_after_its_last_whole_tar(folder, expected, monkeypatch):
    add = Indexing.add
    added = []

    def counted(indexing, location):
        added.append(location.rpartition("/")[2])
        if len(added) == 4:
            raise KeyboardInterrupt
        add(indexing, location)

    monkeypatch.setattr(Indexing, "add", counted)
    with pytest.raises(KeyboardInterrupt):
        index_shards(folder, "mine", "train")
    assert not (folder / INDEX).exists()
    index_shards(folder, "mine", "train")
    assert added[4:] == ["0.tar", "3.tar", "4.tar"]
    assert {name: (folder / name).read_bytes() for name in FILES} == expected


def test_a_tar_that_changed_since_the_kill_is_read_again(folder, monkeypatch):
    add = Indexing.add
    monkeypatch.setattr(
        Indexing, "add", lambda i, at: add(i, at) if "4" not in at[-5:] else sys.exit()
    )
    with pytest.raises(SystemExit):
        index_shards(folder, "mine", "train")
    monkeypatch.setattr(Indexing, "add", add)
    make_tar(folder / "2.tar", [("new.jpg", picture("a")), ("new.txt", b"a longer caption")])
    assert index_shards(folder, "mine", "train").samples == 3 * (TARS - 1) + 1
    assert verify(folder) == []


def test_a_key_that_occurs_in_two_tars_is_refused_naming_the_second(folder):
    shutil.copy(folder / "1.tar", folder / "3.tar")
    with pytest.raises(ShardError, match=r"3\.tar: the key '1-0' occurs again at offset 0"):
        index_shards(folder, "mine", "train")
    assert not (folder / INDEX).exists()


@pytest.mark.slow
def test_the_verb_as_two_processes_makes_the_same_index(folder, expected):
    line = [sys.executable, "-m", "harness", "shards", "index", str(folder), "--dataset", "mine"]
    done = subprocess.run([*line, "--processes", "2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("15 samples") == 1
    assert {name: (folder / name).read_bytes() for name in FILES} == expected
    again = subprocess.run([*line, "--processes=2"], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert again.stderr.count("is there already") == 1
    assert Manifest.open(folder).samples == 15
