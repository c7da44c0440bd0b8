"""One run in a folder: a second one is refused by name, what nobody holds is taken over."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from harness.errors import ConfigError
from harness.machine import lock as locks
from harness.machine.lock import RunLock, refuse_if_held

HOLD = """
import sys, time
from pathlib import Path
from harness.machine.lock import RunLock
lock = RunLock.take(Path(sys.argv[1]), "a run of harness train")
print("held", flush=True)
time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process of this machine that holds the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def of_another_machine(out, **changes):
    """Leaves the lock of a run on another machine."""
    holder = {
        "what": "a run of harness train",
        "host": "colab-7",
        "machine": "another",
        "pid": os.getpid(),
        "began": "1",
        "renewed": "000000000000 times",
    }
    (out / locks.FILE).write_text(json.dumps(holder | changes))


@pytest.fixture
def soon(monkeypatch):
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(locks, "POLL_SECONDS", 0.02)


def test_a_second_run_is_refused_by_the_name_of_the_first_also_when_it_would_wait(tmp_path, holder):
    words = rf"in use by a run of harness train, process {holder.pid} on .*choose another out="
    for waits in (False, True):
        with pytest.raises(ConfigError, match=words):
            RunLock.take(tmp_path, "a run", waits=waits)
    with pytest.raises(ConfigError, match=words):
        refuse_if_held(tmp_path)


def test_what_a_killed_process_held_is_taken_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    refuse_if_held(tmp_path)
    lock = RunLock.take(tmp_path, "a run")
    lock.check()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_number_of_a_process_that_is_another_one_now_holds_nothing(tmp_path):
    """A number is given again: it is the beginning of a process that tells."""
    lock = RunLock.take(tmp_path, "a run")
    held = json.loads((tmp_path / locks.FILE).read_text())
    lock.release()
    (tmp_path / locks.FILE).write_text(json.dumps(held | {"began": "12"}))
    RunLock.take(tmp_path, "a run").release()


def test_one_of_another_machine_is_refused_without_resume_and_watched_with_it(tmp_path, soon):
    of_another_machine(tmp_path)
    with pytest.raises(ConfigError, match=r"process \d+ on colab-7.*--resume auto watches it"):
        RunLock.take(tmp_path, "a run")
    said = []
    lock = RunLock.take(tmp_path, "a run", waits=True, say=said.append)
    assert "waiting" in said[0]
    assert "no sign of life from" in said[1]
    lock.release()


def test_one_that_is_renewed_while_it_is_watched_keeps_the_folder(tmp_path, soon):
    of_another_machine(tmp_path)

    def renew():
        time.sleep(0.1)
        of_another_machine(tmp_path, renewed="000000000001 times")

    thread = threading.Thread(target=renew)
    thread.start()
    with pytest.raises(ConfigError, match="is in use by a run of harness train"):
        RunLock.take(tmp_path, "a run", waits=True, say=lambda sentence: None)
    thread.join()


def test_a_lock_that_says_nothing_is_watched_too(tmp_path, soon):
    (tmp_path / locks.FILE).write_text("")
    with pytest.raises(ConfigError, match="does not say who it is"):
        RunLock.take(tmp_path, "a run")
    RunLock.take(tmp_path, "a run", waits=True, say=lambda sentence: None).release()


def test_the_holder_renews_it_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "RENEW_SECONDS", 0.01)
    lock = RunLock.take(tmp_path, "a run")
    sizes = set()
    end = time.monotonic() + 30
    while not (held := json.loads((tmp_path / locks.FILE).read_text()))["renewed"] > "000000000002":
        sizes.add((tmp_path / locks.FILE).stat().st_size)
        assert time.monotonic() < end
    assert held["pid"] == os.getpid()
    assert len(sizes) <= 1
    lock.release()


def test_a_folder_that_was_removed_or_taken_over_is_told_to_its_holder(tmp_path):
    out = tmp_path / "out"
    lock = RunLock.take(out, "a run")
    lock.check()
    of_another_machine(tmp_path)
    os.replace(tmp_path / locks.FILE, out / locks.FILE)
    with pytest.raises(ConfigError, match=r"was taken over by a run of harness train, .* colab-7"):
        lock.check()
    (out / locks.FILE).unlink()
    with pytest.raises(ConfigError, match="was removed while the run was going on"):
        lock.check()
    out.rmdir()
    with pytest.raises(ConfigError, match="out was removed while the run was writing there"):
        lock.check()
    lock.release()


def test_a_lock_that_another_one_took_over_a_moment_earlier_is_put_back(tmp_path, monkeypatch):
    """The slower one moves aside what it finds, which is no longer what it has watched."""
    of_another_machine(tmp_path)
    watched = []

    def watch(path, holder):
        if watched:
            raise ConfigError("it is held")
        watched.append(holder)
        path.unlink()
        of_another_machine(tmp_path, host="faster")

    monkeypatch.setattr(locks, "_watch", watch)
    with pytest.raises(ConfigError, match="it is held"):
        RunLock.take(tmp_path, "a run", waits=True, say=lambda sentence: None)
    assert json.loads((tmp_path / locks.FILE).read_text())["host"] == "faster"
    assert [path.name for path in tmp_path.iterdir()] == [locks.FILE]


def test_of_two_that_take_over_at_once_one_gets_it(tmp_path, soon):
    of_another_machine(tmp_path)
    came = []

    def take():
        try:
            came.append(RunLock.take(tmp_path, "a run", waits=True, say=lambda sentence: None))
        except ConfigError as error:
            came.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(one, RunLock) for one in came) == 1
