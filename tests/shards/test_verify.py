"""What is wrong with a set is found and named by its place; shards made elsewhere are indexed as
they are.
"""

import io
import json
import random
import tarfile

import fsspec
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from pictures import make_tar
from shards.cache import Cache
from shards.files import ShardError
from shards.index import index_shards
from shards.manifest import Manifest
from shards.read import Reader
from shards.record import Record, Text
from shards.verify import stats, verify
from shards.write import write_shards

SAMPLES = 12


def jpeg(n, side=32):
    noise = random.Random(n).randbytes(3 * side * side)
    buffer = io.BytesIO()
    Image.frombytes("RGB", (side, side), noise).save(buffer, "JPEG")
    return buffer.getvalue()


def captioned(n):
    caption = Text("a", "caption", (f"caption {n}", "a dog"))
    question = Text("b", "vqa", ("yes",) * 10, "Is it?")
    return Record(f"key{n:02d}", "toy", "train", str(n), (caption, question)), jpeg(n), "jpg"


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


def test_a_sound_set_has_no_problems(folder):
    done = []
    assert verify(folder, on_progress=done.append) == []
    assert sum(done) == SAMPLES


def change(path, at, to=None):
    data = bytearray(path.read_bytes())
    data[at] = data[at] ^ 1 if to is None else to
    path.write_bytes(data)


def offset_of(folder, index):
    return int(Manifest.open(folder).sidecar["offset"][index])


def test_a_flipped_bit_in_an_image_is_named(folder):
    offset = offset_of(folder, 5)
    change(folder / "train-000001.tar", offset + 700)
    (problem,) = verify(folder)
    assert f"train-000001.tar, offset {offset}, key key05: the bytes have crc" in problem


def test_a_damaged_header_is_named_once_and_the_samples_behind_it_are_still_checked(folder):
    broken, behind = offset_of(folder, 5), offset_of(folder, 7)
    change(folder / "train-000001.tar", broken + 3)
    change(folder / "train-000001.tar", behind + 700)
    first, second = verify(folder)
    assert (
        f"train-000001.tar, offset {broken}, key key05: no valid tar header at offset {broken}"
        in first
    )
    assert f"train-000001.tar, offset {behind}, key key07: the bytes have crc" in second


def test_a_header_overwritten_with_zeros_is_no_end_of_the_shard(folder):
    offset = offset_of(folder, 6)
    data = bytearray((folder / "train-000001.tar").read_bytes())
    data[offset : offset + 512] = bytes(512)
    (folder / "train-000001.tar").write_bytes(data)
    assert f"offset {offset}, key key06" in verify(folder)[0]


def test_a_truncated_shard_is_named_with_all_it_lost(folder):
    shard, offset = folder / "train-000002.tar", offset_of(folder, 10)
    shard.write_bytes(shard.read_bytes()[: offset + 600])
    problems = verify(folder)
    assert "train-000002.tar has" in problems[0]
    assert [
        f"key key{n}" in problem for n, problem in zip((10, 11), problems[1:], strict=True)
    ] == [True, True]


def test_a_bit_in_the_padding_is_found_by_the_hash(folder):
    change(folder / "train-000000.tar", offset_of(folder, 1) - 1)
    (problem,) = verify(folder)
    assert "train-000000.tar has sha256" in problem


def test_missing_and_unknown_files_are_named(folder):
    (folder / "train-000001.tar").unlink()
    (folder / "train-000009.tar").write_bytes(b"")
    missing, unknown = verify(folder)
    assert "train-000001.tar is missing" in missing
    assert "train-000009.tar is not named in index.json" in unknown


def test_a_damaged_sidecar_and_a_missing_index_are_named(folder):
    change(folder / "samples.bin", 0)
    assert "samples.bin has sha256" in verify(folder)[0]
    (folder / "index.json").unlink()
    assert "holds tars and no index.json" in verify(folder)[0]


def test_an_image_that_was_undecodable_from_the_start_is_named(tmp_path):
    samples = [captioned(0), (captioned(1)[0], b"<html>not found</html>", "jpg")]
    write_shards(samples, tmp_path / "train", dataset="toy", split="train")
    (problem,) = verify(tmp_path / "train")
    assert "key key01: the image cannot be decoded" in problem


