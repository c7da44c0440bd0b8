"""One sample by its offset; damage of any kind is an error that names shard, offset and key."""

import functools
import http.server
import multiprocessing
import os
import pickle
import random
import shutil
import threading

import fsspec
import pytest

from old_index import as_format_1
from shards.cache import Cache
from shards.files import ShardError
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record, Text
from shards.write import write_shards

SAMPLES = 12


def captioned(n):
    text = Text("a", "caption", (f"caption {n}",))
    return (
        Record(f"key{n:02d}", "toy", "train", str(n), (text,)),
        random.Random(n).randbytes(700 + 100 * n),
        "jpg",
    )


@pytest.fixture
def folder(tmp_path):
    write_shards(
        map(captioned, range(SAMPLES)),
        tmp_path / "train",
        dataset="toy",
        split="train",
        max_shard_samples=4,
    )
    return tmp_path / "train"


def check(reader, indices=range(SAMPLES)):
    for n in indices:
        record, payload, extension = captioned(n)
        sample = reader.read(n)
        assert (sample.record, sample.payload, sample.extension, sample.index) == (
            record,
            payload,
            extension,
            n,
        )


def test_every_sample_is_read_in_any_order(folder):
    indices = list(range(SAMPLES))
    random.Random(0).shuffle(indices)
    check(Reader(Manifest.open(folder)), indices)


def test_a_sample_outside_the_set_is_an_index_error(folder):
    reader = Reader(Manifest.open(folder))
    for index in (-1, SAMPLES):
        with pytest.raises(IndexError):
            reader.read(index)


def test_the_number_of_open_files_is_bounded(folder):
    manifest = Manifest.open(folder)
    reader = Reader(manifest, max_open=2)
    check(reader)
    before = len(os.listdir("/proc/self/fd"))
    check(reader, [0, 4, 8] * 10)
    assert len(os.listdir("/proc/self/fd")) == before
    del reader
    assert len(os.listdir("/proc/self/fd")) == before - 2


def test_a_reader_travels_to_other_processes(folder):
    reader = Reader(Manifest.open(folder))
    check(reader)
    check(pickle.loads(pickle.dumps(reader)))
    child = multiprocessing.get_context("fork").Process(target=check, args=(reader,))
    child.start()
    check(reader)
    child.join()
    assert child.exitcode == 0


def damage(folder, index, at, change):
    """Changes one byte, `at` counted from the sample's offset; gives the words an error must
    contain.
    """
    row = Manifest.open(folder).sidecar[index]
    shard = folder / f"train-{index // 4:06d}.tar"
    data = bytearray(shard.read_bytes())
    place = int(row["offset"]) + at
    data[place] = change(data[place])
    shard.write_bytes(data)
    return rf"train-{index // 4:06d}\.tar, offset {row['offset']}, key key{index:02d}: .*"


@pytest.mark.parametrize(
    ("at", "says"),
    [
        (3, "no valid tar header at offset"),  # the name
        (130, "no valid tar header at offset"),  # the size
        (260, "no valid tar header at offset"),  # the magic
        (600, "the bytes have crc"),  # the image
    ],
)
@pytest.mark.parametrize("index", [0, 5])
@pytest.mark.parametrize("read", ["format 1", "read", "walk"])
def test_a_flipped_bit_is_noticed_wherever_it_is(folder, index, at, says, read):
    place = damage(folder, index, at, lambda byte: byte ^ 1)
    reader = Reader(Manifest.open(as_format_1(folder) if read == "format 1" else folder))
    if read == "read" and at < 512:  # a header, which format 2 does not need
        check(reader)
        return
    with pytest.raises(ShardError, match=place + says):
        reader.walk(index) if read == "walk" else reader.read(index)
    check(reader, [n for n in range(SAMPLES) if n != index])


def test_a_damaged_record_is_noticed(folder):
    row = Manifest.open(folder).sidecar[6]
    place = damage(folder, 6, int(row["size"]) - 5, lambda byte: byte ^ 1)
    with pytest.raises(ShardError, match=place + "the bytes have crc"):
        Reader(Manifest.open(folder)).read(6)


def test_a_shard_that_is_cut_while_it_is_read_is_noticed(folder):
    reader = Reader(Manifest.open(folder))
    check(reader)
    os.truncate(folder / "train-000001.tar", 4096)
    with pytest.raises(
        ShardError, match=r"train-000001\.tar, offset \d+, key key07: the file ends after 0 of \d+"
    ):
        reader.read(7)


def test_a_shard_that_vanishes_is_named(folder):
    manifest = Manifest.open(folder)
    (folder / "train-000002.tar").unlink()
    with pytest.raises(ShardError, match=r"train-000002\.tar cannot be opened"):
        Reader(manifest).read(11)


def test_a_sample_of_another_set_with_a_sound_header_is_noticed(folder, tmp_path):
    other = (
        (Record(f"fox{n:02d}", "toy", "train", "", captioned(n)[0].texts), *captioned(n)[1:])
        for n in range(4)
    )
    write_shards(other, tmp_path / "other", dataset="toy", split="train")
    manifest = Manifest.open(folder)
    old = Manifest.open(as_format_1(shutil.copytree(folder, tmp_path / "old")))
    for place in (folder, tmp_path / "old"):
        shutil.copy(tmp_path / "other" / "train-000000.tar", place)
    for read in (Reader(old).read, Reader(manifest).walk):
        with pytest.raises(ShardError, match="key key02: found a member of fox02"):
            read(2)
    with pytest.raises(ShardError, match="key key02: the bytes have crc"):
        Reader(manifest).read(2)


