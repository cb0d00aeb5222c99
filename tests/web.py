"""An HTTP server on the loopback interface that serves one archive: correctly, truncated or wrong."""

import hashlib
import http.server
import io
import os
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

IMAGE = os.urandom(400_000)


def _make_archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("set/train/hot/1.jpg", IMAGE)
        archive.writestr("set/test/cold/2.jpg", b"cold")
    return buffer.getvalue()


ARCHIVE = _make_archive()
SHA1 = hashlib.sha1(ARCHIVE).hexdigest()
HALF = len(ARCHIVE) // 2

Response = Callable[["Handler"], object]


class Handler(http.server.BaseHTTPRequestHandler):
    """Answer each request with the server's next response; the last one is repeated."""

    server: "Server"

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests += 1
            response = self.server.responses[min(self.server.requests, len(self.server.responses)) - 1]
        with suppress(ConnectionError):  # the client may close the connection early
            response(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def send(self, body: bytes, *, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)


class Server(http.server.ThreadingHTTPServer):
    """Count the requests and hold the responses to them."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests = 0
        self.responses: list[Response] = [complete]
        self.lock = threading.Lock()
        self.stop = threading.Event()
        """Set at the end of the test; ends responses that stall."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set.zip"


def reply(body: bytes, *, status: int = 200, **headers: object) -> Response:
    return lambda handler: handler.send(body, status=status, **headers)


complete = reply(ARCHIVE, Content_Length=len(ARCHIVE), Content_Type="application/zip")
without_length = reply(ARCHIVE)
"""Ends the body by closing the connection, as HTTP/1.0 servers may."""
truncated = reply(ARCHIVE[:HALF], Content_Length=len(ARCHIVE))
truncated_without_length = reply(ARCHIVE[:HALF])
not_found = reply(b"", status=404, Content_Length=0)
login_page = reply(b"<!DOCTYPE html><title>Please log in</title>", Content_Type="text/html")
redirect_to_file = reply(b"", status=302, Location="file:///etc/passwd")


def stalled(handler: Handler) -> None:
    truncated(handler)
    handler.wfile.flush()
    silent(handler)


def silent(handler: Handler) -> None:
    handler.server.stop.wait(20)


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a server for the length of the block, without a proxy."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.stop.set()
        server.shutdown()
        thread.join()
