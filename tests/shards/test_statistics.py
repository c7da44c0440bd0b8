"""What a picture is without a look at its content: stored with its set, the same when it is
computed anew, and never another's.
"""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from faulty_server import faulty_server
from pictures import OFFICIAL, encoded, fill, make_tar, picture
from shards.build import build
from shards.cache import Cache
from shards.files import ShardError, write_whole
from shards.index import index_shards
from shards.manifest import Manifest
from shards.origin import indices_at_source, pictures_of, source_of
from shards.read import Reader
from shards.record import Record, Text
from shards.statistics import COLUMNS, picture_statistics, rows_of, statistics_of
from shards.verify import verify
from shards.write import write_shards

SAMPLES = 5
VERSION_1 = OFFICIAL / "formats" / "version_1"
FEATURES = {"kind": "features", "encoder": {"tokens": 2, "width": 3}}


def captioned(n, payload=None):
    text = Text("a", "caption", (f"caption {n}",))
    record = Record(f"key{n:02d}", "toy", "train", str(n), (text,))
    return record, payload or picture(f"{n}.jpg", 20 + n, 16), "jpg"


def featured(n, row_K):
    features = safetensors.numpy.save({"patches_PD": np.full((2, 3), n, np.float16)})
    return captioned(n)[0], features, "safetensors", row_K


def write(folder, samples, **other):
    return write_shards(samples, folder, dataset="toy", split="train", max_shard_samples=2, **other)


@pytest.fixture
def images(tmp_path):
    return write(tmp_path / "images", map(captioned, range(SAMPLES)))


@pytest.fixture
def expected():
    return np.stack([statistics_of(captioned(n)[1]) for n in range(SAMPLES)])


def without_statistics(folder):
    """Makes it a set as every version wrote it before there were statistics."""
    index = folder / "index.json"
    document = json.loads(index.read_text())
    for name in ("statistics", "origin", "origin_relative", "origin_digest"):
        del document[name]
    index.write_text(json.dumps(document))
    (folder / "statistics.bin").unlink(missing_ok=True)
    return Manifest.open(folder)


# ---- one picture ---------------------------------------------------------------------------------


def named(row_K):
    return dict(zip(COLUMNS, row_K.tolist(), strict=True))


def test_the_columns_are_brightness_shares_of_colours_and_sizes():
    image = Image.new("RGB", (40, 10), (255, 0, 0))
    image.paste((0, 40, 255), (0, 0, 10, 10))  # a quarter of it
    row_K = picture_statistics(image, 1234)
    found = named(row_K)
    assert (row_K.dtype, row_K.shape) == (np.float32, (28,))
    shares = {"red_7": 0.75, "red_0": 0.25, "blue_7": 0.25, "blue_0": 0.75}
    shares |= {"green_0": 0.75, "green_1": 0.25}
    for name in COLUMNS[1:-3]:
        assert found[name] == shares.get(name, 0.0), name
    assert (found["width"], found["height"], found["bytes"]) == (40, 10, 1234)
    grey = 0.75 * 0.299 * 255 + 0.25 * (0.587 * 40 + 0.114 * 255)
    assert found["brightness"] == pytest.approx(grey / 255)


def test_white_is_1_black_is_0_and_grey_is_what_pillow_calls_it():
    levels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)
    image = Image.fromarray(levels)
    grey = np.asarray(image.convert("L")).mean() / 255
    assert named(picture_statistics(image, 1))["brightness"] == pytest.approx(grey, abs=2e-3)
    for colour, level in (("white", 1), ("black", 0)):
        row_K = picture_statistics(Image.new("RGB", (3, 3), colour), 1)
        assert named(row_K)["brightness"] == pytest.approx(level)


def test_a_picture_counts_as_people_see_it():
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(Image.new("RGB", (40, 10)), exif=exif.tobytes())
    found = named(statistics_of(turned))
    assert (found["width"], found["height"], found["bytes"]) == (10, 40, len(turned))
    clear = encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0)), "PNG")
    assert named(statistics_of(clear))["brightness"] == pytest.approx(1)


# ---- a set of pictures ---------------------------------------------------------------------------


