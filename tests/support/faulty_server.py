"""A real HTTP server of a folder that fails as it is told: by a status, a cut, a reset, silence."""

from __future__ import annotations

import re
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Fault = int | str  # a status, or "cut", "reset", "hang"


class FaultyServer:
    """`always`: a fault for each request of a file; `next`: those of its next requests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = ""
        self.always: dict[str, Fault] = {}
        self.next: dict[str, list[Fault]] = defaultdict(list)
        self.asked: Counter[str] = Counter()  # GETs by file
        self.sent: Counter[str] = Counter()  # bytes of their contents
        self.closing = threading.Event()
        self.lock = threading.Lock()

    def fault(self, name: str, is_get: bool) -> Fault | None:
        with self.lock:
            self.asked[name] += is_get
            return self.next[name].pop(0) if self.next[name] else self.always.get(name)


@contextmanager
def faulty_server(folder: Path) -> Iterator[FaultyServer]:
    """Serves `folder` on the loopback; `.url` says where."""
    state = FaultyServer(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(is_get=False)

        def do_GET(self) -> None:
            self.answer(is_get=True)

        def answer(self, is_get: bool) -> None:
            name = self.path.rpartition("/")[2]
            fault = state.fault(name, is_get)
            file = state.folder / name
            if fault == "hang":
                state.closing.wait(60)
            if fault in ("hang", "reset"):
                self.close_connection = True
                return
            if fault != "cut" and (fault or not file.is_file()):
                self.send_error(int(fault or 404))
                return
            data = file.read_bytes()
            if match := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                data = data[int(match[1]) : int(match[2]) + 1]
            self.send_response(206 if match else 200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if is_get:
                with state.lock:
                    state.sent[name] += len(data)
                self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield state
    finally:
        state.closing.set()
        server.shutdown()
        server.server_close()
