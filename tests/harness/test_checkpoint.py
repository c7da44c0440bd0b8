"""Checkpoints survive whatever happens to the process that writes them, and are never half
believed.
"""

import builtins
import itertools
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from harness import checkpoint as checkpoints
from harness.errors import ConfigError


def save_model(folder: Path) -> None:
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")


def write(out: Path, step: int) -> checkpoints.Checkpoint:
    return checkpoints.write(
        out, step, save_model, {"step/x": torch.tensor(float(step))}, {"step": step}
    )


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


class Killed(BaseException):
    pass


@pytest.fixture
def dies(monkeypatch):
    """dies(n): the n-th file operation is the last that this process does; those after it fail as
    well.
    """

    def _dies(moment: int) -> list[str]:
        done: list[str] = []

        def counted(name, original):
            def operation(*arguments, **keywords):
                if len(done) >= moment:
                    raise Killed
                done.append(name)
                return original(*arguments, **keywords)

            return operation

        for owner, name in (
            (builtins, "open"),
            (os, "fsync"),
            (os, "replace"),
            (os, "mkdir"),
            (os, "rmdir"),
            (os, "unlink"),
            (shutil, "rmtree"),
            (checkpoints, "save_file"),
            (Path, "write_text"),
            (Path, "write_bytes"),
            (Path, "mkdir"),
        ):
            monkeypatch.setattr(owner, name, counted(name, getattr(owner, name)))
        return done

    return _dies


def test_a_process_killed_at_any_moment_of_a_write_leaves_the_older_checkpoint_whole(
    tmp_path, dies, monkeypatch
):
    write(tmp_path, 1)
    for moment in itertools.count():
        done = dies(moment)
        try:
            write(tmp_path, 2)
        except Killed:
            monkeypatch.undo()
        else:
            break
        found = checkpoints.newest(tmp_path)
        assert found.step == (2 if "replace" in done else 1), done[-1]
        assert found.optimizer()["step/x"] == found.step
        shutil.rmtree(tmp_path / "checkpoints" / "step-000002", ignore_errors=True)
    monkeypatch.undo()
    assert moment > 20
    assert {"save_file", "fsync", "replace", "write_text"} <= set(done)
    (tmp_path / "checkpoints" / ".writing-step-000002").mkdir()
    checkpoints.prune(tmp_path, 2, keep=2)
    assert names(tmp_path) == ["step-000001", "step-000002"]


def test_a_full_disk_is_an_error_that_leaves_nothing_half_written(tmp_path, monkeypatch):
    write(tmp_path, 1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2)
    assert names(tmp_path) == ["step-000001"]


def test_what_does_not_read_back_does_not_become_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: _spoil(tmp_path))
    with pytest.raises(OSError, match=r"does not read back: optimizer.safetensors is damaged"):
        write(tmp_path, 1)
    assert names(tmp_path) == []


def _spoil(out: Path) -> None:
    for file in out.rglob("optimizer.safetensors"):
        file.write_bytes(b"another disk's")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "files.json").unlink(), "it has no files.json"),
        (lambda folder: (folder / "files.json").write_text('{"sta'), "files.json is damaged"),
        (lambda folder: (folder / "state.json").unlink(), "state.json is missing"),
        (lambda folder: (folder / "state.json").write_text('{"step": 3}'), "state.json is damaged"),
        (
            lambda folder: (folder / "model" / "model.safetensors").write_bytes(b"weightz"),
            "model.safetensors is damaged",
        ),
    ],
    ids=["no list", "torn list", "missing", "other", "one bit"],
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_a_sentence_and_refused_by_name(
    tmp_path, damage, words
):
    write(tmp_path, 1)
    damaged = write(tmp_path, 2).path
    damage(damaged)
    said = []
    assert checkpoints.find(tmp_path, "auto", said.append).step == 1
    assert len(said) == 1
    assert str(damaged) in said[0]
    assert words in said[0]
    with pytest.raises(ConfigError, match="is not a whole checkpoint"):
        checkpoints.find(tmp_path, str(damaged))
    assert checkpoints.find(tmp_path, str(tmp_path)).step == 1


