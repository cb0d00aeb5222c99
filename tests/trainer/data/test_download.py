import errno
import hashlib
import io
import os
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests import web
from tests.web import ARCHIVE, HALF, IMAGE, SHA1, Response, Server, serving
from trainer.data import download
from trainer.data.download import OnProgress, RemoteDataset, extract_zip, fetch_dataset
from trainer.errors import UserError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(download, "RETRIES", 0)
    monkeypatch.setattr(download, "TIMEOUT", 5.0)
    with serving(monkeypatch) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache folder" / "regraft"


def fetch(url: str, cache: Path, *, folder: str = "set", on_progress: OnProgress | None = None) -> Path:
    dataset = RemoteDataset(name="set", url=url, sha1=SHA1, folder=folder)
    return fetch_dataset(dataset, cache, on_progress=on_progress)


def fetch_error(url: str, cache: Path, *, folder: str = "set") -> str:
    with pytest.raises(UserError) as caught:
        fetch(url, cache, folder=folder)
    return str(caught.value)


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def check_dataset(folder: Path, cache: Path) -> None:
    """Assert that the dataset is complete and that nothing else is left in the cache."""
    assert (folder / "train/hot/1.jpg").read_bytes() == IMAGE
    assert (folder / "test/cold/2.jpg").read_bytes() == b"cold"
    assert names_in(cache) == {"set.zip", f"set-{SHA1[:8]}", ".set.lock"}


@pytest.mark.parametrize("response", [web.complete, web.without_length])
def test_second_start_uses_the_cache_without_a_request(response: Response, server: Server, cache: Path) -> None:
    server.responses = [response]
    reports: list[tuple[Any, ...]] = []

    def on_progress(*report: Any) -> None:
        reports.append(report)

    folder = fetch(server.url, cache, on_progress=on_progress)
    check_dataset(folder, cache)
    assert reports[-1] == (len(ARCHIVE), len(ARCHIVE) if response is web.complete else None)
    assert 0 < reports[0][0] < len(ARCHIVE)
    assert reports == sorted(reports)
    reports.clear()
    assert fetch(server.url, cache, on_progress=on_progress) == folder
    assert (server.requests, reports) == (1, [])


