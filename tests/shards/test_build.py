"""`build`: what lands in the shards byte by byte, what is skipped and named, and that a failure
leaves nothing.
"""

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import psutil
import pytest
from PIL import Image

from pictures import FLICKR8K, FLICKR8K_IMAGES, OFFICIAL, encoded, fill, picture
from shards.build import build
from shards.files import ShardError
from shards.manifest import Manifest
from shards.prepare import prepare_image as prepared_image
from shards.record import Record
from shards.sources.source import Images
from shards.write import write_shards

TOKEN = FLICKR8K / "Flickr8k.token.txt"


def prepare_image(data, **options):
    return prepared_image(data, **options)[:3]


@pytest.fixture
def flickr_images(tmp_path):
    return fill(tmp_path / "images", FLICKR8K_IMAGES)


def members(folder) -> dict[str, bytes]:
    found = {}
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            found |= {member.name: tar.extractfile(member).read() for member in tar}
    return found


def skipped(out) -> list[dict]:
    return [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def test_a_build_writes_a_set_a_split_with_the_original_bytes(tmp_path, flickr_images):
    seen = []
    summary = build(
        "flickr8k",
        tmp_path / "out",
        images=flickr_images,
        captions=TOKEN,
        splits=FLICKR8K,
        pairs=None,
        progress=lambda *step: seen.append(step),
    )
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "dev",
        "skipped.jsonl",
        "test",
        "train",
    ]
    files = members(tmp_path / "out" / "train")
    assert files["1000268201_693b08cb0e.jpg"] == picture("1000268201_693b08cb0e.jpg")
    assert [name for name in files if name.endswith(".jpg")] == [
        "1000268201_693b08cb0e.jpg",
        "1859726819_9a793b3b44.jpg",
    ]
    record = Record.from_json(files["1859726819_9a793b3b44.json"])
    assert (record.dataset, record.split, len(record.texts[0].targets)) == ("flickr8k", "train", 5)
    assert Manifest.open(tmp_path / "out" / "train").samples == 2
    assert (summary.total("records"), summary.total("texts"), summary.total("targets")) == (
        4,
        4,
        20,
    )
    assert (
        summary.splits["dev"]["bytes"]
        == (tmp_path / "out" / "dev" / "dev-000000.tar").stat().st_size
    )
    assert (
        summary.texts_without_image,
        summary.images_in_no_split,
        summary.images_without_text,
    ) == (5, 2, 0)
    assert len(skipped(tmp_path / "out")) == 4
    assert seen == [("train", 1, 2), ("train", 2, 2), ("dev", 1, 1), ("test", 1, 1)]


@pytest.fixture
def processes_pay(monkeypatch):
    """Processes are started for the smallest set."""
    monkeypatch.setattr("shards.prepare._WORTH_PROCESSES", 0)


def test_zip_and_folder_and_any_number_of_workers_give_the_same_shards(
    tmp_path, flickr_images, processes_pay
):
    (flickr_images / FLICKR8K_IMAGES[2]).write_text("no image")
    archive = tmp_path / "Flickr8k_Dataset.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in flickr_images.iterdir():
            file.write(path, f"Flicker8k_Dataset/{path.name}")
    made = []
    for n, (images, workers) in enumerate([(flickr_images, 1), (flickr_images, 3), (archive, 2)]):
        out = tmp_path / str(n)
        build("flickr8k", out, images=images, captions=TOKEN, workers=workers)
        files = {path.name: path.read_bytes() for path in (out / "train").iterdir()}
        made.append((files, skipped(out)[0]["reason"]))
    assert made[0] == made[1]
    assert made[0][0] == made[2][0]


def test_rows_of_a_table_are_read_by_several_processes(tmp_path, processes_pay):
    fill(tmp_path, ["x.jpg"])
    images = [{"bytes": picture(f"{n}"), "path": None} for n in range(30)]
    images.append({"bytes": None, "path": str(tmp_path / "x.jpg")})
    rows = {"image": images, "caption": [f"picture {n}" for n in range(31)]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "t.parquet")
    options = {"dataset": str(tmp_path / "t.parquet"), "split": "train"}
    options |= {"text_columns": ["caption"]}
    digests = set()
    for workers in (1, 2):
        out = tmp_path / f"{workers}"
        assert build("hf", out, workers=workers, **options).total("records") == 31
        digests.add(Manifest.open(out / "train").digest)
    assert len(digests) == 1