def test_a_set_stores_the_row_of_each_sample_in_their_order(images, expected):
    opened = Manifest.open(images.folder)
    assert opened == images
    assert opened.statistics_file.columns == COLUMNS
    assert opened.statistics_file.bytes == SAMPLES * len(COLUMNS) * 4
    np.testing.assert_array_equal(rows_of(opened, [3, 0, 3]), expected[[3, 0, 3]])
    np.testing.assert_array_equal(opened.statistics["row"], expected)
    data = opened.read_file("statistics.bin")
    np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(SAMPLES, -1), expected)
    assert rows_of(opened, []).shape == (0, len(COLUMNS))
    assert verify(images.folder) == []


def test_stored_rows_are_read_and_no_picture_is(images, expected, monkeypatch):
    monkeypatch.setattr(Reader, "read", lambda *given: pytest.fail("a picture was read"))
    np.testing.assert_array_equal(rows_of(images, range(SAMPLES)), expected)


def test_an_old_set_opens_with_its_digest_and_its_rows_come_from_its_pictures(images, expected):
    old = without_statistics(Path(images.folder))
    assert old.statistics_file is None
    assert old.digest == images.digest
    np.testing.assert_array_equal(rows_of(old, range(SAMPLES)), expected)
    with pytest.raises(ShardError, match=r"index\.json names no statistics"):
        _ = old.statistics
    assert verify(old.folder) == []


def test_sets_of_format_1_have_rows_by_their_pictures_and_features_of_then_have_none():
    pictures = Manifest.open(VERSION_1 / "shards" / "train")
    rows_SK = rows_of(pictures, range(pictures.samples))
    payloads = [Reader(pictures).read(n).payload for n in range(pictures.samples)]
    np.testing.assert_array_equal(rows_SK, np.stack(list(map(statistics_of, payloads))))
    assert rows_of(Manifest.open(VERSION_1 / "features" / "train"), [0]) is None


def replace_statistics(folder, data, **other):
    info = write_whole(folder / "statistics.bin", data)
    index = folder / "index.json"
    document = json.loads(index.read_text())
    document["statistics"] |= {"bytes": info.bytes, "sha256": info.sha256, **other}
    index.write_text(json.dumps(document))


def test_columns_of_another_version_are_not_taken_for_these(images, expected):
    replace_statistics(Path(images.folder), bytes(SAMPLES * 4), columns=["contrast"])
    opened = Manifest.open(images.folder)
    assert opened.statistics["row"].tolist() == [[0.0]] * SAMPLES
    np.testing.assert_array_equal(rows_of(opened, [1]), expected[[1]])
    assert verify(images.folder) == []


@pytest.mark.parametrize("columns", ["abc", [1], None])
def test_columns_that_are_no_names_are_named(images, columns):
    index = Path(images.folder) / "index.json"
    document = json.loads(index.read_text())
    document["statistics"]["columns"] = columns
    index.write_text(json.dumps(document))
    with pytest.raises(ShardError, match=r"index\.json is not a complete index: .*the columns of"):
        Manifest.open(images.folder)


def test_a_picture_that_cannot_be_decoded_has_a_row_of_nan_stored_or_not(tmp_path, expected):
    samples = [captioned(0), captioned(1, b"no picture"), captioned(2)]
    write(tmp_path / "train", samples)
    for opened in (Manifest.open, without_statistics):
        rows_SK = rows_of(opened(tmp_path / "train"), range(3))
        assert np.isnan(rows_SK[1]).all()
        np.testing.assert_array_equal(rows_SK[[0, 2]], expected[[0, 2]])


def test_a_damaged_file_of_statistics_is_named_in_one_sentence(images):
    path = Path(images.folder) / "statistics.bin"
    whole = path.read_bytes()
    path.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    (problem,) = verify(images.folder)
    assert f"{path} has sha256 " in problem
    with pytest.raises(ShardError, match=r"statistics\.bin has sha256 \w+, expected"):
        rows_of(Manifest.open(images.folder), [0])
    path.write_bytes(whole[:-4])
    (problem,) = verify(images.folder)
    assert f"{path} has {len(whole) - 4} bytes, expected {len(whole)}" in problem
    path.unlink()
    (problem,) = verify(images.folder)
    assert f"{path} is missing" in problem


