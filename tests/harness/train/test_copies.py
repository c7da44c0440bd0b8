"""Checkpoints off the machine: copied whole, fetched on an empty machine, never waited for."""

import json
import shutil
import threading
import time

import fsspec
import pytest

from harness import checkpoint as checkpoints
from harness.errors import ConfigError
from harness.train import copies as room
from harness.train import run as train
from harness.train.copies import Copies, fetch
from toy_runs import losses, make_config


def config_of(root, name, **settings):
    return make_config(root, root / "clip", root / "t5", name, dev=False, **settings)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_run_goes_on_on_an_empty_machine_from_its_copies_bit_for_bit(root, capfd):
    train.run(config_of(root, "whole"))
    target = root / "elsewhere"
    cut = config_of(root, "moved", max_steps=5, copy_to=str(target), keep_checkpoints=1)
    train.run(cut)
    assert names(target / "checkpoints") == ["step-000005"]
    assert checkpoints.problems(target / "checkpoints" / "step-000005") is None
    shutil.rmtree(cut.out_dir)
    train.run(config_of(root, "moved", copy_to=str(target)), "auto")
    assert "fetched step-000005 from train.copy_to" in capfd.readouterr().err
    whole, moved = (
        checkpoints.place(root / name, 8) / "model" / "model.safetensors"
        for name in ("whole", "moved")
    )
    assert whole.read_bytes() == moved.read_bytes()
    assert losses(root / "whole") == losses(root / "moved")  # the journal came too
    assert "step-000008" in names(target / "checkpoints")


def test_a_new_run_does_not_write_over_anothers_copies_and_restart_moves_them_aside(root):
    target = root / "shared-target"
    train.run(config_of(root, "first", max_steps=1, copy_to=str(target)))
    with pytest.raises(ConfigError, match="holds checkpoints of an earlier run"):
        train.run(config_of(root, "second", max_steps=1, copy_to=str(target)))
    train.run(config_of(root, "second", max_steps=2, copy_to=str(target)), restart=True)
    (aside,) = target.glob("before-*")
    assert names(aside / "checkpoints") == ["step-000001"]
    assert names(target / "checkpoints") == ["step-000002"]


def test_a_target_that_cannot_be_written_delays_nothing_and_is_told(root, capfd):
    (root / "a-file").write_text("")
    target = root / "a-file" / "inside"
    train.run(config_of(root, "unwritable", max_steps=2, copy_to=str(target), copy_wait=0.2))
    said = capfd.readouterr().err
    assert "was not copied to train.copy_to" in said
    assert "training goes on" in said
    assert "step-000002 is not at train.copy_to yet" in said


def test_resume_auto_does_not_begin_anew_where_the_target_does_not_answer(root, monkeypatch):
    def silent(*given):
        raise TimeoutError("no answer")

    monkeypatch.setattr(room, "steps_at", silent)
    with pytest.raises(ConfigError, match="whether the run has one there is not known"):
        train.run(config_of(root, "unknown", copy_to=str(root / "silent")), "auto")


