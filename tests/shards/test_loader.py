"""Order + reading: the same batches on any number of ranks and workers, nothing lost, nothing
skipped in silence.
"""

import io
import json
import logging
import multiprocessing
import os
import signal
import tracemalloc
from contextlib import closing
from itertools import islice

import fsspec
import pytest
import torch
from PIL import Image

from shards.files import ShardError
from shards.loader import Loader
from shards.read import Reader
from shards.record import Record, Text
from shards.stream import StreamState
from shards.write import write_shards

IMAGES, PER_SHARD = 61, 7


def jpeg(n):
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), (n * 4 % 256, 0, 0)).save(buffer, "JPEG")
    return buffer.getvalue()


def build(folder, images=IMAGES, name="reds", payload=jpeg):
    def records():
        for n in range(images):
            yield (
                Record(
                    f"{name}{n:03d}",
                    name,
                    "train",
                    str(n),
                    (Text(f"{n}", "caption", (f"red {n}",)),),
                ),
                payload(n),
                "jpg",
            )

    write_shards(records(), folder, dataset=name, split="train", max_shard_samples=PER_SHARD)
    return str(folder)


@pytest.fixture(scope="module")
def reds(tmp_path_factory):
    return build(tmp_path_factory.mktemp("reds") / "train")


@pytest.fixture(scope="module")
def blues(tmp_path_factory):
    return build(tmp_path_factory.mktemp("blues") / "train", 20, "blues")


def open_loader(*paths, **other):
    return Loader(paths, **{"global_batch": 8, "window_shards": 3, "seed": 5, **other})


def keys(samples):
    return [sample.record.key if sample.record else None for sample in samples]


def flat(parts):
    return [item for part in parts for item in part]


def batches(loader, state=None, epochs=1):
    with closing(loader.iterate(state, epochs)) as stream:
        return [keys(samples) for _, samples in stream]


def global_batches(*paths, world, **other):
    ranks = [
        batches(open_loader(*paths, rank=rank, world_size=world, **other), epochs=2)
        for rank in range(world)
    ]
    assert len({len(rank) for rank in ranks}) == 1, "all ranks take the same number of steps"
    return [flat(step) for step in zip(*ranks, strict=True)]


def test_every_record_comes_once_an_epoch_and_every_epoch_in_another_order(reds):
    seen = batches(open_loader(reds), epochs=2)
    first, second = flat(seen[:8]), flat(seen[8:])
    assert sorted(first) == sorted(second) == [f"reds{n:03d}" for n in range(IMAGES)]
    assert first != second
    assert [len(batch) for batch in seen] == [8] * 7 + [5] + [8] * 7 + [5]


@pytest.mark.parametrize(
    ("world", "workers"), [(2, 0), (3, 0), (8, 0), (1, 1), (1, 2), (1, 4), (2, 2), (3, 1), (8, 1)]
)
def test_the_global_batches_do_not_depend_on_ranks_and_workers(reds, blues, world, workers):
    assert global_batches(reds, blues, world=world, workers=workers) == global_batches(
        reds, blues, world=1
    )


def test_the_last_batch_is_short_filled_with_weight_0_or_dropped(reds):
    for world in (1, 3, 8):
        short = global_batches(reds, world=world)
        filled = global_batches(reds, world=world, last_batch="fill")
        dropped = global_batches(reds, world=world, last_batch="drop")
        assert [len(b) for b in filled] == [8] * 16
        assert [[key for key in b if key] for b in filled] == short
        assert dropped == short[:7] + short[8:15]
    loader = open_loader(reds, last_batch="fill")
    (state, samples) = list(loader.iterate(epochs=1))[-1]
    assert [s.weight for s in samples] == [1.0] * 5 + [0.0] * 3
    assert (state.epoch, state.position, loader.steps_per_epoch) == (0, IMAGES, 8)
    assert not loader.quarantined, "a filler is no damage"
    loader = open_loader(reds, last_batch="drop")
    assert list(loader.iterate(epochs=1))[-1][0].position == IMAGES, (
        "an epoch ends at `samples` in every mode"
    )
    assert loader.steps_per_epoch == 7