def test_nothing_to_resume_is_a_fresh_start_for_auto_and_an_error_for_a_folder(tmp_path):
    assert checkpoints.find(tmp_path, "auto") is None
    assert checkpoints.find(tmp_path, None) is None
    with pytest.raises(ConfigError, match="is not a folder"):
        checkpoints.find(tmp_path, str(tmp_path / "gone"))
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="holds no whole checkpoint"):
        checkpoints.find(tmp_path, str(tmp_path))


def test_prune_keeps_the_newest_also_past_a_million_steps_and_clears_leftovers(tmp_path):
    for step in (999_998, 999_999, 1_000_000):
        write(tmp_path, step)
    (tmp_path / "checkpoints" / ".writing-step-000007").mkdir()
    checkpoints.prune(tmp_path, 1_000_000, keep=2)
    assert names(tmp_path) == ["step-1000000", "step-999999"]
    assert checkpoints.newest(tmp_path).step == 1_000_000


def test_a_future_that_is_run_again_is_removed_once_the_new_one_is_written(tmp_path):
    for step in (2, 4, 6):
        write(tmp_path, step)
    write(tmp_path, 3)
    checkpoints.prune(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-000002", "step-000003"]


def test_moments_and_state_come_back_as_they_were_and_the_digest_names_them(tmp_path):
    moments = {"exp_avg/a.b": torch.randn(3, 2), "step/a.b": torch.tensor(4.0)}
    written = checkpoints.write(
        tmp_path, 4, save_model, moments, {"step": 4, "scaler": {"scale": 0.1}}
    )
    found = checkpoints.newest(tmp_path)
    assert found.state == {"step": 4, "scaler": {"scale": 0.1}}
    assert all(found.optimizer()[name].equal(value) for name, value in moments.items())
    assert found.digest == written.digest
    assert set(json.loads((found.path / "files.json").read_text())) == {
        "model/model.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    other = checkpoints.write(tmp_path / "other", 4, save_model, {}, {"step": 4})
    assert other.digest != written.digest
    assert other.optimizer() == {}


def rewritten(folder: Path, **changes: object) -> None:
    """A whole checkpoint whose state.json says otherwise; None takes a field out."""
    state = json.loads((folder / "state.json").read_text()) | changes
    kept = {key: value for key, value in state.items() if value is not None}
    (folder / "state.json").write_text(json.dumps(kept))
    files = json.loads((folder / "files.json").read_text())
    files["state.json"] = checkpoints.fact(folder / "state.json")
    (folder / "files.json").write_text(json.dumps(files))


def test_a_state_says_its_format_and_one_without_a_number_is_read_as_before(tmp_path):
    folder = write(tmp_path, 1).path
    assert json.loads((folder / "state.json").read_text()) == {"format": 2, "step": 1}
    rewritten(folder, format=None)
    assert json.loads((folder / "state.json").read_text()) == {"step": 1}
    assert checkpoints.newest(tmp_path).state == {"step": 1}


@pytest.mark.parametrize("unknown", [3, "two"])
def test_a_later_versions_checkpoint_is_refused_and_not_passed_over(tmp_path, unknown):
    write(tmp_path, 1)
    rewritten(write(tmp_path, 2).path, format=unknown)
    said = []
    words = (
        rf"step-000002/state.json has format {unknown!r}, harness .* reads 1 to 2: "
        "go on with the version"
    )
    for resume in ("auto", str(tmp_path), str(tmp_path / "checkpoints" / "step-000002")):
        with pytest.raises(ConfigError, match=words):
            checkpoints.find(tmp_path, resume, said.append)
    assert (said, names(tmp_path)) == ([], ["step-000001", "step-000002"])
