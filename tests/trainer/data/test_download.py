"""Known data sets from a real HTTP server on loopback: the cache, the ways on, the disk, and other processes."""

import errno
import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.web import (
    DATA,
    HALF,
    PICTURE,
    SHA1,
    Answer,
    Server,
    chunked,
    cut,
    page,
    ranges,
    serving,
    silent,
    stalled,
    status,
    unannounced,
    whole,
)
from trainer.data import download, unpack
from trainer.data.download import KNOWN, KnownDataset, fetch
from trainer.errors import UserError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as running:
        yield running


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache folder" / "regraft"


def dataset(server: Server, **changes: Any) -> KnownDataset:
    return replace(KnownDataset(name="set", url=server.url, sha1=SHA1, size=None, folder="set"), **changes)


def get(wanted: KnownDataset, cache: Path, **options: Any) -> Path:
    return fetch(wanted, cache, **{"timeout": 1.0, "pause": 0.01, **options})


def holds_the_pictures(folder: Path, cache: Path) -> bool:
    whole = (folder / "train/hot/1.jpg").read_bytes() == PICTURE and (folder / "test/cold/2.jpg").exists()
    names = {p.name for p in cache.iterdir()}
    return whole and names == {"set.zip", f"set-{SHA1[:8]}", ".set.lock"}


