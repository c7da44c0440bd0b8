"""What the nodes of a simulated cluster fetch: readers with caches of their own over one HTTP
server, each as one machine of the run.
"""

import threading
import time
from contextlib import closing

import pytest

from faulty_server import faulty_server
from shards import remote
from shards.files import ShardError
from shards.loader import Loader
from shards.record import Record, Text
from shards.write import write_shards

LANES = 8
SETS = {"many": 17, "few": 3}  # shards, of four samples
TEXTS = (Text("a", "caption", ("x",)),)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    for name, shards in SETS.items():
        write_shards(
            (
                (Record(f"{name}{n:03d}", name, "train", str(n), TEXTS), bytes([n]) * 700, "jpg")
                for n in range(4 * shards)
            ),
            root / name,
            dataset=name,
            split="train",
            max_shard_samples=4,
        )
    return root


def fetched(folder, tmp_path, nodes, epochs=2, ranks=1, lanes=LANES, **other):
    """Returns the bytes of shards that the server sent to all nodes, and what they read in all."""
    world = nodes * ranks
    seen = []
    with faulty_server(folder) as server:
        for rank in range(world):
            loader = Loader(
                [server.url],
                global_batch=16,
                rank=rank,
                world_size=world,
                ranks_here=ranks,
                lanes=lanes,
                cache_dir=tmp_path / f"node-{nodes}-{rank // ranks}",
                **{"cache_bytes": 10**6, **other},
            )
            with closing(loader.iterate(epochs=epochs)) as batches:
                seen += [sample.index for _, samples in batches for sample in samples]
    size = sum(shard.bytes for shard in loader.manifests[0].shards)
    assert sorted(seen) == sorted(list(range(loader.samples)) * epochs)
    return sum(n for name, n in server.sent.items() if name.endswith(".tar")) / size


@pytest.mark.parametrize(("nodes", "ranks"), [(1, 1), (2, 1), (4, 2), (8, 1), (8, 2)])
def test_a_set_is_fetched_once_in_all_whatever_the_number_of_nodes(folders, tmp_path, nodes, ranks):
    """With room for a node's part in its cache, over all epochs."""
    assert fetched(folders / "many", tmp_path, nodes, ranks=ranks) == 1.0


def test_without_lanes_every_node_fetches_every_shard(folders, tmp_path):
    assert 3.0 < fetched(folders / "many", tmp_path, 4, lanes=1) <= 4.0


def test_a_cache_of_two_windows_of_a_nodes_own_lanes_fetches_once_an_epoch(folders, tmp_path):
    size = max(path.stat().st_size for path in folders.glob("many/*.tar"))
    index = (folders / "many" / "samples.bin").stat().st_size
    room = {"window_shards": 8, "cache_bytes": 2 * 2 * size + index}  # two lanes, two windows
    assert fetched(folders / "many", tmp_path, 4, **room) <= 2.0
    room["cache_bytes"] -= size
    with pytest.raises(ShardError, match="for 2 of 8 lanes two windows of 8 shards and the index"):
        fetched(folders / "many", tmp_path / "less", 4, **room)


@pytest.mark.parametrize("nodes", [2, 8])
def test_of_a_set_with_fewer_shards_than_lanes_nodes_beside_each_other_share_one(
    folders, tmp_path, nodes
):
    most = (SETS["few"] + nodes - 1) / SETS["few"]
    assert 1.0 < fetched(folders / "few", tmp_path, nodes) <= most + 0.01


def test_ranks_that_no_lanes_can_be_dealt_to_may_read_every_shard(folders, tmp_path, caplog):
    assert 1.0 < fetched(folders / "many", tmp_path, 3) <= 3.0
    assert "8 lanes are no multiple or part of 3 processes" in caplog.text


def held(cache):
    return {path.name for path in cache.glob("harness-shards/*") if len(path.name) == 64}


def threads():
    return {t for t in threading.enumerate() if t.name == "shards ahead"}


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_is_fetched_ahead_is_asked_for_once_and_by_who_reads_it_with_patience(
    folders, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(remote, "_LONGEST_PAUSE", 0.01)
    before = threads()
    given = {"cache_dir": tmp_path, "cache_bytes": 10**6, "window_shards": 2, "global_batch": 4}
    with faulty_server(folders / "many") as server:
        loader = Loader([server.url], **given)
        later = loader._reading.order.lanes[0].windows_from(0, 0)[0][1][0]
        name = loader.manifests[0].shards[later].name
        server.next[name] = [503] * 4  # a HEAD and a GET at each attempt
        with closing(loader.iterate(epochs=1)) as batches:
            next(batches)
            wait_for(lambda: server.asked[name] == 1)
            assert "asked again" not in caplog.text
            seen = 4 + sum(len(samples) for _, samples in batches)
        assert "asked again" in caplog.text
        wait_for(lambda: before.issuperset(threads()))
    assert (seen, loader.unreadable) == (68, 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_window_is_fetched_while_this_one_is_read(folders, tmp_path, workers):
    before = threads()
    with faulty_server(folders / "many") as server:
        loader = Loader(
            [server.url],
            global_batch=4,
            lanes=2,
            world_size=2,
            window_shards=4,
            workers=workers,
            prefetch=1,
            cache_dir=tmp_path / "cache",
            cache_bytes=10**6,
        )
        (manifest,) = loader.manifests
        order = loader._reading.order.lanes[0].orders[0]
        positions = range(0, order.samples, 8)  # windows of two shards, eight samples
        windows = [
            {manifest.shards[n].sha256 for n in order.windows_from(0, at)[0]} for at in positions
        ]
        with closing(loader.iterate()) as batches:
            for _ in range(4):  # all that workers have read ahead is of the first window
                next(batches)
            shards = held(tmp_path / "cache") - {manifest.sidecar_file.sha256}
            wait_for(lambda: windows[0] | windows[1] <= held(tmp_path / "cache"))
            assert not windows[2] & shards
            for _ in range(4):
                next(batches)
            wait_for(lambda: windows[2] <= held(tmp_path / "cache"))
        wait_for(lambda: before.issuperset(threads()))
