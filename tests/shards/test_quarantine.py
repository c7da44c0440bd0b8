"""What could not be read is named once in a file, told by kind, and bounded by set."""

import json
import math
from collections import Counter

import pytest
from test_loader import batches, build, open_loader

from shards.files import ShardError
from shards.quarantine import Quarantine, count_fault, fault, most_unreadable, summary
from shards.stream import FirstOf, Mixture, Order


@pytest.mark.parametrize(
    ("images", "share", "most"),
    [
        (1_000_000, 0.001, 1000),
        (1000, 0.001, 20),  # at least 20
        (30, 0.001, 15),  # at most half
        (1, 0.001, 0),
        (100, 0.4, 40),
        (100, 0.9, 50),
        (100, 1, math.inf),
        (100, 0, 20),
    ],
)
def test_the_bound_is_a_share_but_at_least_20_and_at_most_half(images, share, most):
    assert most_unreadable(images, share) == most


def test_the_images_of_a_set_in_an_epoch_are_its_share_of_the_mixture():
    orders = [Order([60], 0, 1), Order([20], 0, 1, salt=1)]
    assert [Mixture(orders).images_of(s) for s in (0, 1)] == [60, 20]
    assert [Mixture(orders, [1, 3]).images_of(s) for s in (0, 1)] == [20, 60]
    first = FirstOf(Mixture(orders), 8, 0)
    assert [first.images_of(s) for s in (0, 1)] == [6, 2]


def test_a_sample_is_named_once_by_whoever_meets_it_and_a_torn_line_costs_nothing(tmp_path):
    path = tmp_path / "out" / "quarantine.jsonl"
    first, second = Quarantine(path), Quarantine(path)
    for quarantine in (first, second, Quarantine(path)):
        quarantine.add("set", 1, "one", "it is damaged")
    second.add("set", 2, "two", "it is damaged")
    first.add("set", 2, "two", "it is damaged")
    with open(path, "a") as file:
        file.write('{"set": "set", "index": 3, "ke')  # killed here
    first.add("set", 3, "three", "\udce9")
    Quarantine(path).add("set", 3, "three", "")
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line)["index"])
        except ValueError:
            continue
    assert rows == [1, 2, 3]
    Quarantine(None).add("set", 1, "one", "nowhere to be named")


def test_a_full_disk_stops_no_run(tmp_path, caplog):
    (tmp_path / "full").symlink_to("/dev/full")
    Quarantine(tmp_path / "full").add("set", 1, "one", "it is damaged")
    Quarantine(tmp_path / "full" / "below").add("set", 1, "one", "it is damaged")
    assert [("cannot name one of set" in record.message) for record in caplog.records] == [True] * 2


def test_faults_are_one_kind_where_they_differ_by_sample_alone():
    faults: Counter = Counter()
    for n in range(3):
        error = f"a/x-00000{n}.tar, offset {n}, key k{n}: the bytes have crc 0000000{n}, expected 0"
        count_fault(faults, fault("a", error))
    count_fault(faults, fault("a", "b.tar cannot be opened: [Errno 2] No such file: 'b.tar'"))
    assert summary(faults).startswith(
        "a: 3 x the bytes have crc N, expected N; a: 1 x b.tar cannot"
    )
    for n in range(5000):
        count_fault(faults, ("a", f"kind {chr(n + 1000)}"))
    assert len(faults) <= 1001, "memory does not grow with the kinds of faults"
    assert faults.total() == 5004


def test_a_loader_that_is_told_a_share_ends_beyond_it_and_names_the_set(tmp_path):
    bad = build(tmp_path / "bad", payload=lambda n: b"none" if n % 2 else b"some")

    def decode(sample):
        if sample.payload == b"none":
            raise OSError("no image")

    loader = open_loader(bad, decode=decode, max_unreadable=0.001)
    with pytest.raises(ShardError, match=r"24 of 61 in .*bad, 20 may be .*24 x OSError: no image"):
        batches(loader)
    batches(open_loader(bad, decode=decode, max_unreadable=1))
    batches(open_loader(bad, decode=decode))


def test_of_several_sets_the_broken_one_is_named(tmp_path):
    good = build(tmp_path / "good", payload=lambda n: b"some")
    bad = build(tmp_path / "bad", name="blues", payload=lambda n: b"none")

    def decode(sample):
        if sample.payload == b"none":
            raise OSError("no image")

    with pytest.raises(ShardError) as caught:
        batches(open_loader(good, bad, decode=decode, max_unreadable=0.001))
    assert f"of 61 in {bad}, 20 may be" in str(caught.value)
    assert good not in str(caught.value)
