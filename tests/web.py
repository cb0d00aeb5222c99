"""A real HTTP server on loopback that truncates, lies, stalls and resets, and the file that it serves."""

import hashlib
import http.server
import io
import os
import re
import socket
import struct
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

PICTURE = os.urandom(400_000)


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("set/train/hot/1.jpg", PICTURE)
        archive.writestr("set/test/cold/2.jpg", b"cold")
    return buffer.getvalue()


DATA = _archive()
SHA1 = hashlib.sha1(DATA).hexdigest()
HALF = len(DATA) // 2

Answer = Callable[["Handler"], object]


class Handler(http.server.BaseHTTPRequestHandler):
    """One request: it is answered by the next of the server's answers; the last one is used ever after."""

    server: "Server"

    def do_GET(self) -> None:
        with self.server.turn:
            self.server.asked.append(self.headers.get("Range"))
            self.server.if_range.append(self.headers.get("If-Range"))
            answer = self.server.answers[min(len(self.server.asked), len(self.server.answers)) - 1]
        with suppress(ConnectionError):  # the client has seen enough
            answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data: bytes, *, piece: int = 20_000, pause: float = 0) -> None:
        for i in range(0, len(data), piece):
            self.wfile.write(data[i : i + piece])
            self.server.sent += len(data[i : i + piece])
            time.sleep(pause)

    @property
    def offset(self) -> int:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        return int(found[1]) if found else 0


class Server(http.server.ThreadingHTTPServer):
    """What was asked of it, and what it answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.if_range: list[str | None] = []
        self.answers: list[Answer] = []
        self.sent = 0
        self.turn = threading.Lock()
        self.over = threading.Event()
        """Set at the end: what waits on it has stalled for as long as the test."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set.zip"

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def whole(handler: Handler) -> None:
    """Ignore Range, as simple servers do."""
    handler.head(200, Content_Length=len(DATA), Content_Type="application/zip")
    handler.body(DATA)


def ranges(
    handler: Handler, data: bytes = DATA, tag: str = '"1"', upto: int | None = None, pause: float = 0
) -> None:
    """Serve as S3 does; cut off after byte `upto`."""
    offset = handler.offset if handler.headers.get("If-Range") in (None, tag) else 0
    if offset >= len(data):
        handler.head(416, Content_Range=f"bytes */{len(data)}", Content_Length=0)
        return
    given = {"Content_Range": f"bytes {offset}-{len(data) - 1}/{len(data)}"} if offset else {}
    handler.head(206 if offset else 200, Content_Length=len(data) - offset, ETag=tag, **given)
    handler.body(data[offset:upto], pause=pause)


def cut(upto: int) -> Answer:
    return lambda handler: ranges(handler, upto=upto)


def cut_whole(handler: Handler) -> None:
    handler.head(200, Content_Length=len(DATA))
    handler.body(DATA[:HALF])


def unannounced(handler: Handler, upto: int | None = None) -> None:
    """End the body by closing the connection, as HTTP/1.0 servers may."""
    handler.head(200)
    handler.body(DATA[:upto])


def chunked(handler: Handler, upto: int | None = None) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.close_connection = True
    handler.head(200, Transfer_Encoding="chunked", Connection="close")
    for i in range(0, len(DATA[:upto]), 50_000):
        piece = DATA[i : i + 50_000]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    if upto is None:
        handler.wfile.write(b"0\r\n\r\n")


def stalled(handler: Handler) -> None:
    ranges(handler, upto=HALF)
    handler.server.over.wait(20)


def silent(handler: Handler) -> None:
    handler.server.over.wait(20)


def reset(handler: Handler) -> None:
    ranges(handler, upto=HALF)
    time.sleep(0.3)  # else the reset overtakes what was sent
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.wfile.close()
    handler.rfile.close()
    handler.connection.close()


def hung_up(handler: Handler) -> None:
    """Close without a word."""


def announcing(length: int, data: bytes = DATA) -> Answer:
    def answer(handler: Handler) -> None:
        handler.head(200, Content_Length=length)
        handler.body(data)

    return answer


def status(code: int, **headers: object) -> Answer:
    return lambda handler: handler.head(code, **headers)


def endless(handler: Handler) -> None:
    handler.head(200)
    while not handler.server.over.is_set():
        handler.body(bytes(100_000))


def page(handler: Handler) -> None:
    text = b"\n <!DOCTYPE html><title>Please log in\x1b[2J</title>"
    handler.head(200, Content_Length=len(text), Content_Type="text/html; charset=utf-8\x1b[2J")
    handler.body(text)


def partial(content_range: str) -> Answer:
    return lambda handler: (handler.head(206, Content_Range=content_range), handler.body(DATA[HALF:]))


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Run a server for the length of the block; no proxy stands between."""
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.over.set()
        running.shutdown()
        thread.join()
