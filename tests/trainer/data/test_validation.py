import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from tests.folders import noise_image
from trainer.data import decode, file_versions, validation, validation_results
from trainer.data.decode import DecodedImage, decode_file
from trainer.data.file_versions import read_versions
from trainer.data.validation import check_images, unreadable_error
from trainer.data.validation_results import split_names
from trainer.errors import UserError


class Decoder:
    """Record the decoded paths."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.seconds = 0.0
        self._lock = threading.Lock()

    def __call__(self, file: BinaryIO, path: str) -> DecodedImage:
        with self._lock:
            self.paths.append(path)
        time.sleep(self.seconds)
        return decode_file(file, path)

    def pop_names(self) -> list[str]:
        """Return the file names decoded since the last call."""
        names = sorted(Path(path).name for path in self.paths)
        self.paths.clear()
        return names


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    decoder = Decoder()
    monkeypatch.setattr(validation, "decode_file", decoder)
    return decoder


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
    """Return path -> reason of the images that cannot be read."""
    results = check_images(paths, cache=cache, workers=workers, on_progress=None)
    assert len(results) == len(paths)
    return results.unreadable(paths)


def files(cache: Path) -> list[Path]:
    return sorted((cache / "validation").iterdir())


@pytest.mark.parametrize("workers", [0, 3])
def test_second_start_decodes_nothing(
    tmp_path: Path, cache: Path, decoder: Decoder, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validation, "_QUEUED_BATCHES", 2)
    folder = tmp_path / os.fsdecode(b'caf\xe9 \n"')  # a name may have any bytes
    paths = [*images(folder, 40), *images(folder / "猫", 0, bad=3)]
    found = check(paths, cache, workers=workers)
    assert found == dict.fromkeys(paths[40:], "a text file, not an image")
    assert len(decoder.pop_names()) == 43
    assert check(paths, cache, workers=workers) == found
    monkeypatch.chdir(tmp_path)
    relative = [os.path.relpath(path) for path in paths]
    assert check(relative, cache) == dict.fromkeys(relative[40:], "a text file, not an image")
    assert decoder.pop_names() == []
    assert len(files(cache)) == 1


def test_changed_and_new_images_are_decoded_again(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    paths = images(tmp_path / "data", 5)
    check(paths, cache)
    decoder.pop_names()
    Path(paths[0]).write_bytes(b"another size")
    times = Path(paths[1]).stat().st_mtime_ns
    content = bytearray(Path(paths[1]).read_bytes())
    content[20] ^= 255
    Path(paths[1]).write_bytes(content)
    os.utime(paths[1], ns=(times, times))  # same size and modification time
    paths += images(tmp_path / "data" / "more", 1)
    found = check(paths, cache)
    assert decoder.pop_names() == ["000.png", "000.png", "001.png"]
    assert sorted(found) == paths[:2]
    images(tmp_path / "data", 2)  # repair them
    assert check(paths, cache) == {}


def test_an_equal_content_is_not_decoded_again(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    paths = images(tmp_path / "data", 2, bad=1)
    first = check_images(paths, cache=cache, workers=1, on_progress=None)
    assert len({result.digest for result in first}) == 3
    decoder.pop_names()
    os.utime(paths[0], ns=(1, 1))
    for path in map(Path, paths[1:]):  # a copy
        path.with_name("copy").write_bytes(path.read_bytes())
        path.with_name("copy").replace(path)
    again = check_images(paths, cache=cache, workers=1, on_progress=None)
    assert decoder.pop_names() == []
    for before, after in zip(first, again, strict=True):
        assert after._replace(version=None) == before._replace(version=None)
    assert list(check_images(paths, cache=cache, workers=1, on_progress=None)) == list(again)


def test_conversions_and_images_of_one_color_are_cached(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    names = ("gray.png", "black.png", "noise.png")
    paths = [str(tmp_path / name) for name in names]
    Image.fromarray(np.linspace(0, 4095, 12).astype(np.uint16).reshape(3, 4)).save(paths[0])
    Image.new("RGB", (4, 3)).save(paths[1])
    noise_image(1, size=(4, 3)).save(paths[2])
    for decoded in (sorted(names), []):
        results = check_images(paths, cache=cache, workers=1, on_progress=None)
        found = [(result.conversions, result.is_one_color) for result in results]
        conversion = "gray values scaled from 0..4095, judged by the largest value of each image"
        assert found == [((conversion,), False), ((), True), ((), False)]
        assert decoder.pop_names() == decoded


def test_temporary_failures_are_not_cached(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    paths = images(tmp_path / "data", 1)
    gone = str(tmp_path / "data" / "gone.png")
    (tmp_path / "data" / "gone.png").symlink_to(tmp_path / "target.png")
    for _ in range(2):
        assert check([*paths, gone], cache) == {gone: "a broken symbolic link"}
    assert decoder.pop_names() == ["000.png"]
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
    names = split_names(read_content(file)[0]["names"].tobytes().decode())
    assert sorted(names) == [*(f"00{i}.png" for i in (0, 2, 3, 4, 5)), "new/000.png"]


def test_the_order_of_the_images_does_not_matter(tmp_path: Path, cache: Path, decoder: Decoder) -> None:
    paths = images(tmp_path / "data", 4, bad=2)
    first = check_images(paths, cache=cache, workers=1, on_progress=None)
    decoder.pop_names()
    again = check_images(paths[::-1], cache=cache, workers=1, on_progress=None)
    assert [*again][::-1] == [*first]
    assert decoder.pop_names() == []


def read_content(file: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return the arrays and the metadata of a cache file."""
    with safe_open(file, framework="numpy") as content:
        arrays = {name: content.get_tensor(name) for name in sorted(content.keys())}
        return arrays, dict(sorted(content.metadata().items()))


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff" * 9,
        {"outcomes": "[" * 5_000},
        {"outcomes": "null"},
        {"outcomes": "[[1, [], false], [null, [], false]]"},
        {"outcomes": '[["text", [4], false], [null, [], false]]'},
        {"outcomes": '[["text", []], [null, [], false]]'},
        {"outcomes": "[]"},
        {"codes": np.array([0, 1, 2], np.int32)},
        {"codes": np.array([0, 0, -1], np.int32)},
        {"codes": np.array([0, 0, 1], np.int64)},
        {"codes": np.array([0, 1], np.int32)},
        {"versions": np.full((3, 3), -1, np.int64)},
        {"names": np.frombuffer(b"000.png", np.uint8)},
        {"names": np.zeros(0, np.uint8)},
    ],
    ids=str,
)
def test_damaged_cache_file_is_replaced(
    tmp_path: Path, cache: Path, decoder: Decoder, damage: bytes | dict[str, Any]
) -> None:
    paths = images(tmp_path / "data", 2, bad=1)
    found = check(paths, cache)
    (file,) = files(cache)
    arrays, metadata = good = read_content(file)
    if isinstance(damage, bytes):
        file.write_bytes(damage)
    else:
        changed = [{name: damage.get(name, value) for name, value in part.items()} for part in (arrays, metadata)]
        file.write_bytes(save(*changed))
    decoder.pop_names()
    assert check(paths, cache) == found
    assert len(decoder.pop_names()) == 3
    assert str(read_content(file)) == str(good)
    assert files(cache) == [file]