def test_archive_placed_by_hand_is_checked_and_used_without_a_request(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    archive, wrong = cache / "set.zip", ARCHIVE[:-1]
    archive.write_bytes(wrong)
    message = fetch_error(server.url, cache)
    found = hashlib.sha1(wrong).hexdigest()
    assert f"{archive} is not the dataset 'set': its SHA-1 is {found}, expected {SHA1}" in message
    assert server.url in message
    assert archive.read_bytes() == wrong
    archive.write_bytes(ARCHIVE)
    assert fetch_error(server.url, cache, folder="hotdog") == f"{archive} has no folder 'hotdog'"
    assert names_in(cache) == {"set.zip", ".set.lock"}
    check_dataset(fetch(server.url, cache), cache)
    assert server.requests == 0


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        (web.truncated, rf"IncompleteRead\({HALF} bytes read, {len(ARCHIVE) - HALF} more expected\)"),
        (web.truncated_without_length, f"expected sha1:{SHA1} but got {hashlib.sha1(ARCHIVE[:HALF]).hexdigest()}"),
        (web.login_page, f"expected sha1:{SHA1} but got [0-9a-f]{{40}}"),
        (web.not_found, "404 Client Error: Not Found"),
        (web.silent, "timed out"),
        (web.stalled, "timed out"),
        (web.redirect_to_file, "No connection adapters were found for 'file:///etc/passwd'"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),  # the archive's SHA-1 differs from process to process
)
def test_failed_download_is_explained_and_leaves_nothing_in_the_cache(
    response: Response, reason: str, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.responses = [response, web.complete]
    with monkeypatch.context() as context:
        if reason == "timed out":
            context.setattr(download, "TIMEOUT", 0.3)
        message = fetch_error(server.url, cache)
    assert message.startswith(f"the dataset 'set' could not be downloaded from {server.url}: ")
    assert re.search(reason, message)
    assert f"place the file (SHA-1 {SHA1}) at {cache / 'set.zip'} by hand" in message
    assert names_in(cache) == {".set.lock"}
    check_dataset(fetch(server.url, cache), cache)


def test_failed_download_is_tried_again(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "RETRIES", 2)
    monkeypatch.setattr("pooch.core.time.sleep", lambda seconds: None)
    server.responses = [web.truncated, web.not_found, web.complete]
    check_dataset(fetch(server.url, cache), cache)
    assert server.requests == 3


def test_refused_connection_is_explained(server: Server, cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        message = fetch_error(f"http://127.0.0.1:{unused.getsockname()[1]}/set.zip", cache)
    assert ": [Errno 111] Connection refused.\nRun the same command again; or place the file" in message


def test_read_only_cache_is_an_error_unless_it_holds_the_dataset(server: Server, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    nobody, user = 65534, os.geteuid()
    with suppress(PermissionError):  # root may write anywhere, so become another user for a moment
        os.seteuid(nobody)
    try:
        assert "cannot be used (Permission denied" in fetch_error(server.url, cache)
    finally:
        os.seteuid(user)
    cache.chmod(0o755)
    folder = fetch(server.url, cache)
    (cache / ".set.lock").unlink()
    cache.chmod(0o555)
    assert fetch(server.url, cache) == folder
    assert not (cache / ".set.lock").exists()


@pytest.mark.parametrize(
    ("function", "number", "message"),
    [
        ("requests.models.Response.iter_content", errno.ENOSPC, "no space is left in the cache {} (No space left"),
        ("shutil.copyfileobj", errno.ENOSPC, "no space is left in the cache {} (No space left on device)"),
        ("fcntl.flock", errno.ENOSYS, "the cache {} cannot be used (Function not implemented"),
    ],
    ids=["full during the download", "full during the extraction", "without locks"],
)
def test_error_of_the_file_system_is_named_and_leaves_no_partial_files(
    function: str, number: int, message: str, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as context:
        context.setattr(function, fail)
        assert message.format(cache) in fetch_error(server.url, cache)
    assert names_in(cache) <= {"set.zip", ".set.lock"}
    check_dataset(fetch(server.url, cache), cache)


SCRIPT = (
    "import sys; from pathlib import Path; from trainer.data.download import RemoteDataset, fetch_dataset\n"
    "url, sha1, cache = sys.argv[1:]\n"
    "print(fetch_dataset(RemoteDataset(name='set', url=url, sha1=sha1, folder='set'), Path(cache)))"
)


def start_process(server: Server, cache: Path, repository: Path, script: str = SCRIPT) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", script, server.url, SHA1, cache]
    return subprocess.Popen(command, cwd=repository, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_next_start_works_after_an_interrupted_download(
    number: signal.Signals, server: Server, cache: Path, repository: Path
) -> None:
    server.responses = [web.stalled, web.complete]
    with start_process(server, cache, repository) as process:
        while not any(file.stat().st_size for file in (cache / ".set.partial").glob("tmp*")):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    assert (cache / ".set.partial").exists() == (number == signal.SIGKILL)
    check_dataset(fetch(server.url, cache), cache)


def test_interrupted_extraction_is_not_taken_for_complete(server: Server, cache: Path, repository: Path) -> None:
    kill_after_first = (
        "import os, zipfile\n"
        "extract = zipfile.ZipFile._extract_member\n"
        "zipfile.ZipFile._extract_member = lambda *args: (extract(*args), os.kill(os.getpid(), 9))\n"
    )
    with start_process(server, cache, repository, kill_after_first + SCRIPT) as process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(list((cache / ".set.partial").rglob("*.jpg"))) == 1
    check_dataset(fetch(server.url, cache), cache)
    assert server.requests == 1


def test_two_processes_download_once(server: Server, cache: Path, repository: Path) -> None:
    with start_process(server, cache, repository) as first, start_process(server, cache, repository) as second:
        outputs = [first.communicate(), second.communicate()]
    folder = cache / f"set-{SHA1[:8]}" / "set"
    assert outputs[0] == outputs[1] == (f"{folder}\n", "")
    assert server.requests == 1
    check_dataset(folder, cache)


def make_zip(entries: Mapping[str, bytes], *, file_type: int = stat.S_IFREG) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (file_type | 0o6777) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return buffer.getvalue()


SMALL = make_zip({"a.jpg": bytes(5000)})
SIZE = SMALL.index(b"PK\x01\x02") + 24  # position of the uncompressed size in the central directory
OUTSIDE = "leads out of the target folder"
UNSAFE = {
    "parent": (make_zip({"good": b"", "a/../../outside": b"evil"}), f"'a/../../outside' {OUTSIDE}"),
    "absolute": (make_zip({"/tmp/evil": b""}), f"'/tmp/evil' {OUTSIDE}"),
    "symlink": (make_zip({"link/": b"/etc"}, file_type=stat.S_IFLNK), "'link/' is a link or a special file"),
    "pipe": (make_zip({"pipe": b""}, file_type=stat.S_IFIFO), "is a link or a special file"),
    "bomb": (make_zip({"bomb": bytes(200_000)}), "would take 200,000 bytes; at most 100,000 are allowed"),
    "many entries": (make_zip({f"{i}/": b"" for i in range(30)}), "it has 30 entries; at most 20 are allowed"),
    "bomb with a small declared size": (
        SMALL[:SIZE] + struct.pack("<L", 20) + SMALL[SIZE + 4 :],
        "cannot be extracted: Bad CRC",
    ),
    "escape sequence": (make_zip({"../\x1b[2J": b""}), r"'../\x1b[2J' leads out"),
    "web page": (b"<html>404</html>", "cannot be extracted: File is not a zip file"),
}


@pytest.mark.parametrize("case", UNSAFE)
def test_unsafe_archive_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "MAX_EXTRACTED_BYTES", 100_000)
    monkeypatch.setattr(download, "MAX_ENTRIES", 20)
    data, reason = UNSAFE[case]
    (tmp_path / "outside").write_text("mine")
    (tmp_path / "cache").mkdir()
    archive = tmp_path / "cache" / "set.zip"
    archive.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        extract_zip(archive, tmp_path / "cache" / "new")
    assert str(archive) in str(caught.value)
    assert names_in(tmp_path) == {"outside", "cache"}
    assert (tmp_path / "outside").read_text() == "mine"