# The cache


@pytest.fixture
def served(folder):
    """The set by HTTP, and how often each file was asked for."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path.rpartition("/")[2])
            super().do_GET()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Handler, directory=folder)
    )
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def tars(asked):
    return sorted(name for name in asked if name.endswith(".tar"))


def test_remote_shards_are_downloaded_once(served, tmp_path):
    url, asked = served
    cache = Cache(tmp_path / "cache", 10**6)
    for _ in range(2):
        check(Reader(Manifest.open(url, cache), cache))
    assert tars(asked) == [f"train-{n:06d}.tar" for n in range(3)]


def size_of(cache):
    with cache._locked():
        return sum(path.stat().st_size for path in cache.folder.iterdir())


def test_the_cache_stays_within_its_bound_and_drops_the_least_recently_opened(served, tmp_path):
    url, asked = served
    shards = Manifest.open(url).shards
    cache = Cache(tmp_path / "cache", max(shard.bytes for shard in shards) * 2)

    def opened(n):
        os.close(cache.open(f"{url}/{shards[n].name}", shards[n].bytes, shards[n].sha256))
        assert size_of(cache) <= cache.max_bytes

    for n in (0, 1, 0, 2, 0):  # 2 takes the room of 1, since 0 was opened again
        opened(n)
    assert tars(asked) == [shards[n].name for n in (0, 1, 2)]
    opened(1)
    assert tars(asked).count(shards[1].name) == 2


def test_an_evicted_shard_stays_readable_while_it_is_open(served, tmp_path):
    url, _ = served
    manifest = Manifest.open(url)
    first, second = manifest.shards[:2]
    cache = Cache(tmp_path / "cache", max(first.bytes, second.bytes))
    descriptor = cache.open(manifest.location(0), first.bytes, first.sha256)
    os.close(cache.open(manifest.location(1), second.bytes, second.sha256))
    assert not (cache.folder / first.sha256).exists()
    assert len(os.pread(descriptor, first.bytes, 0)) == first.bytes
    os.close(descriptor)
    check(Reader(manifest, cache), [0, 4, 8, 1, 5, 9])


def test_a_reader_does_not_keep_the_disk_of_evicted_shards(served, tmp_path):
    url, _ = served
    manifest = Manifest.open(url)
    reader = Reader(
        manifest, Cache(tmp_path / "cache", max(shard.bytes for shard in manifest.shards))
    )
    check(reader)
    links = [os.fstat(descriptor.number).st_nlink for descriptor in reader._open.values()]
    assert links.count(0) <= 1


def read_all(url, folder, max_bytes, seed):
    reader = Reader(Manifest.open(url), Cache(folder, max_bytes))
    indices = list(range(SAMPLES)) * 3
    random.Random(seed).shuffle(indices)
    check(reader, indices)
    assert size_of(reader._cache) <= max_bytes


def test_several_processes_share_a_cache(served, tmp_path):
    url, asked = served
    total = sum(shard.bytes for shard in Manifest.open(url).shards)
    context = multiprocessing.get_context("fork")
    # First room for all: every shard comes once. Then for one shard at a time: they evict each
    # other's.
    for name, room in (("wide", total), ("tight", total // 2)):
        asked.clear()
        children = [
            context.Process(target=read_all, args=(url, tmp_path / name, room, seed))
            for seed in range(3)
        ]
        for child in children:
            child.start()
        for child in children:
            child.join(60)
        assert [child.exitcode for child in children] == [0, 0, 0]
        if name == "wide":
            assert tars(asked) == [f"train-{n:06d}.tar" for n in range(3)]


def test_a_download_left_by_a_killed_process_is_taken_over_or_removed(served, tmp_path):
    url, _ = served
    manifest = Manifest.open(url)
    cache = Cache(tmp_path / "cache", max(shard.bytes for shard in manifest.shards))
    for shard in manifest.shards[:2]:
        (cache.folder / f"{shard.sha256}.part").write_bytes(b"x" * shard.bytes)
    check(Reader(manifest, cache), [0, 9])
    assert [path.name for path in cache.folder.iterdir() if path.suffix == ".part"] == []


def test_a_shard_larger_than_the_cache_is_refused(served, tmp_path):
    url, _ = served
    with pytest.raises(
        ShardError, match=r"train-000000\.tar has \d+ bytes, the cache .* may hold only 1000"
    ):
        Reader(Manifest.open(url), Cache(tmp_path / "cache", 1000)).read(0)


def test_a_remote_shard_that_is_not_the_indexed_one_is_refused_and_not_kept(folder, tmp_path):
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/other", recursive=True)
    data = bytearray((folder / "train-000001.tar").read_bytes())
    data[900] ^= 1
    memory.pipe_file("/other/train-000001.tar", bytes(data))
    memory.pipe_file("/other/train-000002.tar", bytes(data[:2000]))
    cache = Cache(tmp_path / "cache", 10**6)
    reader = Reader(Manifest.open("memory://other"), cache)
    with pytest.raises(ShardError, match=r"memory://other/train-000001\.tar has sha256"):
        reader.read(4)
    with pytest.raises(ShardError, match=r"train-000002\.tar has 2000 bytes, expected \d+"):
        reader.read(8)
    memory.rm("/other/train-000000.tar")
    with pytest.raises(ShardError, match=r"train-000000\.tar does not exist"):
        reader.read(0)
    assert {path.suffix or path.name for path in cache.folder.iterdir()} == {
        ".lock",
        ".harness-cache",
        ".bad",
    }
    memory.rm("/other", recursive=True)
