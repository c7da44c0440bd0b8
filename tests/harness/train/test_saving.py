"""Checkpoints of real runs: by the clock, beside training, the best one, on a full disk, in a
folder that goes away, over data that are others now.
"""

import json
import os
import resource
import shutil
import signal
import threading

import pytest

from harness import checkpoint as checkpoints
from harness.config.schema import Config
from harness.errors import ConfigError
from harness.evaluate.run_on_disk import evaluate_run
from harness.machine import lock as locks
from harness.machine.lock import RunLock
from harness.train import run as train
from harness.train import saving
from same_runs import AtStep, forked, same_run
from toy_runs import make_config, make_shards


def config_of(root, name, **settings):
    return make_config(root, root / "clip", root / "t5", name, **settings)


@pytest.fixture(scope="module")
def whole(root):
    """Trains the run that nothing interrupts: 8 steps, two epochs, no evaluation."""
    train.run(config_of(root, "whole", dev=False))
    return root / "whole"


def steps_of(out):
    return sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))


def test_the_clock_asks_for_checkpoints_between_those_of_the_steps(root, whole):
    config = config_of(
        root, "clocked", dev=False, save_every=100, save_minutes=1e-9, keep_checkpoints=100
    )
    put_off = saving.Saver._put_off
    with pytest.MonkeyPatch.context() as patch:  # as if it cost nothing
        patch.setattr(saving, "MOST_OF_THE_TIME", 1e9)
        patch.setattr(saving.Saver, "_put_off", lambda self, seconds: put_off(self, 0.0))
        train.run(config)
    steps = steps_of(config.out_dir)
    assert steps[-1] == 8
    assert len(steps) > 2
    same_run(config.out_dir, whole)


def test_a_run_does_not_wait_for_what_is_written_and_trains_on_beside_it(root, whole, monkeypatch):
    """The write of step 2 does not end before step 4 was taken."""
    went_on = threading.Event()
    write = checkpoints.write

    def slow(out, step, *given):
        if step == 2:
            assert went_on.wait(60)
        return write(out, step, *given)

    monkeypatch.setattr(checkpoints, "write", slow)
    config = config_of(root, "beside", dev=False, save_every=2, keep_checkpoints=9)
    train.run(config, observers=[AtStep(3, went_on.set)])
    assert steps_of(config.out_dir) == [2, 4, 6, 8]
    same_run(config.out_dir, whole)
    rows = [json.loads(line) for line in (config.out_dir / "metrics.jsonl").open()]
    costs = [row["values"] for row in rows if "save/blocked_seconds" in row["values"]]
    assert len(costs) == 4
    assert all(0 < cost["save/share_of_time"] < 1 for cost in costs)


def test_a_run_killed_while_a_checkpoint_is_written_beside_it_loses_nothing(root, whole):
    config = config_of(root, "killed-in-thread", dev=False, save_every=2)
    fact = checkpoints.fact

    def killed(path):
        if "step-000006" in str(path) and threading.current_thread().name == "checkpoint":
            os.kill(os.getpid(), signal.SIGKILL)
        return fact(path)

    def act():
        checkpoints.fact = killed
        train.run(config)

    assert forked(act) == -signal.SIGKILL
    assert checkpoints.newest(config.out_dir).step == 4
    train.run(config, "auto")
    same_run(config.out_dir, whole)
    assert not list((config.out_dir / "checkpoints").glob(".*"))


def test_saving_that_costs_too_much_comes_less_often_and_says_so(root, capfd):
    config = config_of(root, "costly", dev=False, max_steps=2, save_minutes=1e-4)
    train.run(config)
    said = capfd.readouterr().err
    assert "a checkpoint costs" in said
    assert "in place of 0.0001, so that saving takes at most 3.5% of the time" in said


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_not_the_run(
    root, capfd, monkeypatch
):
    """Files may not grow beyond 20 kB from step 3 to step 7: weights, moments, pages of answers."""
    monkeypatch.setattr(saving, "RETRY_SECONDS", 0.0)
    config = config_of(root, "full", save_every=2)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited(size):
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    def act():
        full = [AtStep(2, limited(20_000)), AtStep(6, limited(before[0]))]
        train.run(config, observers=full)
        os._exit(0)

    assert forked(act) == 0
    assert steps_of(config.out_dir)[-1] == 8
    said = capfd.readouterr().err
    assert "the checkpoint of step 4 could not be written" in said
    assert "File too large" in said
    assert "Traceback" not in said
    train.run(config_of(root, "not-full"))
    same_run(config.out_dir, root / "not-full")


def test_a_disk_that_is_full_at_the_end_is_an_error(root, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "write", full)
    with pytest.raises(OSError, match="No space left"):
        train.run(config_of(root, "full-at-the-end", dev=False, max_steps=1))
    assert not (root / "full-at-the-end" / locks.FILE).exists()


def test_an_output_folder_that_goes_away_is_an_error_at_the_next_save(root):
    config = config_of(root, "gone", dev=False)
    gone = AtStep(4, lambda: shutil.rmtree(config.out_dir))
    with pytest.raises(ConfigError, match="gone was removed while the run was writing there"):
        train.run(config, observers=[gone])
    assert not config.out_dir.exists()