# ---- one room ------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path):
    """write(step) -> the folder of a small whole checkpoint in OUT."""
    import torch

    def save(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")

    def write(step):
        out = tmp_path / "out"
        moments = {"step/x": torch.tensor(float(step))}
        return checkpoints.write(out, step, save, moments, {"step": step}).path

    return write


@pytest.fixture
def copies(tmp_path):
    """Copies of OUT, begun; two of them stay."""
    said = []
    made = Copies(tmp_path / "out", f"file://{tmp_path}/away", 2, 10.0, said.append)
    made.said = said
    return made


def test_the_newest_and_the_best_stay_at_the_target(tmp_path, written, copies):
    for step in (1, 2, 3, 4):
        path = written(step)
        if step == 1:
            checkpoints.point_to_best(tmp_path / "out", 1, "dev/CIDEr", 0.5)
        copies.add(path)
        assert copies._is_copied.wait(10)
    away = tmp_path / "away" / "checkpoints"
    assert names(away) == ["best.json", "step-000001", "step-000003", "step-000004"]
    assert copies.said == []


def test_a_copy_that_was_broken_off_is_no_checkpoint_and_the_one_before_is_fetched(
    tmp_path, written, copies
):
    for step in (1, 2):
        copies.add(written(step))
        assert copies._is_copied.wait(10)
    (tmp_path / "away" / "checkpoints" / "step-000002" / "files.json").unlink()
    said = []
    fetch(tmp_path / "empty", str(tmp_path / "away"), said.append)
    assert checkpoints.newest(tmp_path / "empty").step == 1
    assert names(tmp_path / "empty" / "checkpoints") == ["step-000001"]
    assert "passed over: step-000002 at train.copy_to is not whole" in said[0]
    (tmp_path / "away" / "checkpoints" / "step-000001" / "optimizer.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="none of its 2 checkpoints is whole"):
        fetch(tmp_path / "empty-too", str(tmp_path / "away"), said.append)


def test_the_best_is_fetched_too(tmp_path, written, copies):
    for step in (1, 2, 3, 4):
        path = written(step)
        checkpoints.point_to_best(tmp_path / "out", 1, "dev/CIDEr", 0.5)
        copies.add(path)
        assert copies._is_copied.wait(10)
    fetch(tmp_path / "empty", str(tmp_path / "away"), print)
    assert checkpoints.at(tmp_path / "empty", "best").step == 1
    assert checkpoints.newest(tmp_path / "empty").step == 4


def test_bytes_that_come_out_wrong_are_noticed_and_copied_again(
    tmp_path, written, copies, monkeypatch
):
    monkeypatch.setattr(room, "RETRY_SECONDS", 0.01)
    put = room._put
    spoilt = []

    def spoil(system, local, remote):
        put(system, local, remote)
        if remote.endswith("optimizer.safetensors") and not spoilt:
            spoilt.append(remote)
            system.pipe_file(remote, b"other bytes")

    monkeypatch.setattr(room, "_put", spoil)
    copies.add(written(1))
    assert copies._is_copied.wait(10)
    assert "optimizer.safetensors of step-000001 came out with other bytes" in copies.said[0]
    assert "answers again" in copies.said[1]
    assert checkpoints.problems(tmp_path / "away" / "checkpoints" / "step-000001") is None


def test_a_slow_target_is_not_waited_for(tmp_path, written, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(room, "_put", lambda *given: ended.wait(60))
    said = []
    slow = Copies(tmp_path / "out", str(tmp_path / "away"), 2, 0.05, said.append)
    began = time.monotonic()
    for step in (1, 2, 3):
        slow.add(written(step))
    slow.close()
    assert time.monotonic() - began < 30
    assert "step-000003 is not at train.copy_to yet" in said[0]
    ended.set()


def test_copies_at_s3_are_verified_pruned_fetched_and_moved_aside(tmp_path, written, monkeypatch):
    """Over a socket: moto's server."""
    pytest.importorskip("s3fs", reason="needs the extra s3")
    pytest.importorskip("moto", reason="needs moto")
    from s3_server import s3_server, use_s3_server

    said = []
    with s3_server() as (_, url):
        use_s3_server(url, monkeypatch)
        fsspec.filesystem("s3").mkdir("runs")
        made = Copies(tmp_path / "out", "s3://runs/mine", 2, 30.0, said.append)
        for step in (1, 2, 3):
            made.add(written(step))
            assert made._is_copied.wait(30)
        assert room.steps_at(room.opened("s3://runs/mine")) == ["step-000002", "step-000003"]
        fetch(tmp_path / "empty", "s3://runs/mine", said.append)
        assert checkpoints.newest(tmp_path / "empty").step == 3
        assert said == ["fetched step-000003 from train.copy_to"]
        room.set_aside("s3://runs/mine")
        assert room.steps_at(room.opened("s3://runs/mine")) == []
        left = fsspec.filesystem("s3").find("runs/mine")
        assert sum(path.endswith("files.json") for path in left) == 2


def test_a_scheme_without_its_package_names_the_extra(monkeypatch):
    def missing(*given, **named):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(ConfigError, match=r"s3:// needs a package: pip install .*s3"):
        room.opened("s3://bucket/run")


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ConfigError, match=r"train\.copy_to: nonsense:// is unknown"):
        room.opened("nonsense://bucket/run")


def test_the_pointer_and_the_journal_travel(tmp_path, written, copies):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text(json.dumps({"step": 1, "values": {}}))
    copies.add(written(1))
    assert copies._is_copied.wait(10)
    assert (tmp_path / "away" / "metrics.jsonl").is_file()