def feature(n, tokens=4):
    patches_PD = np.full((tokens, 6), n, np.float16)
    return captioned(n)[0], safetensors.numpy.save({"patches_PD": patches_PD}), "safetensors"


def test_features_of_another_shape_are_named(tmp_path):
    encoder, other = (
        {"tokens": 4, "width": 6},
        {"kind": "features", "dataset": "toy", "split": "train"},
    )
    write_shards([feature(0), feature(1)], tmp_path / "good", encoder=encoder, **other)
    assert verify(tmp_path / "good") == []
    write_shards([feature(0), feature(1, tokens=5)], tmp_path / "bad", encoder=encoder, **other)
    (problem,) = verify(tmp_path / "bad")
    assert "key key01: patches_PD has shape (5, 6), expected (4, 6)" in problem


def test_stats_count_what_is_there(folder):
    found = stats(folder)
    assert (found["samples"], found["texts"], found["targets"], found["shards"]) == (12, 24, 144, 3)
    assert found["tasks"]["caption"]["targets"] == 24
    assert found["tasks"]["vqa"]["texts"] == 12
    assert found["tasks"]["vqa"]["prompt_characters"] == {"p5": 6, "p50": 6, "p95": 6, "p100": 6}
    assert found["image_sizes"] == {"32x32": 12}
    assert found["bytes"] == sum(path.stat().st_size for path in folder.glob("*.tar"))
    json.dumps(found)


def test_real_flickr8k_is_written_read_and_verified(shared_data, tmp_path):
    captions = {}
    for line in (shared_data / "flickr8k" / "Flickr8k.token.txt").read_text().splitlines():
        name, _, caption = line.partition("\t")
        captions.setdefault(name.partition("#")[0], []).append(caption)
    names = [
        name for name in sorted(captions) if (shared_data / "flickr8k" / "images" / name).exists()
    ][:200]

    def records():
        for name in names:
            text = Text(name, "caption", tuple(captions[name]))
            image = (shared_data / "flickr8k" / "images" / name).read_bytes()
            yield (
                Record(name.removesuffix(".jpg"), "flickr8k", "train", name, (text,)),
                image,
                "jpg",
            )

    write_shards(
        records(), tmp_path / "train", dataset="flickr8k", split="train", max_shard_samples=60
    )
    assert verify(tmp_path / "train") == []
    assert stats(tmp_path / "train")["image_sizes"] == {"224x224": 200}
    reader = Reader(Manifest.open(tmp_path / "train"))
    assert reader.read(123).record.texts[0].targets == tuple(captions[names[123]])


# Shards made elsewhere


def test_the_index_of_our_own_shards_is_made_anew_the_same(folder):
    digest = Manifest.open(folder).digest
    with pytest.raises(ShardError, match="is there already"):
        index_shards(folder, "toy", "train")
    assert index_shards(folder, "toy", "train", overwrite=True).digest == digest
    (folder / "index.json").unlink()
    (folder / "samples.bin").unlink()
    assert index_shards(folder, "toy", "train").digest == digest
    assert verify(folder) == []


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
@pytest.mark.parametrize("depth", ["", "part/" * 15, "a-very-long-folder-name/" * 5 + "é/"])
def test_captions_in_json_or_txt_in_any_order_become_records(tmp_path, tar_format, depth):
    files = [
        ("0.jpg", jpeg(0)),
        ("0.txt", b"a dog\n"),
        ("1.json", json.dumps({"caption": "a cat", "width": 32}).encode()),
        ("1.jpg", jpeg(1)),
        ("2.txt", b"beside"),
        ("2.JPG", jpeg(2)),
        ("2.json", json.dumps({"caption": ["a fox", "foxes"]}).encode()),
    ]
    make_tar(tmp_path / "set" / "x.tar", [(depth + name, data) for name, data in files], tar_format)
    manifest = index_shards(tmp_path / "set", "mine", "train")
    samples = [Reader(Manifest.open(tmp_path / "set")).read(n) for n in range(manifest.samples)]
    assert [sample.record.texts[0].targets for sample in samples] == [
        ("a dog",),
        ("a cat",),
        ("a fox", "foxes"),
    ]
    assert [sample.payload for sample in samples] == [jpeg(0), jpeg(1), jpeg(2)]
    assert samples[1].record.image_id == f"{depth}1"
    assert verify(tmp_path / "set") == []