def many(folder: Path, count: int) -> dict[str, Path]:
    """So many images with a caption each, as options of image-folder."""
    images = fill(folder / "photos", [f"{n}.jpg" for n in range(count)])
    rows = "".join(f"{n}.jpg,picture {n}\n" for n in range(count))
    (folder / "t.csv").write_text(f"image,caption\n{rows}")
    return {"images": images, "csv": folder / "t.csv"}


def test_a_worker_that_dies_is_told_of_and_leaves_nothing(tmp_path, processes_pay):
    def kill(split, done, total):
        for worker in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):  # dead already, by an earlier call
                worker.kill()

    options = {**many(tmp_path, 100), "workers": 2, "progress": kill}
    with pytest.raises(ShardError, match=r"decodes images ended with -9 .*use fewer --workers"):
        build("image-folder", tmp_path / "a" / "out", **options)
    assert list((tmp_path / "a").iterdir()) == []


KILLED = """
import functools, os, signal, sys
import shards.build, shards.prepare, shards.write

shards.prepare._WORTH_PROCESSES = 0
shards.build.write_shards = functools.partial(shards.write.write_shards, max_shard_samples=60)
def kill(split, done, images):
    if done == 150:
        os.kill(os.getpid(), signal.SIGKILL)
out, images, csv = sys.argv[1:]
shards.build.build("image-folder", out, images=images, csv=csv, workers=2, progress=kill)
"""


def test_a_build_that_is_killed_takes_its_workers_along_and_the_next_one_goes_on(
    tmp_path, processes_pay, monkeypatch
):
    monkeypatch.setattr("shards.build.write_shards", partial(write_shards, max_shard_samples=60))
    options = many(tmp_path, 200)
    (options["images"] / "3.jpg").write_text("no image")
    build("image-folder", tmp_path / "undisturbed", **options)
    place = tmp_path / "a" / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    given = [str(place), *map(str, options.values())]
    with subprocess.Popen([sys.executable, "-c", KILLED, *given], env=environment) as process:
        workers = []
        while process.poll() is None:
            workers = psutil.Process(process.pid).children() or workers
            time.sleep(0.01)
    assert process.returncode == -9
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive
    (left,) = (tmp_path / "a").iterdir()
    assert left.name.startswith(".out.")
    tar = left / next(left.glob(".train*")) / "train-000000.tar"
    with tarfile.open(tar) as file:
        damaged = file.getmember("7.jpg").offset_data
    with open(tar, "r+b") as file:  # as a machine leaves it that goes down
        file.seek(damaged)
        file.write(bytes(20))
    os.utime(options["images"] / "5.jpg")  # another picture, for all we know

    asked = []
    read = Images.read
    monkeypatch.setattr(Images, "read", lambda self, path: asked.append(path) or read(self, path))
    summary = build("image-folder", place, workers=1, **options)
    assert summary.total("records") == 199
    taken = summary.notes["images taken from a build that was killed"]
    assert 100 <= taken <= 150
    assert len(asked) == 200 - taken
    assert {"3.jpg", "5.jpg", "7.jpg", "199.jpg"} <= set(asked)
    for name, files in (("train", "*"), (".", "skipped.jsonl")):
        for path in (tmp_path / "undisturbed" / name).glob(files):
            if path.is_file():
                assert path.read_bytes() == (place / name / path.name).read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["out"]
    assert sorted(path.name for path in place.iterdir()) == ["skipped.jsonl", "train"]


def test_images_that_cannot_be_decoded_are_skipped_and_named_with_the_reason(
    tmp_path, flickr_images
):
    cut, text, large, empty = (flickr_images / name for name in FLICKR8K_IMAGES[:4])
    cut.write_bytes(picture("cut", 200, 200)[:-500])
    text.write_text("not an image")
    large.write_bytes(encoded(Image.new("L", (300, 200))))
    empty.write_bytes(b"")
    out = tmp_path / "out"
    summary = build("flickr8k", out, images=flickr_images, captions=TOKEN, max_pixels=50_000)
    assert summary.undecodable_images == 4
    assert summary.total("records") == 2
    reasons = {
        line["name"]: line["reason"] for line in skipped(out) if line["kind"] == "undecodable image"
    }
    assert "truncated" in reasons[cut.name]
    assert "cannot identify image file" in reasons[text.name]
    assert "300x200 pixels, more than 50000" in reasons[large.name]
    assert empty.name in reasons


