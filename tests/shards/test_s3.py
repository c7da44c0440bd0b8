"""Sets at s3://, over a real socket: moto's server, and before it faults as S3 answers them."""

import fsspec
import pytest

pytest.importorskip("s3fs", reason="needs the extra s3")
pytest.importorskip("moto", reason="needs moto")

from s3_server import s3_server, use_s3_server
from shards import remote
from shards.cache import Cache
from shards.files import ShardError, UnreachableError
from shards.index import index_shards
from shards.loader import Loader
from shards.manifest import Manifest
from shards.record import Record, Text
from shards.remote import Patience
from shards.write import write_shards

SAMPLES = 9


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as (application, url):
        yield application, url


@pytest.fixture
def bucket(endpoint, monkeypatch):
    application, url = endpoint
    application.faults.clear()
    use_s3_server(url, monkeypatch)
    monkeypatch.setattr(remote, "_LONGEST_PAUSE", 0.01)
    return application


def captioned(n):
    text = Text("a", "caption", (f"caption {n}",))
    return Record(f"key{n:02d}", "toy", "train", str(n), (text,)), bytes([n]) * 900, "jpg"


@pytest.fixture
def there(bucket, tmp_path):
    write_shards(
        map(captioned, range(SAMPLES)),
        tmp_path / "train",
        dataset="toy",
        split="train",
        max_shard_samples=4,
    )
    system = fsspec.filesystem("s3")
    system.mkdirs("pictures", exist_ok=True)
    for path in (tmp_path / "train").iterdir():
        system.pipe_file(f"pictures/sets/train/{path.name}", path.read_bytes())
    return "s3://pictures/sets/train"


def keys(paths, tmp_path, **other):
    loaded = Loader(paths, global_batch=4, cache_dir=tmp_path / "cache", cache_bytes=10**6, **other)
    samples = [s for _, batch in loaded.iterate(epochs=1) for s in batch]
    return sorted(s.record.key if s.record else s.error for s in samples)


def test_a_set_at_s3_is_indexed_and_streamed(there, tmp_path):
    indexed = index_shards(there, "toy", "train", out=tmp_path / "mine")
    assert indexed.digest == Manifest.open(there).digest
    expected = [f"key{n:02d}" for n in range(SAMPLES)]
    for path in (there, str(tmp_path / "mine")):
        for workers in (0, 2):
            assert keys([path], tmp_path / path[-4:], workers=workers) == expected


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (403, "is refused.*AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"),
        (503, "cannot be read"),
    ],
)
def test_what_s3_refuses_or_does_not_answer_stops_the_run(there, bucket, tmp_path, status, says):
    bucket.faults["000001.tar"] = status
    with pytest.raises(UnreachableError, match=f"train-000001.*{says}"):
        keys([there], tmp_path, patience=Patience(2, 20.0))


def test_what_is_not_at_s3_is_not_there(there, tmp_path):
    with pytest.raises(ShardError, match=r"no-such/index\.json does not exist"):
        Manifest.open("s3://pictures/no-such")
    cache = Cache(tmp_path / "cache", 10**6)
    with pytest.raises(ShardError, match=r"x\.tar does not exist") as told:
        cache.open(f"{there}/x.tar", 10, "0" * 64)
    assert not isinstance(told.value, UnreachableError)


def test_no_credentials_are_a_refusal_that_names_the_variables(there, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(UnreachableError, match=r"is refused.*AWS_ACCESS_KEY_ID"):
        Manifest.open(there, patience=Patience(2, 20.0))