def test_dropped_images_are_counted_in_the_log_and_a_batch_that_drops_all_is_refused(reds, caplog):
    open_loader(reds, last_batch="drop")
    assert "the last 5 of 61 images" in caplog.text
    with pytest.raises(ShardError, match="61 images are less than a global batch of 64"):
        open_loader(reds, last_batch="drop", global_batch=64)


def test_sets_of_the_same_sizes_are_not_shuffled_alike(reds):
    with closing(open_loader(reds, reds).iterate(epochs=1)) as stream:
        samples = flat(samples for _, samples in stream)
    first, second = ([s.index for s in samples if s.set_index == n] for n in (0, 1))
    assert sorted(first) == sorted(second) == list(range(IMAGES))
    assert first != second


@pytest.mark.parametrize("weights", [None, [3, 1]])
def test_resuming_is_a_seek_on_any_number_of_ranks_and_workers(reds, blues, weights):
    with closing(open_loader(reds, blues, weights=weights).iterate(epochs=3)) as stream:
        whole = [(state, keys(samples)) for state, samples in stream]
    for n in (0, 4, 10, 11, 20):  # 11 steps an epoch: within, before, at and after its end
        state = StreamState.from_json(json.loads(json.dumps(whole[n][0].to_json())))
        rest = [batch for _, batch in whole[n + 1 :]]
        assert batches(open_loader(reds, blues, weights=weights), state, 3) == rest
        two = [
            batches(open_loader(reds, blues, weights=weights, rank=r, world_size=2), state, 3)
            for r in range(2)
        ]
        assert [a + b for a, b in zip(*two, strict=True)] == rest
    state, rest = whole[13][0], [batch for _, batch in whole[14:]]
    assert batches(open_loader(reds, blues, weights=weights, workers=2), state, 3) == rest


def test_a_resume_with_another_batch_size_still_gives_every_record_once(reds):
    first = list(islice(open_loader(reds).iterate(), 3))
    rest = batches(open_loader(reds, global_batch=10), first[-1][0])
    seen = flat(keys(samples) for _, samples in first) + flat(rest)
    assert sorted(seen) == [f"reds{n:03d}" for n in range(IMAGES)]


def test_a_state_of_another_order_is_refused_naming_both(reds, blues):
    state = next(open_loader(reds).iterate())[0]
    for other in (
        open_loader(blues),
        open_loader(reds, seed=6),
        open_loader(reds, window_shards=2),
    ):
        with pytest.raises(ShardError, match=f"{state.digest}.*{other.digest}"):
            other.iterate(state)


def process_of(sample):
    return os.getpid(), torch.get_num_threads()


def test_workers_outlive_the_epoch_and_end_with_the_iteration(reds):
    """Workers that start anew each epoch, or repeat epoch 0 as plain webdataset does, would show
    here.
    """
    loader = open_loader(reds, workers=2, decode=process_of)
    stream = loader.iterate()
    seen = [
        (s.epoch, keys(samples), samples)
        for s, samples in islice(stream, 3 * loader.steps_per_epoch)
    ]
    children = {process.pid for process in multiprocessing.active_children()}
    payloads = {sample.payload for _, _, samples in seen for sample in samples}
    assert {pid for pid, _ in payloads} == children
    assert len(children) == 2
    assert {threads for _, threads in payloads} == {1}, "a worker computes on one thread"
    orders = [[key for e, batch, _ in seen if e == epoch for key in batch] for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 3
    assert len({tuple(sorted(order)) for order in orders}) == 1
    stream.close()
    assert not children & {process.pid for process in multiprocessing.active_children()}


def test_workers_leave_the_answer_to_a_stop_signal_to_the_main_process(reds):
    """Slurm signals every process of a job: workers that died of it would take the last checkpoint
    with them.
    """
    expected = batches(open_loader(reds), epochs=5)
    with closing(open_loader(reds, workers=1, prefetch=1).iterate(epochs=5)) as stream:
        seen = [keys(next(stream)[1])]
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGTERM)
            os.kill(worker.pid, signal.SIGINT)
        assert seen + [keys(samples) for _, samples in stream] == expected


