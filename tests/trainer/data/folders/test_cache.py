import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.folders import image_folder
from trainer.data.folders import cache as folder_cache
from trainer.data.folders.scan import DirEntries, scan_dir
from trainer.data.index import DatasetIndex
from trainer.data.read_index import read_index

Scanned = Callable[[], list[str]]


def index(root: Path, cache: Path | None) -> DatasetIndex:
    return read_index(
        root, val_fraction=0.0, test_fraction=0.25, seed=0, extensions=(".png",), split_dirs={}, cache=cache
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = image_folder(tmp_path / "data", {"": {"a": 4, "b": 4}})
    (root / "b" / "deep").mkdir()
    (root / "b" / "deep" / os.fsdecode(b'\xff "\n.png')).touch()
    (root / "b" / ".hidden").touch()
    return root


@pytest.fixture
def scanned(root: Path, monkeypatch: pytest.MonkeyPatch) -> Scanned:
    """Return a function that returns the folders that were scanned since its last call. Any folder is old enough."""
    folders: list[str] = []

    def record(folder: str) -> DirEntries:
        folders.append(os.path.relpath(folder, root))
        return scan_dir(folder)

    def pop() -> list[str]:
        result = sorted(folders)
        folders.clear()
        return result

    monkeypatch.setattr(folder_cache, "scan_dir", record)
    monkeypatch.setattr(folder_cache, "MIN_AGE_SECONDS", -1.0)
    return pop


def replace_by_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()
    (file / "new.png").touch()


def add_class(root: Path) -> None:
    (root / "c").mkdir()
    for name in ("1.png", "2.png"):
        (root / "c" / name).touch()


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda root: None, []),
    "new content": (lambda root: (root / "a" / "000.png").write_bytes(b"x"), []),
    "new file": (lambda root: (root / "a" / "new.png").touch(), ["a"]),
    "removed file": (lambda root: (root / "a" / "000.png").unlink(), ["a"]),
    "renamed file": (lambda root: (root / "a" / "000.png").rename(root / "a" / "9.png"), ["a"]),
    "moved file": (lambda root: (root / "a" / "000.png").rename(root / "b" / "deep" / "9.png"), ["a", "b/deep"]),
    "file replaced by a folder": (lambda root: replace_by_folder(root / "a" / "000.png"), ["a", "a/000.png"]),
    "new class": (add_class, ["c"]),
    "renamed class": (lambda root: (root / "a").rename(root / "c"), ["c"]),
    "exchanged folders": (
        lambda root: [(root / x).rename(root / y) for x, y in (("a", "c"), ("b", "a"), ("c", "b"))],
        ["a", "a/deep", "b"],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_only_changed_folders_are_scanned_again(tmp_path: Path, root: Path, scanned: Scanned, change: str) -> None:
    first = index(root, tmp_path / "cache")
    assert first == index(root, None)
    assert scanned() == ["a", "b", "b/deep"]
    apply, expected = CHANGES[change]
    apply(root)
    for folders in (expected, []):
        assert index(root, tmp_path / "cache") == index(root, None)
        assert scanned() == folders
    assert len(list((tmp_path / "cache" / "folders").iterdir())) == 1


def test_times_that_were_set_back_do_not_hide_a_change(tmp_path: Path, root: Path, scanned: Scanned) -> None:
    before = (root / "a").stat()
    index(root, tmp_path / "cache")
    scanned()
    (root / "a" / "new.png").touch()
    os.utime(root / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert index(root, tmp_path / "cache") == index(root, None)
    assert scanned() == ["a"]


def test_a_folder_that_has_just_changed_is_not_cached(
    tmp_path: Path, root: Path, scanned: Scanned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_cache, "MIN_AGE_SECONDS", 60.0)
    for _ in range(2):
        index(root, tmp_path / "cache")
        assert scanned() == ["a", "b", "b/deep"]


def test_a_folder_with_links_is_always_scanned(tmp_path: Path, root: Path, scanned: Scanned) -> None:
    """A file that a link points to may become a folder, which does not change the folder of the link."""
    (root / "a" / "link.png").symlink_to(tmp_path / "target")
    (root / "a" / "loop.png").symlink_to(root / "a" / "loop.png")
    (tmp_path / "target").touch()
    index(root, tmp_path / "cache")
    scanned()
    replace_by_folder(tmp_path / "target")
    assert index(root, tmp_path / "cache") == index(root, None)
    assert scanned() == ["a", "a/link.png"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[:-9],
        lambda text: "[" * 5_000,
        lambda text: "null",
        lambda text: text.replace('"format": ', '"format": 9'),
        lambda text: text.replace('"root": "', '"root": "/other'),
        lambda text: text.replace("[[", "[[0.5, "),
        lambda text: text.replace("[[", '[["1", '),
        lambda text: text.replace('"000.png/001.png/002.png/003.png"', "[]"),
    ],
)
def test_a_damaged_cache_is_rebuilt(tmp_path: Path, root: Path, scanned: Scanned, damage: Callable[[str], str]) -> None:
    expected = index(root, tmp_path / "cache")
    (file,) = (tmp_path / "cache" / "folders").iterdir()
    good = file.read_text()
    assert damage(good) != good
    file.write_text(damage(good))
    scanned()
    assert index(root, tmp_path / "cache") == expected
    assert scanned() == ["a", "b", "b/deep"]
    assert file.read_text() == good


def test_a_cache_that_cannot_be_written_is_not_needed(tmp_path: Path, root: Path) -> None:
    (tmp_path / "file").touch()
    assert index(root, tmp_path / "file") == index(root, None)


def test_the_index_takes_linear_work_and_no_system_call_for_each_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_cache, "MIN_AGE_SECONDS", -1.0)
    system_calls: list[str] = []
    for name in ("stat", "lstat", "scandir", "listdir", "open", "readlink"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, f=original, **named: system_calls.append(f.__name__) or f(*a, **named))

    def work(root: Path) -> tuple[int, int]:
        """Return the numbers of function calls and of system calls."""
        calls = 0

        def count(frame: object, event: str, argument: Any) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        system_calls.clear()
        sys.setprofile(count)
        try:
            index(root, tmp_path / "cache")
        finally:
            sys.setprofile(None)
        return calls, len(system_calls)

    (tmp_path / "cache" / "folders").mkdir(parents=True)
    roots = [image_folder(tmp_path / str(count), {"": {"a": 4, "b": 4}}) for count in (200, 400, 800)]
    for root in roots:
        for name in ("a", "b"):
            for number in range(int(root.name)):
                (root / name / f"image {number}.png").touch()
    for start in ("first", "second"):
        (small, medium, large), counts = zip(*map(work, roots), strict=True)
        assert large - medium <= 2.3 * (medium - small), start
        assert large - medium <= 20 * 800, start
        assert len(set(counts)) == 1, start
