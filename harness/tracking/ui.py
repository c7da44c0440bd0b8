"""MLflow's pages of a run: which address they have, and a server on this machine that shows them.

A run's folder -> its store, as the run was told of it. What is in a database is served on 127.0.0.1
until Ctrl-C; of a store that is a server the link is enough.
"""

from __future__ import annotations

import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from harness.errors import ConfigError
from harness.redact import clean, say
from harness.tracking.journal import run_id_in
from harness.tracking.mlflow import read_description, why
from harness.tracking.store import database, follow_move, run_page, runs_page, store_of

HOST = "127.0.0.1"
USUAL_PORT = 5000  # mlflow's own
START_SECONDS = 180.0  # 17 s on two idle cores
POLL_SECONDS = 0.2
END_SECONDS = 10.0  # that a server has to end by itself


def show_run(folder: Path, port: int | None = None) -> None:
    """Serves the pages of a run's store until SIGINT or SIGTERM, or says the link of a server.

    Raises ConfigError for a folder without such a run, a port in use, a server that does not start.
    """
    uri = store_of(folder, read_description(folder)["uri"])
    if uri.startswith("sqlite") and not database(uri).is_file():
        raise ConfigError(f"{folder}: its MLflow database {database(uri)} is not there")
    if uri.startswith("databricks"):
        raise ConfigError(f"{folder} is in {clean(uri)}, whose own pages show it")
    pages = pages_of(uri, folder)
    if uri.startswith("http"):
        tell(uri.rstrip("/"), pages)
        return
    try:
        follow_move(uri, folder)
    except sqlite3.Error as error:
        say(f"pictures may be missing: {database(uri)} cannot be written ({error})", sys.stderr)
    say("MLflow's server is being started, which takes about 20 s")
    with serving(uri, free_port(port)) as server:
        tell(server.address, pages)
        say("Ctrl-C ends it")
        server.wait()


def pages_of(uri: str, folder: Path) -> dict[str, str]:
    """Returns title -> path of the pages that show the run, behind a server's address.

    Without an answer of the store it is the list of experiments.
    """
    from mlflow import MlflowClient

    run_id = run_id_in(folder) or ""
    try:
        experiment = MlflowClient(uri).get_run(run_id).info.experiment_id
    except Exception as error:  # every kind of store has exceptions of its own
        say(f"{clean(uri)} does not tell where the run is ({why(error)})", sys.stderr)
        return {"experiments": "/#/experiments"}
    return {"all runs": runs_page(experiment), "this run": run_page(experiment, run_id)}


def tell(address: str, pages: dict[str, str]) -> None:
    for title, page in pages.items():
        say(f"{title:10} {address}{page}")


def free_port(asked: int | None) -> int:
    """Returns `asked`, else the usual port, else any that is free. Raises ConfigError where `asked`
    is in use.
    """
    for port in (asked,) if asked else (USUAL_PORT, 0):
        with socket.socket() as tried, suppress(OSError):
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that has just ended
            tried.bind((HOST, port))
            return int(tried.getsockname()[1])
    raise ConfigError(f"--port {asked} is in use: give another, or none for one that is free")


class Server:
    """A process of mlflow that serves one store."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, words: IO[bytes]) -> None:
        self.address = f"http://{HOST}:{port}"
        self._process = process
        self._words = words
        self._stop_asked = False

    def wait(self) -> None:
        """Returns when it was asked to stop. Raises ConfigError where the server ends by itself."""
        while not self._stop_asked:
            self._check()
            time.sleep(POLL_SECONDS)

    def wait_until_ready(self) -> None:
        """Raises ConfigError for one that does not start."""
        until = time.monotonic() + START_SECONDS
        while not self._stop_asked and time.monotonic() < until:
            self._check()
            with suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                urllib.request.urlopen(f"{self.address}/health", timeout=5).close()
                return
            time.sleep(POLL_SECONDS)
        if not self._stop_asked:
            raise ConfigError(f"MLflow's server did not answer within {START_SECONDS:g} s")

    def ask_to_stop(self, number: int, frame: object) -> None:
        self._stop_asked = True

    def end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(END_SECONDS)
                return

    def _check(self) -> None:
        if self._process.poll() is None:
            return
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise ConfigError(f"MLflow's server has ended: {clean(last.strip())}")


@contextmanager
def serving(uri: str, port: int) -> Iterator[Server]:
    """Starts mlflow's server of a store on this machine alone, and ends it with the block.

    SIGINT and SIGTERM make `Server.wait` return. Raises ConfigError for one that does not start.
    """
    line = [sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port)]
    environment = os.environ | {
        "MLFLOW_BACKEND_STORE_URI": uri,  # on the line everybody could read its password
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # processes for judging LLMs, 500 MB
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    # mlflow makes ./mlartifacts where it is asked to keep a file
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            [*line, "--workers", "1"],
            env=environment,
            cwd=folder,
            stdout=words,
            stderr=words,
            start_new_session=True,  # Ctrl-C is for this process, which ends the other
        )
        server = Server(process, port, words)
        stops = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        before = {number: signal.signal(number, server.ask_to_stop) for number in stops}
        try:
            server.wait_until_ready()
            yield server
        finally:
            server.end()
            for number, handler in before.items():
                signal.signal(number, handler)