def test_a_file_of_another_number_of_rows_is_named(images):
    replace_statistics(Path(images.folder), bytes(4 * 112))
    (problem,) = verify(images.folder)
    assert "statistics.bin has 448 bytes, expected 5 rows of 112" in problem


def test_an_index_made_anew_needs_no_statistics_and_keeps_the_digest(images, expected):
    anew = index_shards(images.folder, "toy", "train", overwrite=True)
    assert (anew.digest, anew.statistics_file) == (images.digest, None)
    assert verify(images.folder) == []
    np.testing.assert_array_equal(rows_of(anew, range(SAMPLES)), expected)


def built(out, split, names, **options):
    """Builds a split of drawings that lie beside `out`."""
    lines = out.parent / f"{split}.jsonl"
    rows = [{"image": name, "text": "a thing", "split": split} for name in names]
    lines.write_text("\n".join(map(json.dumps, rows)))
    build("image-folder", out, images=out.parent / "images", jsonl=lines, **options)
    return Manifest.open(out / split)


@pytest.mark.parametrize("short_side", [None, 12])
def test_a_build_stores_the_rows_of_what_lies_in_its_shards(tmp_path, short_side):
    names = [f"{n}.jpg" for n in range(4)]
    fill(tmp_path / "images", names)
    (tmp_path / "images" / "1.jpg").write_bytes(b"no picture")  # left out: no row must shift
    manifest = built(tmp_path / "out", "train", names, short_side=short_side)
    reader = Reader(manifest)
    payloads = [reader.read(n).payload for n in range(manifest.samples)]
    assert len(payloads) == 3
    np.testing.assert_array_equal(
        manifest.statistics["row"], np.stack(list(map(statistics_of, payloads)))
    )


def test_a_split_that_is_added_leaves_the_rows_of_the_others(tmp_path):
    names = [f"{n}.jpg" for n in range(4)]
    fill(tmp_path / "images", names)
    built(tmp_path / "out", "train", names[:2])
    built(tmp_path / "out", "dev", names[2:])
    for split, its in (("train", names[:2]), ("dev", names[2:])):
        rows_SK = np.stack([statistics_of(picture(name)) for name in its])
        found = Manifest.open(tmp_path / "out" / split)
        np.testing.assert_array_equal(found.statistics["row"], rows_SK)


def test_the_rows_stay_a_file_and_do_not_travel_with_a_pickle(images, expected):
    _ = images.statistics
    again = pickle.loads(pickle.dumps(images))
    assert "statistics" not in vars(again)
    np.testing.assert_array_equal(rows_of(again, [4]), expected[[4]])


# ---- a remote set --------------------------------------------------------------------------------


def test_a_remote_set_has_its_rows_with_and_without_a_cache(images, expected, tmp_path):
    cache = Cache(tmp_path / "cache", 10**6)
    with faulty_server(Path(images.folder)) as server:
        for manifest in (Manifest.open(server.url), Manifest.open(server.url, cache)):
            np.testing.assert_array_equal(rows_of(manifest, [2, 1]), expected[[2, 1]])
        assert verify(server.url) == []
        without_statistics(Path(images.folder))
        np.testing.assert_array_equal(
            rows_of(Manifest.open(server.url, cache), [2, 1]), expected[[2, 1]]
        )


def test_statistics_that_are_not_there_at_a_server_are_named(images, tmp_path):
    with faulty_server(Path(images.folder)) as server:
        server.always["statistics.bin"] = 404
        for cache in (None, Cache(tmp_path / "cache", 10**6)):
            with pytest.raises(ShardError, match=r"statistics\.bin .*does not exist"):
                rows_of(Manifest.open(server.url, cache), [0])
        (problem,) = verify(server.url)
        assert "statistics.bin cannot be read: it does not exist" in problem


# ---- a set of features ---------------------------------------------------------------------------


KEPT = (3, 0, 4)  # what an encoder could read, in an order of its own


@pytest.fixture
def features(images, expected, tmp_path):
    samples = [featured(n, expected[n]) for n in KEPT]
    return write(tmp_path / "features", samples, origin=images, **FEATURES)


def test_a_feature_set_has_the_rows_of_its_samples_and_knows_its_pictures(
    images, features, expected
):
    opened = Manifest.open(features.folder)
    np.testing.assert_array_equal(rows_of(opened, range(3)), expected[list(KEPT)])
    assert opened.origin == images.folder
    assert source_of(opened) == images
    assert indices_at_source(opened, images, [1, 2, 0]).tolist() == [0, 4, 3]
    assert source_of(images) is images
    assert verify(features.folder) == []