def test_times_that_64_bits_do_not_hold_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = SimpleNamespace(st_size=7, st_mtime_ns=2**64, st_ctime_ns=-1)
    monkeypatch.setattr(file_versions.os, "stat", lambda path: far)
    assert read_versions(["a"]).tolist() == [[7, 0, 2**63 - 1]]


def test_a_second_check_reads_the_state_of_each_file_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = images(tmp_path / "data", 30)
    check(paths, cache)
    calls: list[object] = []
    for function in ("stat", "lstat", "open", "scandir", "listdir"):
        original = getattr(os, function)
        monkeypatch.setattr(os, function, lambda *args, f=original, **named: calls.append(args) or f(*args, **named))
    check(paths, cache)
    assert [path for (path, *_) in calls if str(path).endswith(".png")] == paths
    assert len(calls) - len(paths) < 5


def test_results_of_another_decoder_version_are_ignored(
    tmp_path: Path, cache: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = images(tmp_path / "data", 3)
    check(paths, cache)
    for module, name, value in ((decode.PIL, "__version__", "999"), (decode, "DECODE_VERSION", -1)):
        decoder.pop_names()
        monkeypatch.setattr(module, name, value)
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


def test_a_cache_that_cannot_be_written_is_an_error(
    tmp_path: Path, cache: Path, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(number: int) -> Callable[..., None]:
        def raise_error(*_: object, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        return raise_error

    paths = images(tmp_path / "data", 2)
    monkeypatch.setattr(validation_results, "write_atomically", fail(errno.ENOSPC))
    with pytest.raises(UserError, match=r"data\.cache: .*No space left on device"):
        check(paths, cache)
    assert decoder.pop_names()
    monkeypatch.setattr(validation.tempfile, "TemporaryFile", fail(errno.EROFS))
    with pytest.raises(UserError, match=r"^data\.cache: .*Read-only file system.*Set data\.cache"):
        check(paths, cache)
    assert decoder.pop_names() == [], "before decoding"


def test_error_lists_every_unreadable_image_and_the_option_to_skip_them() -> None:
    many = {f"data/{i:03}.jpg": f"reason {i}" for i in range(60)} | {"data/a\nb.jpg": "an empty file (0 bytes)"}
    first, *lines, last = str(unreadable_error(many, 500)).splitlines()
    assert first == "61 of 500 images cannot be read:"
    listed = [*(f"  data/{i:03}.jpg: reason {i}" for i in range(60)), r"  data/a\nb.jpg: an empty file (0 bytes)"]
    assert lines == listed
    assert "--data.on_unreadable skip" in last