def test_what_is_no_sample_is_left_out_counted_and_named(tmp_path):
    files = [
        ("README", b"hello"),
        ("a.jpg", jpeg(0)),
        ("a.txt", b"a dog"),
        ("b.jpg", jpeg(1)),
        ("c.jpg", jpeg(2)),
        ("c.txt", b"  "),
        ("d.txt", b"no picture"),
    ]
    manifest = index_shards(make_tar(tmp_path / "set" / "x.tar", files), "mine", "train")
    assert (manifest.samples, manifest.skipped) == (1, 4)
    lines = [
        json.loads(line) for line in (tmp_path / "set" / "skipped.jsonl").read_text().splitlines()
    ]
    assert [line["key"] for line in lines] == ["README", "b", "c", "d"]
    assert all(line["shard"] == "x.tar" and line["reason"] for line in lines)
    assert verify(tmp_path / "set") == []


def files_of(*names):
    return [(name, jpeg(0) if name.endswith("jpg") else b"a dog") for name in names]


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a.jpg", "b.jpg", "a.txt", "b.txt"), r"the key 'a' occurs again at offset \d+"),
        (("a.jpg", "a.txt", "a.jpg"), r"a\.jpg occurs twice"),
        (("a.txt", "b.txt"), "no sample with image and text"),
    ],
)
def test_keys_that_cannot_be_told_apart_are_refused(tmp_path, names, says):
    folder = make_tar(tmp_path / "set" / "x.tar", files_of(*names))
    with pytest.raises(ShardError, match=says):
        index_shards(folder, "mine", "train")
    assert [path.name for path in folder.iterdir()] == ["x.tar"]


def test_indexing_a_damaged_tar_names_shard_and_offset_and_leaves_nothing(folder):
    offset = offset_of(folder, 6)
    for name in ("index.json", "samples.bin", "statistics.bin"):
        (folder / name).unlink()
    shard = folder / "train-000001.tar"
    whole = shard.read_bytes()
    change(shard, offset + 3)
    with pytest.raises(
        ShardError, match=rf"train-000001\.tar: no valid tar header at offset {offset}"
    ):
        index_shards(folder, "toy", "train")
    for size, says in (
        (offset + 600, "the data ends inside the member"),
        (offset, "without its end marker"),
    ):
        shard.write_bytes(whole[:size])
        with pytest.raises(ShardError, match=rf"train-000001\.tar: .*{says}"):
            index_shards(folder, "toy", "train")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"train-{n:06d}.tar" for n in range(3)
    ]


def test_remote_shards_are_indexed_from_afar(folder, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.put_file(str(path), f"/bucket/{path.name}")
    with pytest.raises(ShardError, match="--out"):
        index_shards("memory://bucket", "toy", "train")
    cache = Cache(tmp_path / "cache", 10**6)
    for source in ("memory://bucket", "memory://bucket/train-{000000..000002}.tar"):
        index_shards(source, "toy", "train", out=tmp_path / "index", overwrite=True)
        manifest = Manifest.open(tmp_path / "index")
        assert manifest.digest == Manifest.open(folder).digest
        assert Reader(manifest, cache).read(11).record == captioned(11)[0]
        assert verify(tmp_path / "index") == []
    memory.rm("/bucket", recursive=True)


def test_local_shards_may_be_indexed_from_another_folder(folder, tmp_path):
    index_shards(folder, "toy", "train", out=tmp_path / "index")
    assert Reader(Manifest.open(tmp_path / "index")).read(3).record == captioned(3)[0]
    with pytest.raises(ShardError, match=r"holds no \.tar files"):
        index_shards(tmp_path / "index", "toy", "train")
    with pytest.raises(ShardError, match="cannot be listed"):
        index_shards(tmp_path / "nowhere", "toy", "train")
