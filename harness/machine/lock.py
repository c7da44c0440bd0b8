"""One run in a folder: OUT/run.lock names the process that writes there, a second one is refused.

The holder renews it every 20 s. Whose process is gone from this machine holds nothing; of another
machine's only watching tells, for three minutes: clocks of two machines are never compared.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from harness.errors import ConfigError

FILE = "run.lock"
RENEW_SECONDS = 20.0
STALE_SECONDS = 180.0
POLL_SECONDS = 2.0


class RunLock:
    """The right to write into an output folder, until `release` or the end of this process."""

    def __init__(
        self, path: Path, descriptor: int, holder: dict[str, Any], made_folder: bool
    ) -> None:
        self.path = path
        self._made_folder = made_folder
        self._descriptor = descriptor
        self._holder = holder
        self._ended = threading.Event()
        self._renew(0)
        threading.Thread(target=self._keep, name="run lock", daemon=True).start()

    @classmethod
    def take(
        cls, out: Path, what: str, *, waits: bool = False, say: Callable[[str], None] = print
    ) -> RunLock:
        """Returns the lock of a folder, which is made.

        `what`: who asks, for the refusal of others. `waits`: one that another machine holds is
        watched, and taken over when it is not renewed. Raises ConfigError where another run has it.
        """
        path = out / FILE
        made_folder = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        while True:
            try:
                number = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
            except FileExistsError:
                _remove_stale(path, waits, say)
                continue
            holder = {"what": what, "host": os.uname().nodename, **_this_process()}
            return cls(path, number, holder, made_folder)

    def check(self) -> None:
        """Raises ConfigError where the folder was removed, or another run has taken it over."""
        if not self.path.parent.is_dir():
            raise ConfigError(f"{self.path.parent} was removed while the run was writing there")
        try:
            is_ours = os.path.samestat(os.stat(self.path), os.fstat(self._descriptor))
        except FileNotFoundError:
            raise ConfigError(
                f"{self.path} was removed while the run was going on: whether another run writes "
                "there is no longer known"
            ) from None
        if not is_ours:
            raise ConfigError(f"{self.path.parent} was taken over by {_words(_read(self.path))}")

    def release(self) -> None:
        """Gives the folder free; a second call does nothing."""
        if self._ended.is_set():
            return
        self._ended.set()
        with suppress(ConfigError, OSError):
            self.check()
            self.path.unlink()
            if self._made_folder:
                self.path.parent.rmdir()  # where a run that was refused has left nothing
        os.close(self._descriptor)

    def _keep(self) -> None:
        beats = 0
        while not self._ended.wait(RENEW_SECONDS):
            beats += 1
            with suppress(OSError):  # a folder that is gone is told at the next save
                self._renew(beats)

    def _renew(self, beats: int) -> None:
        # In place and of one length: a full disk takes it, and a lock that others have put in its
        # place is not touched.
        document = {**self._holder, "renewed": f"{beats:012d} times"}
        os.pwrite(self._descriptor, json.dumps(document).encode(), 0)
        os.fsync(self._descriptor)


def refuse_if_held(out: Path) -> None:
    """Raises ConfigError where a living process of this machine holds the folder.

    Before anything is spawned; what another machine may hold is for `RunLock.take` to watch.
    """
    holder = _read(out / FILE)
    if holder and _is_of_this_machine(holder) and not _is_gone(holder):
        raise ConfigError(_refusal(out, holder))


def _remove_stale(path: Path, waits: bool, say: Callable[[str], None]) -> None:
    """Removes a lock that nobody holds any more. Raises ConfigError where somebody does."""
    try:
        number = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        holder = _read(path)
        if _is_of_this_machine(holder):
            if not _is_gone(holder):
                raise ConfigError(_refusal(path.parent, holder))
        elif not waits:
            raise ConfigError(
                f"{_refusal(path.parent, holder)}; if it has ended, --resume auto watches it for "
                f"{STALE_SECONDS / 60:g} minutes and takes over"
            )
        else:
            say(
                f"{path.parent} is held by {_words(holder)}: waiting {STALE_SECONDS / 60:g} "
                "minutes for a sign of life"
            )
            _watch(path, holder)
            say(f"no sign of life from {_words(holder)}: taking over")
        aside = path.with_name(f".{FILE}.{os.getpid()}")
        with suppress(FileNotFoundError):  # another one was faster
            os.replace(path, aside)
            if not os.path.samestat(os.stat(aside), os.fstat(number)):
                os.replace(aside, path)  # a new one, put there by one that was faster
            aside.unlink(missing_ok=True)
    finally:
        os.close(number)


def _watch(path: Path, holder: dict[str, Any]) -> None:
    """Returns when nothing has changed for long enough, or it is gone. Raises ConfigError."""
    end = time.monotonic() + STALE_SECONDS
    while path.exists() and time.monotonic() < end:
        time.sleep(POLL_SECONDS)
        if (now := _read(path)) != holder and now:
            raise ConfigError(_refusal(path.parent, now))


def _read(path: Path) -> dict[str, Any]:
    """Returns who holds a lock; {} where it does not say, as in the moment in which it is made."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _refusal(out: Path, holder: dict[str, Any]) -> str:
    return (
        f"{out} is in use by {_words(holder)}: two runs in one folder would destroy each other; "
        "choose another out=, or end that one first"
    )


def _words(holder: dict[str, Any]) -> str:
    if not holder:
        return f"a run that does not say who it is ({FILE} is empty or damaged)"
    return f"{holder.get('what')}, process {holder.get('pid')} on {holder.get('host')}"


def _this_process() -> dict[str, Any]:
    return {"machine": _machine(), "pid": os.getpid(), "began": _began(os.getpid())}


def _machine() -> str:
    """Returns what tells boots apart, and containers that number processes by themselves."""
    parts = [os.uname().nodename]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _is_of_this_machine(holder: dict[str, Any]) -> bool:
    return holder.get("machine") == _machine() and type(holder.get("pid")) is int


def _is_gone(holder: dict[str, Any]) -> bool:
    return _began(holder["pid"]) != holder.get("began")


def _began(pid: int) -> str | None:
    """Returns when a process began, untouched by jumps of the clock; None: it has ended."""
    if sys.platform != "linux":
        try:
            return str(psutil.Process(pid).create_time())
        except psutil.NoSuchProcess:
            return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]  # Z: ended, and not yet waited for
