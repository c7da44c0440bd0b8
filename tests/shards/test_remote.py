"""Data that fail in passing lose nothing; data that stay away stop the run; what is wrong is not
fetched for every sample; and nothing of anybody else is touched.
"""

import errno
import os
import sys
import threading
import time
from contextlib import closing

import fsspec
import pytest
from fsspec.registry import _registry as registered

from faulty_server import faulty_server
from harness.errors import explain
from old_index import as_format_1
from shards import cache as caches
from shards import remote
from shards.cache import Cache
from shards.files import ShardError, UnreachableError
from shards.index import index_shards
from shards.loader import Loader
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record, Text
from shards.remote import Patience
from shards.write import write_shards

SAMPLES = 12
SHARDS = [f"train-{n:06d}.tar" for n in range(3)]
FILES = ["index.json", "samples.bin", *SHARDS]
QUICK = Patience(attempts=4, seconds=5.0)


def captioned(n):
    text = Text("a", "caption", (f"caption {n}",))
    return Record(f"key{n:02d}", "toy", "train", str(n), (text,)), bytes([n]) * 900, "jpg"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("sets") / "train"
    write_shards(
        map(captioned, range(SAMPLES)), out, dataset="toy", split="train", max_shard_samples=4
    )
    return out


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setattr(remote, "_LONGEST_PAUSE", 0.01)
    with faulty_server(folder) as state:
        yield state


def loader(server, tmp_path, patience=QUICK, **other):
    return Loader(
        [server.url],
        global_batch=4,
        cache_dir=tmp_path / "cache",
        cache_bytes=10**6,
        patience=patience,
        **other,
    )


def keys(loaded, epochs=1):
    with closing(loaded.iterate(epochs=epochs)) as batches:
        return [s.record.key if s.record else s.error for _, batch in batches for s in batch]


ALL = [f"key{n:02d}" for n in range(SAMPLES)]


@pytest.mark.parametrize("fault", [503, 429, 500, "cut", "reset", "hang"])
def test_what_fails_in_passing_is_asked_for_again_and_no_sample_is_lost(server, tmp_path, fault):
    for name in FILES:
        # an attempt is a HEAD and a GET; what was reset aiohttp itself asks for again, once
        server.next[name] = [fault] * (3 if fault == "hang" else 6)
    patience = Patience(attempts=4, seconds=0.3 if fault == "hang" else 5.0)
    loaded = loader(server, tmp_path, patience)
    assert sorted(keys(loaded)) == ALL
    assert not loaded.quarantined


@pytest.mark.parametrize("workers", [0, 2])
def test_data_that_do_not_answer_are_no_unreadable_samples(server, tmp_path, workers):
    loaded = loader(server, tmp_path, workers=workers)
    for name in SHARDS:
        server.always[name] = 503
    with pytest.raises(UnreachableError) as told:
        keys(loaded)
    assert "train-00000" in str(told.value)
    assert "503" in str(told.value)
    assert "after 4 attempts" in str(told.value)
    assert "Traceback" not in str(told.value)
    assert not loaded.quarantined


def test_a_server_that_hangs_is_a_time_out_and_is_said(server, tmp_path, caplog):
    server.always["index.json"] = "hang"
    with pytest.raises(UnreachableError, match=r"index\.json cannot be read.*no answer within 0.2"):
        Manifest.open(server.url, patience=Patience(2, 0.2))
    assert "asked again" in caplog.text


def test_a_shard_that_is_not_there_costs_its_samples_and_is_asked_for_once(server, tmp_path):
    server.always[SHARDS[1]] = 404
    loaded = loader(server, tmp_path, workers=2)
    found = keys(loaded, epochs=2)
    missing = [text for text in found if "does not exist" in text]
    assert len(missing) == 8
    assert sorted(set(found) - set(missing)) == ALL[:4] + ALL[8:]
    assert server.asked[SHARDS[1]] <= 2  # one of fsspec's for the size, and none for each sample


@pytest.mark.parametrize("status", [401, 403])
def test_a_refusal_is_final_after_the_credentials_were_read_anew(server, status, tmp_path):
    server.always["index.json"] = status
    with pytest.raises(UnreachableError, match=r"is refused.*taken from FSSPEC_HTTP"):
        Manifest.open(server.url, patience=QUICK)
    assert server.asked["index.json"] == 2
    server.always.clear()
    server.next["index.json"] = [status, status]  # HEAD and GET of one attempt
    assert Manifest.open(server.url, patience=QUICK).samples == SAMPLES


def test_credentials_that_were_renewed_are_used(server):
    made = []

    class Renewed(fsspec.get_filesystem_class("http")):
        def __init__(self, *given, **named):
            made.append(self)
            super().__init__(*given, **named)

    old = fsspec.get_filesystem_class("http")
    fsspec.register_implementation("http", Renewed, clobber=True)
    try:
        server.next["index.json"] = [403, 403]
        Manifest.read_index(server.url, patience=QUICK)
    finally:
        fsspec.register_implementation("http", old, clobber=True)
    assert len(made) == 2


def test_a_shard_with_wrong_bytes_is_remembered_by_all_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "_LONGEST_PAUSE", 0.01)
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in folder.iterdir():
        data = bytearray(path.read_bytes())
        if path.name == SHARDS[1]:
            data[700] ^= 1
        (broken / path.name).write_bytes(data)
    with faulty_server(broken) as server:
        loaded = loader(server, tmp_path, workers=2)
        found = keys(loaded, epochs=3)
        assert sum("it is not the indexed file" in text for text in found) == 12
        assert server.asked[SHARDS[1]] == 2
        (broken / SHARDS[1]).write_bytes((folder / SHARDS[1]).read_bytes())
        assert sorted(keys(loader(server, tmp_path))) == ALL, "a later run tries it anew"


