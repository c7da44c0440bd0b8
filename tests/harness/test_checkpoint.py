"""Checkpoints survive whatever happens to the process that writes them, and are never half
believed.
"""

import builtins
import itertools
import json
import os
import resource
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


def test_a_file_larger_than_may_be_is_an_error_of_the_system_too(tmp_path):
    """As a full disk: safetensors tells it by an error of its own, which is no OSError."""
    write(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            checkpoints.write(
                tmp_path, 2, save_model, {"exp_avg/x": torch.zeros(100_000)}, {"step": 2}
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
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


def test_a_future_that_is_run_again_is_moved_aside_and_not_removed(tmp_path):
    written = [write(tmp_path, step) for step in (2, 4, 6)]
    said = []
    checkpoints.settle(tmp_path, written[0], said.append)
    assert checkpoints.newest(tmp_path).step == 2
    (aside,) = (tmp_path / "checkpoints").glob("earlier-future-*")
    assert sorted(path.name for path in aside.iterdir()) == ["step-000004", "step-000006"]
    assert f"moved aside, to {aside}: step-000004, step-000006" in said[0]


def test_what_a_folder_held_of_another_run_is_moved_aside_before_one_goes_on_from_elsewhere(
    tmp_path,
):
    for step in (2, 4):
        write(tmp_path / "own", step)
    checkpoints.settle(tmp_path / "own", write(tmp_path / "other", 3), lambda sentence: None)
    assert checkpoints.newest(tmp_path / "own") is None
    assert len(list((tmp_path / "own").rglob("step-*"))) == 2


@pytest.mark.parametrize("keep", [1, 3, 10])
@pytest.mark.parametrize("written", [1, 2, 5])
def test_as_many_checkpoints_as_are_asked_for_are_kept(tmp_path, keep, written):
    for step in range(1, written + 1):
        write(tmp_path, step)
        checkpoints.prune(tmp_path, step, keep)
    expected = [f"step-{step:06d}" for step in range(max(1, written - keep + 1), written + 1)]
    assert names(tmp_path) == expected


def test_damaged_checkpoints_are_moved_aside_and_not_counted(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    for step in (3, 4):
        (checkpoints.place(tmp_path, step) / "model" / "model.safetensors").write_bytes(b"w")
    write(tmp_path, 5)
    checkpoints.prune(tmp_path, 5, keep=3)
    (aside,) = (tmp_path / "checkpoints").glob("damaged-*")
    assert names(tmp_path) == [aside.name, "step-000001", "step-000002", "step-000005"]


def test_one_that_was_just_written_and_the_best_are_never_removed(tmp_path):
    for step in (1, 2, 3, 9):
        write(tmp_path, step)
    checkpoints.point_to_best(tmp_path, 1, "dev/CIDEr", 0.5)
    checkpoints.prune(tmp_path, 2, keep=1)
    assert names(tmp_path) == ["best.json", "step-000001", "step-000002", "step-000009"]
    assert checkpoints.at(tmp_path, "best").step == 1
    assert checkpoints.at(tmp_path, "2").step == checkpoints.at(tmp_path, "step-000002").step == 2
    assert checkpoints.at(tmp_path, "newest").step == 9


def test_a_checkpoint_that_is_not_there_is_refused_by_name(tmp_path):
    write(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"best\.json.*train\.keep_best=dev/CIDEr"):
        checkpoints.at(tmp_path, "best")
    with pytest.raises(ConfigError, match=r"--checkpoint 7: .* holds step-000003; expected newest"):
        checkpoints.at(tmp_path, "7")


def test_only_damaged_checkpoints_are_refused_and_not_begun_over(tmp_path):
    for step in (1, 2):
        (write(tmp_path, step).path / "state.json").write_text("{}")
    with pytest.raises(
        ConfigError, match=r"none of the 2 checkpoints .* begin anew with --restart"
    ):
        checkpoints.find(tmp_path, "auto")
    assert names(tmp_path) == ["step-000001", "step-000002"]


@pytest.mark.parametrize(
    "text",
    [
        *("[1]", "5", "null", "{}", "[]", "[" * 100_000),
        *('{"state.json": 3, "optimizer.safetensors": 4}', "\0", '"aaa'),
    ],
    ids=["list", "number", "null", "empty", "empty list", "deep", "numbers", "zero", "cut"],
)
def test_a_list_of_files_that_is_none_is_damage_that_is_passed_over(tmp_path, text):
    write(tmp_path, 1)
    (write(tmp_path, 2).path / "files.json").write_text(text)
    said = []
    assert checkpoints.find(tmp_path, "auto", said.append).step == 1
    assert "is damaged" in said[0]


@pytest.mark.parametrize("state", ["[]", "null", "{}", '{"step": "two"}', "{" * 100_000])
def test_a_state_that_is_none_is_damage_also_where_its_hash_is_right(tmp_path, state):
    write(tmp_path, 1)
    folder = write(tmp_path, 2).path
    (folder / "state.json").write_text(state)
    files = json.loads((folder / "files.json").read_text())
    files["state.json"] = checkpoints.fact(folder / "state.json")
    (folder / "files.json").write_text(json.dumps(files))
    assert checkpoints.find(tmp_path, "auto").step == 1


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
