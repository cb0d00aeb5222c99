import json
import os
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.folders import noise_image
from trainer.data import validation
from trainer.data.decode import decode
from trainer.data.validation import check_images, unreadable_error
from trainer.errors import UserError


class Decoder:
    """Record the decoded paths."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.seconds = 0.0
        self._lock = threading.Lock()

    def __call__(self, path: str) -> Image.Image:
        with self._lock:
            self.paths.append(path)
        time.sleep(self.seconds)
        return decode(path)

    def pop_names(self) -> list[str]:
        """Return the file names decoded since the last call."""
        names = sorted(Path(path).name for path in self.paths)
        self.paths.clear()
        return names


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    counting = Decoder()
    monkeypatch.setattr(validation, "decode", counting)
    return counting


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache" / "created if needed"


def images(folder: Path, count: int, *, bad: int = 0) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:03}.png" for i in range(count + bad)]
    for i, path in enumerate(paths):
        if i < count:
            noise_image(i, size=(4, 3)).save(path)
        else:
            path.write_bytes(b"not an image")
    return [str(path) for path in paths]


def check(paths: list[str], cache: Path, *, workers: int = 2) -> dict[str, str]:
    return check_images(paths, cache=cache, workers=workers, on_progress=None)


def files(cache: Path) -> list[Path]:
    return sorted((cache / "verdicts").iterdir())


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_second_start_decodes_nothing(tmp_path: Path, cache: Path, decoder: Decoder, workers: int) -> None:
    paths = images(tmp_path / "data", 40, bad=3)
    found = check(paths, cache, workers=workers)
    assert found == dict.fromkeys(paths[40:], "a text file, not an image")
    assert len(decoder.pop_names()) == 43
    assert check(paths, cache, workers=workers) == found
    assert decoder.pop_names() == []
    assert len(files(cache)) == 1


def test_changed_and_new_images_are_decoded_again(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    paths = images(tmp_path / "data", 5)
    check(paths, cache)
    decoder.pop_names()
    Path(paths[0]).write_bytes(b"another size")
    content = bytearray(Path(paths[1]).read_bytes())
    content[20] ^= 255
    Path(paths[1]).write_bytes(content)  # same size, other modification time
    os.utime(paths[1], ns=(1, Path(paths[1]).stat().st_mtime_ns + 1))
    paths += images(tmp_path / "data" / "more", 1)
    found = check(paths, cache)
    assert decoder.pop_names() == ["000.png", "000.png", "001.png"]
    assert sorted(found) == paths[:2]
    images(tmp_path / "data", 2)  # repair them
    assert check(paths, cache) == {}


def test_relative_paths_use_the_results_of_absolute_paths(
    tmp_path: Path, cache: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    absolute = images(tmp_path / "data", 2, bad=1)
    check(absolute, cache)
    decoder.pop_names()
    monkeypatch.chdir(tmp_path)
    assert list(check(["data/000.png", "data/001.png", "./data/002.png"], cache)) == ["./data/002.png"]
    assert decoder.pop_names() == []


def test_file_names_with_any_bytes_are_cached(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    folder = tmp_path / os.fsdecode(b'caf\xe9 \n"')
    paths = [*images(folder, 1), *images(folder / "猫", 1, bad=1)]
    found = check(paths, cache)
    decoder.pop_names()
    assert check(paths, cache) == found == {paths[2]: "a text file, not an image"}
    assert decoder.pop_names() == []


def test_temporary_failures_are_not_cached(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    paths = images(tmp_path / "data", 1)
    gone = str(tmp_path / "data" / "gone.png")
    (tmp_path / "data" / "gone.png").symlink_to(tmp_path / "target.png")
    for _ in range(2):
        assert check([*paths, gone], cache) == {gone: "a broken symbolic link"}
    assert decoder.pop_names() == ["000.png", "gone.png", "gone.png"]
    noise_image(0).save(tmp_path / "target.png")
    assert check([*paths, gone], cache) == {}


def test_results_of_other_images_are_kept_while_their_files_exist(
    tmp_path: Path, cache: Path, decoder: Decoder
) -> None:
    paths = images(tmp_path / "data", 6)
    check(paths[:4], cache)
    check(paths[2:], cache)
    decoder.pop_names()
    check(paths[:4], cache)
    assert decoder.pop_names() == []
    Path(paths[1]).unlink()
    images(tmp_path / "data" / "new", 1)
    check([paths[0], paths[5], str(tmp_path / "data" / "new" / "000.png")], cache)
    (file,) = files(cache)
    assert sorted(json.loads(file.read_text())["images"]) == [*(f"00{i}.png" for i in (0, 2, 3, 4, 5)), "new/000.png"]


def damage(file: Path, content: bytes) -> None:
    if content == b"cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        file.write_bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"cut",
        b"",
        b"\xff\xfe\0",
        b"null",
        b"[1]",
        b'{"rules": 1}',
        b"[" * 100_000,
        b'{"rules": "RULES", "folder": "FOLDER", "images": []}',
        b'{"rules": "RULES", "folder": "FOLDER", "images": {"000.png": [1, 2]}}',
        b'{"rules": "RULES", "folder": "FOLDER", "images": {"000.png": ["1", 2, null]}}',
        b'{"rules": "RULES", "folder": "FOLDER", "images": {"000.png": [1, 2, 3]}}',
    ],
)
def test_damaged_cache_file_is_replaced(tmp_path: Path, cache: Path, decoder: Decoder, content: bytes) -> None:
    paths = images(tmp_path / "data", 2, bad=1)
    found = check(paths, cache)
    (file,) = files(cache)
    good = json.loads(file.read_text())
    for word in ("rules", "folder"):
        content = content.replace(word.upper().encode(), good[word].encode())
    damage(file, content)
    decoder.pop_names()
    assert check(paths, cache) == found
    assert len(decoder.pop_names()) == 3
    assert json.loads(file.read_text()) == good
    assert files(cache) == [file]


@pytest.mark.parametrize("what", ["DECODE_VERSION", "PIL"])
def test_results_of_another_decoder_version_are_ignored(
    tmp_path: Path, cache: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    paths = images(tmp_path / "data", 3)
    check(paths, cache)
    decoder.pop_names()
    if what == "PIL":
        monkeypatch.setattr(validation.PIL, "__version__", "999")
    else:
        monkeypatch.setattr(validation, "DECODE_VERSION", -1)
    check(paths, cache)
    assert len(decoder.pop_names()) == 3


def test_results_before_ctrl_c_are_kept(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    paths = images(tmp_path / "data", 400)
    decoder.seconds = 0.002
    seen = []

    def interrupt(done: int, total: int) -> None:
        seen.append((done, total))
        if done >= 100:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_images(paths, cache=cache, workers=2, on_progress=interrupt)
    assert seen[-1][1] == 400
    before = len(decoder.pop_names())
    assert before < 400
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("check")]
    check(paths, cache)
    assert len(decoder.pop_names()) <= 400 - 100


def test_progress_includes_cached_results_and_reaches_the_total(tmp_path: Path, cache: Path) -> None:
    paths = images(tmp_path / "data", 50)
    check(paths[:30], cache)
    seen: list[tuple[int, int]] = []
    check_images(paths, cache=cache, workers=1, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] > 30
    assert seen[-1] == (50, 50)
    assert seen == sorted(seen)


@pytest.fixture
def read_only(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a cache folder that appears read-only; the root user could write to a real one."""
    cache.mkdir(parents=True)

    def refuse(*arguments: object, **options: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(validation.tempfile, "TemporaryFile", refuse)
    return cache


def test_read_only_cache_is_an_error_before_decoding(tmp_path: Path, read_only: Path, decoder: Decoder) -> None:
    with pytest.raises(UserError, match=r"^data\.cache: .*Read-only file system.*Set data\.cache"):
        check(images(tmp_path / "data", 2), read_only)
    assert decoder.pop_names() == []


def test_full_disk_is_an_error(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(validation, "write_text_atomically", refuse)
    with pytest.raises(UserError, match=r"data\.cache: .*No space left on device"):
        check(images(tmp_path / "data", 2), cache)


def test_error_lists_every_unreadable_image_and_the_option_to_skip_them() -> None:
    many = {f"data/{i:03}.jpg": f"reason {i}" for i in range(60)} | {"data/a\nb.jpg": "an empty file (0 bytes)"}
    text = str(unreadable_error(many, 500))
    assert text.startswith("61 of 500 images cannot be read:\n")
    assert all(f"\n  data/{i:03}.jpg: reason {i}\n" in text for i in range(60))
    assert r"data/a\nb.jpg: an empty file (0 bytes)" in text
    assert "--data.on_unreadable skip" in text.splitlines()[-1]
