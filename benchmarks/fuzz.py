"""Fuzzes everything that reads files of others: any bytes give a value or the room's own error.

    OMP_NUM_THREADS=1 python benchmarks/fuzz.py --minutes 10 [--reader NAME]

Inputs are sound files with parts exchanged, cut, doubled and overwritten, and JSON of any shape in
the place of any value (hypothesis, without a database: another seed every round). A crash is any
other exception than the reader's own, or more than 5 seconds for an input. Prints one table:
reader, inputs tried, crashes, resident memory after the first round and at the end (the first row:
hypothesis's own). Ends with 1 where there was a crash.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import itertools
import json
import multiprocessing
import platform
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import safetensors.numpy
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from rich.table import Table

from harness.config.load import load, parse_override
from harness.data.images import ImageError, decode_image
from harness.errors import ConfigError
from harness.evaluate.captions import read_caption_results, read_references
from harness.evaluate.compare import evaluation_of
from harness.evaluate.vqa import read_results, read_truths
from shards.features import read_features
from shards.files import ShardError
from shards.index import index_shards
from shards.manifest import INDEX, SIDECAR, Manifest
from shards.quarantine import Quarantine
from shards.read import Reader, parse_sample
from shards.record import Record, RecordError, Text
from shards.tar import groups
from shards.write import write_shards

HANG = 5.0  # seconds for one input
EXAMPLES = 300  # of a round
TEXT = Text("1", "vqa", ("yes", "no"), "is it?", {"answer_type": "yes/no", "pair_id": None})
RECORD = Record("key1", "toy", "train", "1", (Text("0", "caption", ("a dog",)), TEXT))


# ---- inputs --------------------------------------------------------------------------------------

TOKENS = (
    *(b"\0", b"\n", b"\xff", b"\xed\xa0\x80", b"\\ud800", b"NaN", b"1e999", b"-1", b"9" * 5000),
    *(
        b"[" * 3000,
        b'{"a":' * 3000,
        b"12 size=-1\n",
        b"30 path=../../x\0\n",
        b"x" * 600,
        b"&a [*a]",
    ),
    *(b"!!timestamp x", b"!!bool x", b"0x", b"2020-99-99", b"? ", b"*a", b"<<: ", bytes(512)),
)
SCALARS = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    st.sampled_from(["\ud800", "9" * 5000, 10**400, -1, 2**64, float("nan"), "..", "a/b", "\0"]),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@st.composite
def damaged(draw: st.DrawFn, sound: list[bytes]) -> bytes:
    """A sound file with a few places overwritten, cut out, doubled or filled with a token."""
    data = bytearray(draw(st.sampled_from(sound)))
    for _ in range(draw(st.integers(0, 4))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.sampled_from([0, 1, 2, 8, 100, 512, 5000]))
        middle = draw(
            st.one_of(
                st.binary(max_size=12), st.sampled_from(TOKENS), st.just(bytes(data[at : at + 600]))
            )
        )
        data[at : at + length] = middle
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


@st.composite
def other_values(draw: st.DrawFn, documents: list[Any], dump: Callable[[Any], bytes]) -> bytes:
    """A sound document with anything at all in the place of some of its values or keys."""
    whole = {"": copy.deepcopy(draw(st.sampled_from(documents)))}
    for _ in range(draw(st.integers(1, 3))):
        here: Any = whole
        key: Any = ""
        while isinstance(here[key], dict | list) and here[key] and draw(st.booleans()):
            here = here[key]
            keys = list(here) if isinstance(here, dict) else range(len(here))
            key = draw(st.sampled_from(keys))
        if here is not whole and isinstance(here, dict) and draw(st.integers(0, 4)) == 0:
            here[draw(st.text(max_size=5))] = here.pop(key)
        else:
            here[key] = draw(ANYTHING)
    return dump(whole[""])


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def fuzzed(documents: list[Any], dump: Callable[[Any], bytes] = as_json) -> st.SearchStrategy:
    sound = [dump(document) for document in documents]
    return damaged(sound) | other_values(documents, dump) | st.binary(max_size=50)


# ---- readers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """A reader, what it is given, and the errors that are its own."""

    inputs: st.SearchStrategy
    read: Callable[[bytes, Path], object]  # the input, and an empty folder
    own: tuple[type[Exception], ...]
    sound: list[bytes] = field(default_factory=list)  # files to begin from, for fuzz_atheris.py


def record(data: bytes, folder: Path) -> None:
    found = Record.from_json(data)
    assert Record.from_json(found.to_json()) == found


def sample(data: bytes, folder: Path) -> None:
    for contents in ({"jpg": b"", "json": data}, {"jpg": b"", "txt": data}):
        parsed = parse_sample("key1", contents, "images", "toy", "train")
        parsed.record.to_json()


def walk(data: bytes, folder: Path) -> None:
    for group in groups(lambda at, n: data[at : at + n], len(data)):
        group.key.encode()


def index(data: bytes, folder: Path) -> None:
    (folder / "x.tar").write_bytes(data)
    manifest = index_shards(folder, "toy", "train")
    reader = Reader(Manifest.open(folder))
    for number in range(manifest.samples):
        assert reader.read(number).record == reader.walk(number).record


def manifest(data: bytes, folder: Path) -> None:
    for path in _a_set().iterdir():
        if path.name != INDEX:
            (folder / path.name).symlink_to(path)
    (folder / INDEX).write_bytes(data)
    found = Manifest.open(folder)
    for number in range(min(found.samples, 3)):
        found.key(number)
    found.document()


def sidecar(data: bytes, folder: Path) -> None:
    """A sidecar of any bytes that the index says is right, as a faulty program may write it."""
    made = Manifest.open(_a_set())
    for path in _a_set().glob("*.tar"):
        (folder / path.name).symlink_to(path)
    rows = np.frombuffer((_a_set() / SIDECAR).read_bytes(), np.uint8).copy()
    rows[: len(data)] = np.frombuffer(data[: len(rows)], np.uint8)
    (folder / SIDECAR).write_bytes(rows.tobytes())
    found = replace(made, folder=str(folder))
    found.__dict__["sidecar"] = np.frombuffer(rows.tobytes(), made.sidecar.dtype)
    for number in range(found.samples):
        Reader(found).read(number)


def config(data: bytes, folder: Path) -> None:
    (folder / "mine.yaml").write_bytes(data)
    load(folder / "mine.yaml")


def override(data: bytes, folder: Path) -> None:
    parse_override(data.decode("utf-8", "replace"))


def results(data: bytes, folder: Path) -> None:
    path = folder / "scores.json"
    path.write_bytes(data)
    readers = (read_results, read_caption_results, read_references, evaluation_of)
    for read in (*readers, lambda path: read_truths(path, path)):
        try:
            read(folder if read is evaluation_of else path)
        except ConfigError:
            continue


def image(data: bytes, folder: Path) -> None:
    decode_image(data, 8, max_pixels=10_000, mode="crop")


def features(data: bytes, folder: Path) -> None:
    assert np.isfinite(read_features(data, {"tokens": 2, "width": 3})).all()


def quarantine(data: bytes, folder: Path) -> None:
    path = folder / "quarantine.jsonl"
    path.write_bytes(data)
    for _ in range(2):
        Quarantine(path).add("set", 1, "key", "error")
    assert path.read_bytes().count(b'"error": "error"}') <= 1 + data.count(b'"error": "error"}')


def _a_set(made: list[Path] = []) -> Path:  # noqa: B006  made once
    if not made:
        made.append(Path(tempfile.mkdtemp()) / "train")
        records = [replace(RECORD, key=f"key{n}") for n in range(3)]
        rows = [(one, b"no image", "jpg") for one in records]
        write_shards(rows, made[0], dataset="toy", split="train")
    return made[0]


def _tars() -> Iterator[bytes]:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            name = "d/" * (0 if form == tarfile.USTAR_FORMAT else 70)
            for end, data in (("jpg", b"image"), ("json", b'{"caption": "x"}'), ("txt", b"y")):
                info = tarfile.TarInfo(f"{name}a.{end}")
                info.size = len(data)
                info.pax_headers = {"comment": "x", "path": f"{name}b.{end}"}
                tar.addfile(info, io.BytesIO(data))
        yield file.getvalue()


def _images() -> Iterator[bytes]:
    for mode, form in (
        ("RGB", "JPEG"),
        ("I;16", "PNG"),
        ("P", "GIF"),
        ("F", "TIFF"),
        ("RGB", "BMP"),
    ):
        file = io.BytesIO()
        Image.new(mode, (12, 9), 5 if mode != "RGB" else (9, 200, 3)).save(file, form)
        yield file.getvalue()


def targets() -> dict[str, Target]:
    """Returns the readers by name."""
    records = [json.loads(RECORD.to_json())]
    captions: list[Any] = [{"caption": "a dog"}, {"caption": ["a dog", "dogs"], "width": 3}]
    tars = list(_tars())
    own = (ShardError, RecordError)
    results_of = [
        [{"question_id": 1, "answer": "yes"}, {"image_id": "a", "caption": "a dog"}],
        {"questions": [{"question_id": 1}], "data": ["x"], "images": [{"id": 1}]}
        | {"annotations": [{"question_id": 1, "image_id": 1, "answers": [{"answer": "a"}]}]},
        {"images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "x"}]},
    ]
    shipped = Path(__file__).parents[1] / "configs"
    yamls = [path.read_bytes() for path in sorted(shipped.glob("*.yaml"))]
    index_of = [json.loads((_a_set() / INDEX).read_text())]
    overrides = [b"train.epochs=2", b"data.train=[{path: x}]"]
    images = list(_images())
    payloads = [safetensors.numpy.save({"patches_PD": np.ones((2, 3), np.float16)})]
    named = [{"set": "set", "index": 1, "key": "k", "error": "x"}]

    def json_target(documents: list[Any], read: Any, own: tuple = own) -> Target:
        return Target(fuzzed(documents), read, own, [as_json(document) for document in documents])

    def bytes_target(sound: list[bytes], read: Any, own: tuple = own) -> Target:
        return Target(damaged(sound), read, own, sound)

    return {
        "none: hypothesis alone": Target(fuzzed(records), lambda data, folder: None, ()),
        "record": json_target(records, record),
        "sample": json_target(captions + records, sample),
        "tar walk": bytes_target(tars, walk),
        "tar to index": bytes_target(tars, index),
        "index": json_target(index_of, manifest),
        "sidecar": bytes_target([(_a_set() / SIDECAR).read_bytes()], sidecar),
        "config": Target(damaged(yamls) | _configs(), config, (ConfigError,), yamls),
        "override": bytes_target(overrides, override, (ConfigError,)),
        "results": json_target(results_of, results, (ConfigError,)),
        "image": bytes_target(images, image, (ImageError,)),
        "features": bytes_target(payloads, features),
        "quarantine": Target(fuzzed(named, lambda row: as_json(row) + b"\n"), quarantine, ()),
    }


def _configs() -> st.SearchStrategy:
    """JSON is YAML."""
    path = Path(__file__).parents[1] / "configs" / "demo.yaml"
    return other_values([load(path).model_dump(mode="json")], as_json)


# ---- running -------------------------------------------------------------------------------------


def try_input(target: Target, data: bytes) -> None:
    """Raises whatever the reader raises, if it is not its own error; TimeoutError where
    it takes long."""
    begun = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with suppress(*target.own):
            target.read(data, Path(folder))
    if (seconds := time.perf_counter() - begun) > HANG:
        raise TimeoutError(f"{seconds:.1f} s for {len(data)} bytes")


def run_round(target: Target, number: int, examples: int) -> int:
    """Tries so many inputs of a seed and returns how many; raises what the first crash raised."""
    tried = itertools.count()

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(data=target.inputs)
    def each(data: bytes) -> None:
        next(tried)
        try_input(target, data)

    each()
    return next(tried)


class Found(NamedTuple):
    """What fuzzing a reader gave; resident bytes, after the first round and at the end."""

    tried: int
    crashes: dict[str, str]  # what was raised -> the input
    before: int
    after: int


def fuzz_for(name: str, seconds: float) -> Found:
    """Fuzzes a reader for so long, at least two rounds."""
    target = targets()[name]
    process = psutil.Process()
    tried = 0
    before = 0
    crashes: dict[str, str] = {}
    end = time.monotonic() + seconds
    for number in itertools.count(time.time_ns() % 10**9):
        try:
            tried += run_round(target, number, EXAMPLES)
        except Exception as error:
            told = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            crashes.setdefault(told, "\n".join(getattr(error, "__notes__", ())))
        gc.collect()
        if before and time.monotonic() > end:
            break
        before = before or process.memory_info().rss  # what the first round caches is no growth
    return Found(tried, crashes, before, process.memory_info().rss)


def main() -> int:
    """Fuzzes each reader in a process of its own, and prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=1.0, help="of all readers together")
    parser.add_argument("--reader", choices=list(targets()), help="this one alone")
    given_ = parser.parse_args()
    names = [given_.reader] if given_.reader else list(targets())
    table = Table(title=f"{platform.processor() or platform.machine()}, {given_.minutes:g} minutes")
    for column in ("reader", "inputs tried", "crashes", "MB before", "MB after"):
        table.add_column(column, justify="left" if column == "reader" else "right")
    crashed = False
    for name in names:
        alone = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, mp_context=alone) as pool:
            found = pool.submit(fuzz_for, name, 60 * given_.minutes / len(names)).result()
        memory = (f"{found.before / 1e6:.1f}", f"{found.after / 1e6:.1f}")
        table.add_row(name, f"{found.tried:,}", str(len(found.crashes)), *memory)
        for told, notes in found.crashes.items():
            crashed = True
            print(f"{name}: {told}\n{notes}", file=sys.stderr)
    Console().print(table)
    return int(crashed)


if __name__ == "__main__":
    sys.exit(main())
