"""An S3 on this machine, over a real socket: moto's server, and faults as S3 answers them.

Imports moto: a test without it is to be skipped before it imports this.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

CODES = {403: ("403 Forbidden", "AccessDenied"), 503: ("503 Slow Down", "SlowDown")}


class Bucket:
    """S3 with a bucket; requests for a key that ends as `faults` says are answered so."""

    def __init__(self):
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.faults = {}

    def __call__(self, environ, start):
        for end, status in self.faults.items():
            if environ["PATH_INFO"].endswith(end):
                line, code = CODES[status]
                start(line, [("Content-Type", "application/xml")])
                return [f"<Error><Code>{code}</Code><Message>{code}</Message></Error>".encode()]
        return self.moto(environ, start)


@contextmanager
def s3_server() -> Iterator[tuple[Bucket, str]]:
    """Serves on the loopback; yields the application and its URL."""
    application = Bucket()
    server = make_server("127.0.0.1", 0, application, threaded=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield application, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def use_s3_server(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets s3:// mean it, by the usual environment variables."""
    for name, value in {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