def test_a_cache_touches_nothing_but_its_own_files(server, folder, tmp_path):
    place = tmp_path / "cache"
    (place / "harness-shards").mkdir(parents=True)
    (place / "harness-shards" / ".harness-cache").touch()
    thesis = [place / "thesis.tex", place / "harness-shards" / "thesis.tex", place / ("a" * 64)]
    for path in thesis:
        path.write_text("years of work")
        os.utime(path, (0, 0))
    manifest = Manifest.open(server.url)
    cache = Cache(place, max(shard.bytes for shard in manifest.shards))
    reader = Reader(manifest, cache)
    for n in range(SAMPLES):  # room for one shard: each evicts the last
        reader.read(n)
    assert [path.read_text() for path in thesis] == ["years of work"] * 3
    assert len(list(cache.folder.glob("?" * 64))) == 1


def test_a_folder_of_that_name_which_is_somebody_elses_is_refused(tmp_path):
    (tmp_path / "harness-shards").mkdir()
    (tmp_path / "harness-shards" / "thesis.tex").write_text("years of work")
    with pytest.raises(ShardError, match=r"is no cache of harness.*another data\.cache_dir"):
        Cache(tmp_path, 10**6)


def test_a_full_disk_under_the_cache_is_a_full_disk(server, tmp_path, monkeypatch):
    loaded = loader(server, tmp_path)
    before = os.pwrite

    def full(number, data, offset):
        if offset:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return before(number, data[:100], offset)

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(UnreachableError, match=r"cache.*No space left on device.*make room"):
        keys(loaded)
    assert not loaded.quarantined
    for thread in threading.enumerate():  # which fetches ahead, and meets the same
        if thread.name == "shards ahead":
            thread.join(20)
    assert not list(caches.Cache(tmp_path / "cache", 1).folder.glob("*.part"))


def test_short_reads_are_read_on_and_an_error_of_the_disk_is_asked_again(folder, monkeypatch):
    monkeypatch.setattr(remote, "_LONGEST_PAUSE", 0.01)
    reader = Reader(Manifest.open(folder))
    whole = os.pread
    failures = [3]

    def flaky(number, size, offset):
        failures[0] -= 1
        if failures[0] >= 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return whole(number, max(1, size // 3), offset)

    monkeypatch.setattr("os.pread", flaky)
    assert [reader.read(n).known.key for n in range(SAMPLES)] == ALL
    failures[0] = 10**6
    with pytest.raises(UnreachableError, match=r"cannot be read, after 7 attempts.*Input/output"):
        reader.read(0)


@pytest.mark.parametrize("name", ["samples.bin", "index.bin"])
def test_a_sidecar_cut_short_while_it_is_used_is_an_error_and_no_crash(tmp_path, name):
    out = tmp_path / "train"
    write_shards(map(captioned, range(SAMPLES)), out, dataset="toy", split="train")
    if name == "index.bin":
        as_format_1(out)
    loaded = Loader([str(out)], global_batch=4, workers=1)
    os.truncate(out / name, 100)
    with pytest.raises(UnreachableError, match=rf"{name} was changed while it was in use"):
        keys(loaded)


def test_a_remote_sidecar_without_a_cache_lies_in_no_memory(server):
    manifest = Manifest.open(server.url)
    assert manifest.sidecar["key"].tolist() == [key.encode() for key in ALL]
    assert manifest.sidecar[3:5]["texts"].tolist() == [1, 1]
    assert [row["key"] for row in manifest.sidecar][11] == b"key11"


@pytest.mark.parametrize(
    ("url", "extra", "module"), [("gs://b/train", "gcs", "gcsfs"), ("s3://b/train", "s3", "s3fs")]
)
def test_a_kind_of_url_without_its_package_is_one_sentence_with_the_extra(
    monkeypatch, url, extra, module, tmp_path
):
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(registered, url.partition(":")[0], raising=False)
    for ask in (
        lambda: Manifest.open(url),
        lambda: Cache(tmp_path, 10**6).open(f"{url}/a.tar", 10, "0" * 64),
        lambda: index_shards(url, "toy", "train", out=tmp_path / "i"),
        lambda: index_shards(f"{url}/a.tar", "toy", "train", out=tmp_path / "i"),
    ):
        with pytest.raises(ShardError) as told:
            ask()
        sentence = explain(told.value)
        assert f"{module} is not installed: pip install" in sentence
        assert f"[{extra}]" in sentence


def test_an_unknown_kind_of_url_is_one_sentence():
    with pytest.raises(ShardError, match=r"carrier://pigeon/index\.json cannot be read: Protocol"):
        Manifest.open("carrier://pigeon")


def test_a_mark_of_a_bad_file_ends_after_an_hour(server, tmp_path):
    server.always[SHARDS[0]] = 404
    cache = Cache(tmp_path, 10**6, QUICK)
    reader = Reader(Manifest.open(server.url, cache), cache)
    with pytest.raises(ShardError, match="does not exist"):
        reader.read(0)
    server.always.clear()
    with pytest.raises(ShardError, match="does not exist"):
        reader.read(0)
    (bad,) = cache.folder.glob("*.bad")
    old = time.time() - caches._BAD_SECONDS - 1
    os.utime(bad, (old, old))
    assert reader.read(0).known.key == ALL[0]