def test_a_decompression_bomb_is_skipped_before_it_is_decoded(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    )
    fill(tmp_path / "images", ["a.jpg"])
    (tmp_path / "images" / "b.png").write_bytes(bomb)
    (tmp_path / "texts.jsonl").write_text(
        '{"image": "a.jpg", "text": "x"}\n{"image": "b.png", "text": "y"}'
    )
    summary = build(
        "image-folder", tmp_path / "out", images=tmp_path / "images", jsonl=tmp_path / "texts.jsonl"
    )
    assert summary.undecodable_images == 1
    assert "DecompressionBomb" in skipped(tmp_path / "out")[0]["reason"]


def test_a_split_with_no_usable_image_is_an_error_and_leaves_nothing(tmp_path, flickr_images):
    (flickr_images / "3385593926_d3e9c21170.jpg").write_bytes(b"damaged")
    with pytest.raises(
        ShardError, match=r"no image of the split test can be used; .*3385593926_d3e9c21170\.jpg"
    ):
        build(
            "flickr8k",
            tmp_path / "new" / "out",
            images=flickr_images,
            captions=TOKEN,
            splits=FLICKR8K,
        )
    assert list((tmp_path / "new").iterdir()) == []


def test_a_build_that_is_interrupted_leaves_nothing(tmp_path, flickr_images):
    def interrupt(split, done, total):
        if split == "dev":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(
            "flickr8k",
            tmp_path / "a" / "out",
            images=flickr_images,
            captions=TOKEN,
            splits=FLICKR8K,
            progress=interrupt,
        )
    assert list((tmp_path / "a").iterdir()) == []