def test_the_digest_of_features_tells_neither_their_statistics_nor_their_pictures(
    features, expected, tmp_path
):
    bare = write(tmp_path / "bare", [featured(n, expected[n])[:3] for n in KEPT], **FEATURES)
    assert (bare.statistics_file, bare.origin) == (None, None)
    assert bare.digest == features.digest
    assert bare.format_1_digest == features.format_1_digest
    assert rows_of(bare, [0]) is None
    assert source_of(bare) is None


def test_features_without_rows_have_those_of_their_pictures_by_key(
    images, expected, tmp_path, monkeypatch
):
    samples = [featured(n, None)[:3] for n in KEPT]
    monkeypatch.chdir(tmp_path)  # a place that is relative must hold from elsewhere too
    source = Manifest.open("images")
    features = write(tmp_path / "features", samples, origin=source, **FEATURES)
    monkeypatch.chdir("/")
    assert features.statistics_file is None
    np.testing.assert_array_equal(rows_of(features, [0, 2]), expected[[3, 4]])
    assert without_statistics(Path(images.folder)).digest == source.digest
    np.testing.assert_array_equal(rows_of(features, [0, 2]), expected[[3, 4]])


def test_pictures_that_are_gone_or_others_by_now_are_not_used(images, expected, tmp_path, caplog):
    samples = [featured(n, None)[:3] for n in (3, 0, 9)]
    features = write(tmp_path / "features", samples, origin=images, **FEATURES)
    assert np.isnan(rows_of(features, [2])).all(), "a key that the pictures have not"
    moved = shutil.move(images.folder, tmp_path / "moved")
    assert source_of(features) is None
    assert pictures_of(features, [0, 1]) == [None, None]
    assert rows_of(features, [0]) is None
    assert "there is no folder of shards at" in caplog.text
    write(images.folder, [captioned(n, picture("another")) for n in range(SAMPLES)])
    assert source_of(features) is None
    assert "is no longer the set of pictures" in caplog.text
    shutil.rmtree(images.folder)
    shutil.move(moved, images.folder)
    np.testing.assert_array_equal(rows_of(features, [0]), expected[[3]])


def test_pictures_are_found_where_they_lay_and_where_both_sets_were_moved_together(
    images, features, tmp_path
):
    wanted = [captioned(4)[1], captioned(3)[1]]
    assert pictures_of(Manifest.open(features.folder), [2, 0]) == wanted
    new = tmp_path / "new"
    new.mkdir()
    for name in ("images", "features"):
        shutil.move(tmp_path / name, new / name)
    moved = Manifest.open(new / "features")
    assert source_of(moved).folder == str(new / "images")
    assert pictures_of(moved, [2, 0]) == wanted
    shutil.move(new / "features", tmp_path / "features")
    assert pictures_of(Manifest.open(features.folder), [2]) == [None]


def test_pictures_at_a_server_are_found_with_a_cache(images, expected, tmp_path, caplog):
    cache = Cache(tmp_path / "cache", 10**6)
    with faulty_server(Path(images.folder)) as server:
        samples = [featured(n, None)[:3] for n in KEPT]
        source = Manifest.open(server.url)
        features = write(tmp_path / "features", samples, origin=source, **FEATURES)
        assert features.origin == server.url
        np.testing.assert_array_equal(rows_of(features, [1], cache), expected[[0]])
        assert rows_of(features, [1]) is None
        assert "needs a cache folder" in caplog.text


def test_pictures_of_tars_made_elsewhere_are_found_by_the_keys_of_their_records(tmp_path):
    files = [("./a b/1.jpg", picture("1")), ("./a b/1.txt", b"a dog")]
    source = index_shards(make_tar(tmp_path / "set" / "x.tar", files), "mine", "train")
    record = Reader(source).read(0).known
    features = featured(0, None)[1]
    made = write(
        tmp_path / "features", [(record, features, "safetensors")], origin=source, **FEATURES
    )
    np.testing.assert_array_equal(rows_of(made, [0])[0], statistics_of(picture("1")))