def test_iterating_leaves_the_models_random_numbers_alone(reds):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    batches(open_loader(reds))
    assert torch.equal(torch.rand(4), expected)


def decode(sample):
    return Image.open(io.BytesIO(sample.payload)).convert("RGB").getpixel((0, 0))[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_has_weight_0_is_counted_named_and_logged(tmp_path, caplog, workers):
    broken = {10, 33, 34}
    folder = build(tmp_path / "train", payload=lambda n: b"no image" if n in broken else jpeg(n))
    with open(
        f"{folder}/train-000000.tar", "r+b"
    ) as file:  # and one whose bytes are damaged in the tar
        file.seek(600)
        file.write(b"damage")
    loader = open_loader(
        folder, decode=decode, workers=workers, quarantine=tmp_path / "out" / "quarantine.jsonl"
    )
    with caplog.at_level(logging.WARNING), closing(loader.iterate(epochs=2)) as stream:
        samples = [sample for _, batch in stream for sample in batch]
    bad = [sample for sample in samples if sample.weight == 0]
    assert len(samples) == 2 * IMAGES, "nothing is left out"
    assert all(s.payload is None and s.error for s in bad)
    assert {s.index for s in bad} == {0, 10, 33, 34}
    assert loader.unreadable == len(bad) == 8
    assert sorted(loader.quarantined) == [(0, 0), (0, 10), (0, 33), (0, 34)]
    lines = [
        json.loads(line)
        for line in (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    ]
    assert {line["index"] for line in lines} == {0, 10, 33, 34}
    assert len(lines) == 4
    assert any("reds033: UnidentifiedImageError" in line["error"] for line in lines)
    assert any("train-000000.tar, offset 0, key reds000" in line["error"] for line in lines)
    assert len([r for r in caplog.records if "unreadable so far" in r.message]) == 4, (
        "the 1st, 2nd, 4th and 8th"
    )


def broken_decode(sample):
    raise TypeError("a mistake in the program")


def test_a_set_of_which_nothing_can_be_used_stops_the_run_and_says_why(reds):
    with pytest.raises(
        ShardError, match=r"61 samples in a row.*TypeError: a mistake in the program"
    ):
        batches(open_loader(reds, decode=broken_decode))


def test_workers_end_with_an_error_while_it_is_still_being_told(reds):
    before = set(multiprocessing.active_children())
    with pytest.raises(ShardError) as told:
        for _ in open_loader(reds, decode=broken_decode, workers=2).iterate():
            pass
    assert told.value.__traceback__ is not None, "which holds on to the frames"
    assert set(multiprocessing.active_children()) <= before


def test_sets_of_different_kinds_and_no_sets_are_refused(reds, tmp_path):
    record = Record("a", "f", "train", "1", (Text("1", "caption", ("a",)),))
    write_shards(
        [(record, b"x", "safetensors")],
        tmp_path / "f",
        dataset="f",
        split="train",
        kind="features",
        encoder={},
    )
    with pytest.raises(ShardError, match=r"holds features .* holds images"):
        open_loader(reds, str(tmp_path / "f"))
    with pytest.raises(ShardError, match="no set of shards"):
        open_loader()


def test_a_remote_set_streams_through_a_bounded_cache_and_too_small_a_one_is_refused(
    reds, tmp_path
):
    remote = fsspec.filesystem("memory")
    remote.put(f"{reds}/", "/reds/train", recursive=True)
    local = open_loader(reds)
    shards = sorted((shard.bytes for shard in local.manifests[0].shards), reverse=True)
    needed = sum(shards[:6]) + local.manifests[0].sidecar_file.bytes
    with pytest.raises(ShardError, match=f"{needed} bytes, the cache holds {needed - 1}"):
        open_loader("memory://reds/train", cache_dir=tmp_path / "cache", cache_bytes=needed - 1)
    with pytest.raises(ShardError, match=f"{needed} bytes, the cache holds 0"):
        open_loader("memory://reds/train")
    loader = open_loader("memory://reds/train", cache_dir=tmp_path / "cache", cache_bytes=needed)
    assert loader.digest == local.digest, "the same set, wherever it lies"
    expected = batches(local, epochs=2)
    for (_, samples), batch in zip(loader.iterate(epochs=2), expected, strict=True):
        assert keys(samples) == batch
        assert sum(file.stat().st_size for file in (tmp_path / "cache").glob("*/*")) <= needed
    assert not loader.quarantined
    of_all = sum(shards) + local.manifests[0].sidecar_file.bytes
    given = {
        "cache_dir": tmp_path / "cache",
        "images": local.samples,
    }  # of every shard, in an order without windows
    with pytest.raises(
        ShardError, match=f"the first {local.samples} images and the index are {of_all} bytes"
    ):
        open_loader("memory://reds/train", **given, cache_bytes=of_all - 1)
    few = open_loader("memory://reds/train", **given | {"images": 1}, cache_bytes=needed - 1)
    assert len(keys(next(few.iterate())[1])) == 1


def test_memory_does_not_grow_with_the_length_of_the_run(reds):
    stream = open_loader(reds).iterate()
    for _ in islice(stream, 40):
        pass
    tracemalloc.start()
    try:
        for _ in islice(
            stream, 400
        ):  # what waits for the garbage collector rises to its own level first
            pass
        before = tracemalloc.get_traced_memory()[0]
        for _ in islice(stream, 400):
            pass
        assert tracemalloc.get_traced_memory()[0] - before < 20_000
    finally:
        tracemalloc.stop()


def size_of(sample):
    return Image.open(io.BytesIO(sample.payload)).size


def test_flickr8k_streams_with_its_captions(shared_data, tmp_path):
    captions = {}
    for line in (shared_data / "flickr8k" / "Flickr8k.token.txt").read_text().splitlines()[:300]:
        name, text = line.split("\t")
        captions.setdefault(name.split("#")[0], []).append(text)

    def records():
        for name, texts in captions.items():
            path = shared_data / "flickr8k" / "images" / name
            text = Text(name, "caption", tuple(texts))
            yield Record(path.stem, "flickr8k", "train", name, (text,)), path.read_bytes(), "jpg"

    write_shards(
        records(), tmp_path / "train", dataset="flickr8k", split="train", max_shard_samples=9
    )
    loader = open_loader(str(tmp_path / "train"), decode=size_of, workers=1)
    samples = [sample for _, batch in loader.iterate(epochs=1) for sample in batch]
    assert {s.record.image_id: list(s.record.texts[0].targets) for s in samples} == captions
    assert {s.payload for s in samples} == {(224, 224)}
    assert samples[0].record == Reader(loader.manifests[0]).read(samples[0].index).record


class Once:
    """A decoder with a fault: at sample 20 `act` is called, the first `times` times."""

    def __init__(self, folder, act, times):
        self.folder = folder
        self.act = act
        self.times = times

    def __call__(self, sample):
        if sample.index == 20 and len(list(self.folder.iterdir())) < self.times:
            (self.folder / str(os.getpid())).touch()
            self.act()
        return sample.index


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory():
    raise MemoryError("no room for a picture")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("act", "said"),
    [
        (killed, "a data worker was ended by SIGKILL, as the system does when main memory is out"),
        (out_of_memory, "a data worker failed: MemoryError: no room for a picture"),
    ],
)
def test_a_data_worker_that_ends_is_started_again_once_and_nothing_is_lost(
    reds, tmp_path, caplog, act, said
):
    expected = batches(open_loader(reds), epochs=2)
    before = signal.getsignal(signal.SIGCHLD)
    with caplog.at_level(logging.WARNING):
        loader = open_loader(reds, workers=2, decode=Once(tmp_path, act, times=1))
        assert batches(loader, epochs=2) == expected
    (record,) = caplog.records
    assert record.getMessage() == f"rank 0: {said}; the data workers are started again"
    assert not loader.quarantined, "it is no fault of a sample"
    assert signal.getsignal(signal.SIGCHLD) == before, "torch's raises in the middle of a step"
    with pytest.raises(ShardError, match=f"{said}, a second time in epoch 0: take fewer workers"):
        batches(open_loader(reds, workers=2, decode=Once(tmp_path, act, times=3)), epochs=2)
