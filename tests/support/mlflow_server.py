"""A real MLflow server in a thread, that can be made slow, or refuse and echo what it was sent."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.server import app, handlers
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from werkzeug.serving import make_server


class MlflowServer:
    """`uri`; `delay`: seconds before each answer, cut short by `release`; `echoes`: answers 401."""

    def __init__(self, folder: Path) -> None:
        # The handlers of mlflow hold one store for the whole process.
        place = (folder / "artifacts").as_uri()
        handlers._tracking_store = SqlAlchemyStore(f"sqlite:///{folder}/server.db", place)
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.delay = 0.0
        self.echoes = False
        self.requests = 0
        self.released = threading.Event()
        self._server = make_server("127.0.0.1", 0, self._answer, threaded=True)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self.uri = f"http://{self.address}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _answer(self, environ: dict[str, Any], start: Any) -> Iterable[bytes]:
        self.requests += 1
        if self.delay:
            self.released.wait(self.delay)
        if not self.echoes:
            return app(environ, start)
        sent = environ.get("HTTP_AUTHORIZATION", "nobody")
        start("401 Unauthorized", [("Content-Type", "text/plain")])
        return [
            f"\x1b[31mno entry with Authorization: {sent} to {environ['PATH_INFO']}"
            f"?{environ['QUERY_STRING']}".encode()
        ]

    def runs(self) -> list[Any]:
        client = MlflowClient(self.uri)
        return client.search_runs([e.experiment_id for e in client.search_experiments()])

    def steps(self, run_id: str, key: str) -> list[int]:
        """Returns the steps of a figure as often as they are there."""
        return sorted(
            metric.step for metric in MlflowClient(self.uri).get_metric_history(run_id, key)
        )

    def close(self) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()