def error_of(wanted: KnownDataset, cache: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        get(wanted, cache, **options)
    return str(caught.value)


def with_part(cache: Path, content: bytes, version: str = "") -> Path:
    cache.mkdir(parents=True)
    (cache / "set.zip.part.version").write_text(version)
    part = cache / "set.zip.part"
    part.write_bytes(content)
    return part


# --- the usual way


@pytest.mark.parametrize("answer", [whole, ranges, unannounced, chunked])
def test_it_is_downloaded_unpacked_and_from_then_on_cached(
    answer: Answer, server: Server, cache: Path
) -> None:
    server.answers = [answer]
    seen: list[tuple[int, int | None]] = []
    folder = get(dataset(server), cache, on_progress=lambda done, total: seen.append((done, total)))
    assert holds_the_pictures(folder, cache)
    known = None if answer in (unannounced, chunked) else len(DATA)
    assert (seen[0], seen[-1]) == ((0, None), (len(DATA), known))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    seen.clear()
    assert get(dataset(server), cache, on_progress=lambda done, total: seen.append((done, total))) == folder
    assert (len(server.asked), seen) == (1, [])


def test_the_archive_is_kept_and_unpacked_again_without_the_network(server: Server, cache: Path) -> None:
    server.answers = [ranges]
    folder = get(dataset(server), cache)
    unpack.shutil.rmtree(folder.parent)
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert len(server.asked) == 1


def test_an_archive_put_there_by_hand_is_used_without_the_network(server: Server, cache: Path) -> None:
    with_part(cache, DATA[:HALF])
    (cache / "set.zip").write_bytes(DATA)
    folder = get(
        dataset(server), cache, on_progress=lambda done, total: pytest.fail("no download, no progress")
    )
    assert holds_the_pictures(folder, cache)
    assert server.asked == []


def test_a_wrong_archive_put_there_by_hand_is_named_and_left_alone(server: Server, cache: Path) -> None:
    with_part(cache, DATA[:HALF])
    (cache / "set.zip").write_bytes(DATA[:-1])
    text = error_of(dataset(server), cache)
    found = hashlib.sha1(DATA[:-1]).hexdigest()
    assert all(
        word in text for word in (str(cache / "set.zip"), found, SHA1, server.url, f"{len(DATA) - 1:,} bytes")
    )
    assert (cache / "set.zip").read_bytes() == DATA[:-1]
    assert server.asked == []


def test_the_hotdogs_are_those_of_the_recipe() -> None:
    hotdog = KNOWN["hotdog"]
    assert hotdog.url == "http://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip"
    assert hotdog.sha1 == "fba480ffa8aa7e0febbb511d181409f899b9baa5"
    assert (hotdog.name, hotdog.folder) == ("hotdog", "hotdog")


# --- no way to the archive


def ways_on(text: str, url: str, cache: Path) -> bool:
    words = (
        f"from     {url}",
        SHA1,
        f"put that file at {cache / 'set.zip'}",
        "run the same command again",
        "data.root",
    )
    return all(word in text for word in words)


@pytest.mark.parametrize("answer", [status(404), silent, page])
def test_what_does_not_come_says_why_and_how_to_go_on(answer: Answer, server: Server, cache: Path) -> None:
    server.answers = [answer]
    text = error_of(dataset(server), cache, timeout=0.1)
    assert text.startswith("the data set 'set' could not be downloaded: ")
    assert "are kept" not in text
    assert ways_on(text, server.url, cache)


def test_what_has_come_is_told(server: Server, cache: Path) -> None:
    server.answers = [cut(HALF), status(404)]
    text = error_of(dataset(server), cache)
    assert (
        "the server answers 404 Not Found.\n200.1 kB are kept: the next start goes on from there.\n" in text
    )
    assert ways_on(text, server.url, cache)
    assert (cache / "set.zip.part").read_bytes() == DATA[:HALF]


def test_without_a_network_it_says_how_to_go_on(server: Server, cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/set.zip"
        text = error_of(dataset(server, url=url), cache)
    assert "could not be downloaded: Connection refused (2 times in a row)" in text
    assert ways_on(text, url, cache)


def test_the_words_of_a_server_do_not_steer_the_terminal(server: Server, cache: Path) -> None:
    server.answers = [page]
    text = error_of(dataset(server), cache)
    assert r"sends a web page (content type text/html; charset=utf-8\x1b[2J)" in text
    assert "\x1b" not in text


# --- the disk


class Full(io.FileIO):
    """A file on a disk with room for 100 kB."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def full_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    usual = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *a, **k: (
            Full(self, mode) if self.name == name and mode != "rb" else usual(self, mode, *a, **k)
        ),
    )


def test_a_full_disk_keeps_what_has_come(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [ranges]
    with monkeypatch.context() as during:
        full_for(during, "set.zip.part")
        text = error_of(dataset(server), cache)
    assert (
        f"there is no room left in the cache {cache} (No space left on device); what has come is kept" in text
    )
    assert "data.cache" in text
    kept = (cache / "set.zip.part").stat().st_size
    assert 0 < kept <= 100_000
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.asked == [None, f"bytes={kept}-"]


def test_a_disk_that_fills_while_unpacking_leaves_no_half_of_it(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [ranges]
    with monkeypatch.context() as during:
        full_for(during, "1.jpg")
        assert "there is no room left" in error_of(dataset(server), cache)
    assert {p.name for p in cache.iterdir()} == {"set.zip", ".set.lock"}
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert len(server.asked) == 1


def test_too_little_room_is_told_before_the_download(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [whole]
    usage = unpack.shutil.disk_usage(cache.parent.parent)
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "(400.3 kB needed, 1.0 kB free)" in error_of(dataset(server), cache)
    assert not (cache / "set.zip.part").exists()


def test_a_cache_below_a_file_is_an_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = error_of(dataset(server), tmp_path / "file" / "cache")
    assert f"the cache {tmp_path / 'file' / 'cache'} cannot be used (Not a directory" in text
    assert "data.cache (or $REGRAFT_CACHE)" in text


def test_a_cache_that_may_not_be_written_is_an_error_unless_it_is_there(
    server: Server, tmp_path: Path
) -> None:
    server.answers = [ranges]
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    nobody, me = 65534, os.geteuid()
    with suppress(PermissionError):  # root may write anywhere: be somebody else for a moment
        os.seteuid(nobody)
    try:
        text = error_of(dataset(server), cache)
    finally:
        os.seteuid(me)
    assert "cannot be used (Permission denied" in text
    cache.chmod(0o755)
    folder = get(dataset(server), cache)
    (cache / ".set.lock").unlink()
    cache.chmod(0o555)
    assert get(dataset(server), cache) == folder
    assert not (cache / ".set.lock").exists(), "what is there is found without writing"


# --- other processes

FETCH = (
    "import sys; from pathlib import Path; from trainer.data.download import KnownDataset, fetch\n"
    "url, sha1, cache = sys.argv[1:]\n"
    "print(fetch(KnownDataset(name='set', url=url, sha1=sha1, size=None, folder='set'), Path(cache)))"
)


def start(server: Server, cache: Path, repository: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, server.url, SHA1, cache],
        cwd=repository,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_what_a_killed_process_has_downloaded_is_not_downloaded_again(
    deadly: signal.Signals, server: Server, cache: Path, repository: Path
) -> None:
    server.answers = [stalled, ranges]
    with start(server, cache, repository) as process:
        part = cache / "set.zip.part"
        until = time.monotonic() + 10
        while not (part.exists() and part.stat().st_size == HALF) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(deadly)
        _, errors = process.communicate()
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in errors) == (deadly == signal.SIGINT)
    assert part.stat().st_size == HALF
    assert holds_the_pictures(get(dataset(server), cache), cache), "and its lock has died with it"
    assert server.asked == [None, f"bytes={HALF}-"]
    assert server.sent == len(DATA)


def test_of_two_processes_one_downloads_and_the_other_waits(
    server: Server, cache: Path, repository: Path
) -> None:
    server.answers = [lambda handler: ranges(handler, pause=0.04)]
    seen: list[tuple[int, int | None]] = []
    with start(server, cache, repository) as first:
        while not server.asked and first.poll() is None:
            time.sleep(0.01)
        folder = get(dataset(server), cache, on_progress=lambda done, total: seen.append((done, total)))
        out, _ = first.communicate()
    assert out.strip() == str(folder)
    assert holds_the_pictures(folder, cache)
    assert (server.asked, server.sent) == ([None], len(DATA))
    assert len({done for done, _ in seen}) > 1, "the one that waits sees the other's progress"


def test_two_processes_that_start_at_once(server: Server, cache: Path, repository: Path) -> None:
    server.answers = [lambda handler: ranges(handler, pause=0.01)]
    with start(server, cache, repository) as first, start(server, cache, repository) as second:
        outcomes = [first.communicate(), second.communicate()]
    assert outcomes[0] == outcomes[1] == (f"{cache / f'set-{SHA1[:8]}' / 'set'}\n", "")
    assert server.sent == len(DATA)


def test_a_file_system_without_locks_is_named(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(download.fcntl, "flock", no_locks)
    assert f"the cache {cache} cannot be used (Function not implemented" in error_of(dataset(server), cache)