def test_splits_built_one_after_the_other_share_a_folder_and_its_list_of_skipped(tmp_path):
    images = fill(tmp_path / "images", [f"COCO_val2014_{n:012d}.jpg" for n in (42, 73, 133)])
    captions = OFFICIAL / "coco_captions" / "captions_val2014.json"
    options = {"images": images, "captions": captions}
    out = tmp_path / "out"
    build("coco-captions", out, split="val", **options)
    before = skipped(out)
    build("coco-captions", out, split="test", **options)
    assert skipped(out)[: len(before)] == before
    assert len(skipped(out)) == 2 * len(before)
    assert Manifest.open(out / "val").samples == Manifest.open(out / "test").samples == 3
    with pytest.raises(
        ShardError, match=r"out/val is there already: remove it or choose another --out"
    ):
        build("coco-captions", out, split="val", **options)
    assert len(skipped(out)) == 2 * len(before)


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("flikr8k", {}, "there is no source 'flikr8k': choose one of flickr8k, vqav2"),
        ("flickr8k", {"images": "i"}, "flickr8k needs --captions"),
        (
            "flickr8k",
            {"images": "i", "jsonl": "j"},
            "flickr8k has no option --jsonl; its options are --images",
        ),
        ("easy-vqa", {"workers": 0}, "--workers is 0"),
        ("easy-vqa", {"short_side": 0}, "--short-side is 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_read(tmp_path, source, options, says):
    with pytest.raises(ShardError, match=says):
        build(source, tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_source_with_nothing_in_it_says_what_became_of_it(tmp_path):
    images = fill(tmp_path / "images", ["a.jpg"])
    with pytest.raises(
        ShardError,
        match=r"no image has a text \(8 x text without image, 1 x image without text; first",
    ):
        build("flickr8k", tmp_path / "out", images=images, captions=TOKEN)
    (tmp_path / "texts.jsonl").write_text('{"image": "a.jpg", "text": "x", "split": "../up"}')
    with pytest.raises(ShardError, match=r"the split '\.\./up' cannot be a folder"):
        build("image-folder", tmp_path / "out", images=images, jsonl=tmp_path / "texts.jsonl")
    assert not (tmp_path / "out").exists()


# One image


def test_the_short_side_is_brought_down_and_smaller_images_stay_as_they_are():
    grain = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    large, small = encoded(Image.fromarray(grain), "PNG"), picture("small", 90, 20)
    payload, extension, changed = prepare_image(large, short_side=30)
    assert (opened(payload).size, opened(payload).format, extension, changed) == (
        (45, 30),
        "JPEG",
        "jpg",
        "shrunk",
    )
    expected = opened(large).resize((45, 30), Image.Resampling.LANCZOS)
    difference = np.abs(np.asarray(opened(payload), int) - np.asarray(expected, int))
    assert difference.mean() < 4
    assert prepare_image(small, short_side=30) == (small, "jpg", "")


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_images_keep_their_bytes(form, mode):
    data = encoded(opened(picture("plain")).convert(mode), form)
    extension = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}[form]
    assert prepare_image(data) == (data, extension, "")


def test_a_palette_and_an_opaque_alpha_channel_are_plain():
    for mode in ("P", "RGBA"):
        data = encoded(opened(picture("plain")).convert(mode), "PNG")
        assert prepare_image(data) == (data, "png", "")


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    upright = opened(picture("exif", 40, 20))
    payload, _, changed = prepare_image(encoded(upright, exif=exif.tobytes(), quality=95))
    assert (opened(payload).size, changed) == ((20, 40), "EXIF rotation")
    turned = np.asarray(upright.transpose(Image.Transpose.ROTATE_270), int)
    assert np.abs(np.asarray(opened(payload), int) - turned).mean() < 4
    assert not opened(payload).getexif().get(0x0112)


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    image.paste((0, 0, 200, 255), (0, 0, 4, 8))
    payload, extension, changed = prepare_image(encoded(image, "PNG"))
    seen = opened(payload).convert("RGB")
    assert (extension, changed) == ("png", "transparency")
    assert (seen.getpixel((1, 1)), seen.getpixel((6, 6))) == ((0, 0, 200), (255, 255, 255))


def test_cmyk_16_bit_animations_and_other_formats_become_plain_images():
    red, blue = Image.new("RGB", (8, 8), (220, 10, 10)), Image.new("RGB", (8, 8), (10, 10, 220))
    payload, extension, changed = prepare_image(encoded(red.convert("CMYK"), quality=95))
    assert (opened(payload).mode, extension, changed) == ("RGB", "jpg", "CMYK")
    assert np.abs(np.asarray(opened(payload), int)[0, 0] - (220, 10, 10)).max() < 12

    grey = Image.fromarray(np.full((8, 8), 0x8000, np.uint16))
    payload, extension, changed = prepare_image(encoded(grey, "PNG"))
    assert (extension, changed) == ("png", "16-bit")
    assert opened(payload).convert("RGB").getpixel((3, 3)) == (128, 128, 128)

    payload, extension, changed = prepare_image(
        encoded(red, "GIF", save_all=True, append_images=[blue])
    )
    assert (opened(payload).format, extension, changed) == ("PNG", "png", "animated, GIF")
    assert opened(payload).getpixel((3, 3)) == (220, 10, 10)

    payload, extension, changed = prepare_image(encoded(red, "BMP"))
    assert (opened(payload).format, extension, changed) == ("PNG", "png", "BMP")

    phone = encoded(red, "MPO", save_all=True, append_images=[blue])
    assert prepare_image(phone) == (phone, "jpg", ""), (
        "the first picture of an MPO file is a plain JPEG"
    )


def test_avif_jpeg_2000_and_pgm_become_plain_images_and_heic_is_told_what_to_do(tmp_path):
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    photo = opened(picture("photo", 64, 48))
    for form, extension in (("AVIF", "jpg"), ("JPEG2000", "png"), ("PPM", "png")):
        payload, made, changed = prepare_image(encoded(photo, form))
        assert (made, changed) == (extension, form)
        seen = np.asarray(opened(payload).convert("RGB"), int)
        assert np.abs(seen - np.asarray(photo, int)).mean() < 4, form
    dark = encoded(Image.fromarray(grey.astype(np.int32)), "PPM")  # 16 bits: of 65535
    assert b"65535" in dark[:20]
    assert np.asarray(opened(prepare_image(dark)[0])).max() == 0

    images = fill(tmp_path / "photos", ["a.jfif", "b.avif"])
    (images / "b.avif").write_bytes(encoded(photo, "AVIF"))
    (images / "IMG_1.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    (images / "c.jpg").write_bytes(b"\0\0\0\x18ftypheic")  # renamed
    rows = "a.jfif,A\nb.avif,B\nIMG_1.HEIC,C\nc.jpg,D"
    (tmp_path / "t.csv").write_text(f"image,caption\n{rows}")
    out = tmp_path / "out"
    summary = build("image-folder", out, images=images, csv=tmp_path / "t.csv")
    assert summary.total("records") == 2
    reasons = {(line["kind"], line["name"]): line["reason"] for line in skipped(out)}
    assert "a file of another kind" in reasons["text without image", "IMG_1.HEIC"]
    assert reasons["undecodable image", "IMG_1.HEIC"] == "HEIC is not read: save it as JPEG"
    assert "the form HEIC, which is not read here" in reasons["undecodable image", "c.jpg"]


def test_a_pillow_without_avif_is_told_of(monkeypatch):
    monkeypatch.setattr("shards.images.FORMATS", ("JPEG", "PNG"))
    with pytest.raises(OSError, match=r"AVIF, which this Pillow does not read: install pillow 11"):
        prepare_image(encoded(opened(picture("photo")), "AVIF"))


def test_formats_whose_decoder_starts_programs_are_not_opened():
    with pytest.raises(OSError, match="cannot identify"):
        prepare_image(encoded(Image.new("RGB", (8, 8)), "EPS"))


# The real files


def test_the_real_flickr8k_is_built_whole_and_byte_by_byte(tmp_path, shared_data):
    folder = shared_data / "flickr8k"
    summary = build(
        "flickr8k",
        tmp_path / "flickr8k",
        images=folder / "images",
        captions=folder / "Flickr8k.token.txt",
        splits=folder,
        workers=2,
    )
    assert {split: figures["records"] for split, figures in summary.splits.items()} == {
        "train": 6000,
        "dev": 1000,
        "test": 1000,
    }
    assert (
        summary.texts_without_image,
        summary.images_in_no_split,
        summary.undecodable_images,
    ) == (5, 91, 0)
    assert summary.total("targets") == 40_000
    assert len(skipped(tmp_path / "flickr8k")) == 93
    for name, data in members(tmp_path / "flickr8k" / "dev").items():
        if name.endswith(".jpg"):
            assert data == (folder / "images" / name).read_bytes()


def test_the_real_images_of_original_size_are_shrunk(tmp_path, shared_data):
    folder = shared_data / "flickr8k"
    summary = build(
        "flickr8k",
        tmp_path / "out",
        images=folder / "images_original_size",
        captions=folder / "Flickr8k.token.txt",
        short_side=224,
    )
    larger = [
        p for p in (folder / "images_original_size").iterdir() if min(Image.open(p).size) > 224
    ]
    assert (summary.total("records"), summary.reencoded_images) == (48, len(larger))
    assert summary.texts_without_image == 40_460 - 48 * 5
    sizes = [
        opened(data).size
        for name, data in members(tmp_path / "out" / "train").items()
        if name.endswith(".jpg")
    ]
    assert max(min(size) for size in sizes) == 224
    assert len(set(sizes)) > 1, "the shape of the picture is kept"


def test_the_real_vqav2_subset_is_built_in_two_calls(tmp_path, shared_data):
    folder = shared_data / "vqav2"
    for split in ("val", "train"):
        summary = build(
            "vqav2",
            tmp_path / "vqav2",
            images=folder / "images",
            questions=folder / f"v2_OpenEnded_mscoco_{split}2014_questions.json",
            annotations=folder / f"v2_mscoco_{split}2014_annotations.json",
            split=split,
            limit=100,
        )
        assert (summary.total("records"), summary.undecodable_images) == (100, 0)
    record = Record.from_json(members(tmp_path / "vqav2" / "val")["000000000042.json"])
    assert record.texts[0].prompt == "What color are the gym shoes?"


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_build_killed_while_it_adds_splits_is_finished_by_the_next_call(
    tmp_path, flickr_images, call
):
    out = tmp_path / "out"

    def add():
        build("flickr8k", out, images=flickr_images, captions=TOKEN, splits=FLICKR8K)

    add()
    whole = {path.name: members(path) for path in out.iterdir() if path.is_dir()}
    lines = skipped(out)
    for split in whole:
        shutil.rmtree(out / split)
    child = os.fork()
    if not child:
        real = os.replace
        calls = iter(range(1, call))

        def counted(source, target):
            if Path(target).parent == out and next(calls, None) is None:
                os._exit(9)
            return real(source, target)

        os.replace = counted
        add()
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    with pytest.raises(ShardError, match="is there already"):
        add()
    assert {path.name: members(path) for path in out.iterdir() if path.is_dir()} == whole
    assert skipped(out) == lines
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".out")]