def test_two_runs_in_one_folder_are_one(root):
    config = config_of(root, "twice", dev=False, max_steps=1)
    lock = RunLock.take(config.out_dir, "a run of harness train")
    for resume in (None, "auto"):
        with pytest.raises(ConfigError, match="twice is in use by a run of harness train"):
            train.run(config, resume)
    assert [path.name for path in config.out_dir.iterdir()] == [locks.FILE]
    lock.release()
    train.run(config)


def test_restart_moves_the_earlier_run_aside_and_deletes_nothing(root, whole):
    out = root / "restarted"
    shutil.copytree(whole, out)
    (out / "quarantine.jsonl").write_text("{}\n")
    for folder in out.glob("checkpoints/step-*"):
        (folder / "state.json").write_text("{}")
    config = config_of(root, "restarted", dev=False)
    with pytest.raises(ConfigError, match="begin anew with --restart"):
        train.run(config, "auto")
    train.run(config, restart=True)
    (aside,) = out.glob("before-*")
    assert {path.name for path in aside.iterdir()} == {
        "checkpoints",
        "metrics.jsonl",
        "quarantine.jsonl",
    }
    assert len(list((aside / "checkpoints").glob("step-*"))) == 2
    same_run(out, whole)


# ---- the best one, and when to stop ------------------------------------------------------------


def test_the_best_checkpoint_is_kept_beside_the_newest_and_can_be_scored(root, monkeypatch):
    """The dev loss is best after step 3: evaluations come after steps 3, 6 and the epochs' ends."""
    values = iter([5.0, 3.0, 4.0, 4.5, 4.0])
    figures = train.loop.__globals__["BetweenSteps"]._evaluate.__globals__
    monkeypatch.setitem(figures, "_figures", lambda result: {"vqa/loss": next(values) // 1})
    monkeypatch.setitem(figures, "_tell", _track_loss)
    config = config_of(root, "best", keep_best="dev/vqa/loss", keep_checkpoints=1, save_every=100)
    train.run(config)
    assert steps_of(config.out_dir) == [4, 8]
    assert checkpoints.best(config.out_dir).name == "step-000004"
    monkeypatch.undo()
    report = evaluate_run(
        config.out_dir, [str(root / "dev")], which="best", overrides=["evaluation.bootstrap=20"]
    )
    assert report["step"] == 4


def _track_loss(run, result):
    loss = {3: 5.0, 4: 3.0, 6: 4.0, 8: 4.0}[run.state.step]
    run.track("dev", {"vqa/loss": loss})
    return ""


def test_a_run_that_gets_no_better_stops_early_and_stays_stopped(root, capfd):
    config = config_of(
        root,
        "early",
        evaluate_every=1,
        learning_rate=1e-12,  # whatever is best after step 1 stays so
        schedule="constant",
        early_stop={"metric": "dev/vqa/accuracy", "patience": 2},
    )
    last = train.run(config)
    assert last.name == "step-000003"
    assert checkpoints.newest(config.out_dir).step == 3
    said = capfd.readouterr().err
    assert "train.early_stop: dev/vqa/accuracy was best after step 1" in said
    train.run(config, "auto")
    assert "nothing is left to do" in capfd.readouterr().err
    assert steps_of(config.out_dir)[-1] == 3


@pytest.mark.parametrize(
    "asked", [{"keep_best": "dev/CIDER"}, {"early_stop": {"metric": "dev/CIDER"}}], ids=str
)
def test_a_figure_that_is_none_is_told_those_that_are(root, asked):
    config = config_of(root, f"unknown-{next(iter(asked))}", **asked)
    with pytest.raises(ConfigError, match=r"found 'dev/CIDER', the evaluation gives dev/.*CIDEr"):
        train.run(config)


# ---- other data --------------------------------------------------------------------------------


def over(config, path):
    document = config.model_dump(mode="json")
    document["data"]["train"] = [{"path": str(path)}]
    return Config(**document)


def test_data_that_were_rebuilt_are_refused_by_name_and_gone_on_over_when_asked(root, capfd):
    path = make_shards(root / "rebuilt", 14)
    config = over(config_of(root, "over-rebuilt", dev=False, max_steps=3), path)
    train.run(config)
    shutil.rmtree(path)
    make_shards(path, 18)
    config = over(config_of(root, "over-rebuilt", dev=False), path)
    words = r"rebuilt had 14 images, now 18; 4 shards, now 5; .*train\.resume_data=changed"
    with pytest.raises(ConfigError, match=words):
        train.run(config, "auto")
    changed = config.train.model_copy(update={"resume_data": "changed"})
    last = train.run(config.model_copy(update={"train": changed}), "auto")
    # One epoch is left, of 18 images in batches of 4.
    assert last.name == "step-000008"
    said = capfd.readouterr().err
    assert "going on at the start of epoch 2, 12 images of epoch 1 had been used" in said


def test_shards_that_were_exchanged_for_others_of_the_same_size_are_refused(root):
    path = make_shards(root / "exchanged", 14)
    config = over(config_of(root, "over-exchanged", dev=False, max_steps=3), path)
    train.run(config)
    shutil.rmtree(path)
    make_shards(path, 14, first=14)
    with pytest.raises(ConfigError, match=r"exchanged had"):
        train.run(config, "auto")
