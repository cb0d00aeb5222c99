import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.folders import noise_image
from trainer.data import deferred_checks, validation
from trainer.data.dataset import ComparingReader, ImageReadError
from trainer.data.deferred_checks import FolderTimes
from trainer.data.validation import check_images
from trainer.data.validation_results import ValidationResults

COUNT = 20  # images in two folders, of which each fourth is compared at every start


@pytest.fixture(autouse=True)
def _is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deferred_checks, "MAX_COMPARED", 5)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for number in range(COUNT):
        path = tmp_path / "data" / "ab"[number // 10] / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_image(number, size=(4, 3)).save(path)
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that were decoded."""
    names: list[str] = []
    decode = validation.decode_file
    monkeypatch.setattr(
        validation, "decode_file", lambda file, path: names.append(Path(path).name) or decode(file, path)
    )
    return names


def paths_of(root: Path) -> list[str]:
    return sorted(map(str, root.rglob("*.png")))


def check(root: Path, **options: object) -> ValidationResults:
    return check_images(paths_of(root), cache=root.parent / "cache", workers=1, on_progress=None, **options)  # type: ignore[arg-type]


def read_all(root: Path, results: ValidationResults) -> None:
    """Read each image for the first time, as a run does."""
    assert results.deferred is not None
    reader = ComparingReader(np.empty, paths_of(root), results.deferred)
    for example in range(len(results)):
        assert len(reader(example)) == example


def overwrite(root: Path, number: int) -> None:
    """Write another image in place, which does not change the times of the folder."""
    path = root / "ab"[number // 10] / f"{number:02}.png"
    path.write_bytes(noise_bytes(root, number + 100))


def noise_bytes(root: Path, seed: int) -> bytes:
    noise_image(seed, size=(4, 3)).save(root.parent / "new.png")
    return (root.parent / "new.png").read_bytes()


def replace(root: Path, number: int) -> None:
    noise_bytes(root, number + 100)
    (root.parent / "new.png").rename(root / "ab"[number // 10] / f"{number:02}.png")


def exchange(root: Path) -> None:
    for source, target in (("a/01.png", "a/x"), ("b/11.png", "a/01.png"), ("a/x", "b/11.png")):
        (root / source).rename(root / target)


def test_most_files_are_not_touched_by_the_second_start(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = check(root)
    assert first.deferred is None
    calls: list[str] = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **named: calls.append(str(path)) or stat(path, **named))
    second = check(root)
    assert [*second] == [*first]
    assert [path for path in calls if path.endswith(".png")] == paths_of(root)[::4]
    assert second.deferred is not None
    assert second.deferred.is_deferred.sum() == COUNT - 5
    read_all(root, second)


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "new file": (lambda root: noise_image(50).save(root / "b" / "50.png"), ["50.png"]),
    "removed file": (lambda root: (root / "a" / "01.png").unlink(), []),
    "renamed file": (lambda root: (root / "a" / "01.png").rename(root / "a" / "51.png"), ["51.png"]),
    "exchanged files": (exchange, ["01.png", "11.png"]),
    "replaced file": (lambda root: replace(root, 1), ["01.png"]),
    "overwritten file that is compared": (lambda root: overwrite(root, 4), ["04.png"]),
    "many overwritten files": (
        lambda root: [overwrite(root, number) for number in range(3, 9)],
        [f"0{number}.png" for number in range(3, 9)],
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_folder_or_compared_file_is_noticed_at_the_start(root: Path, decoded: list[str], change: str) -> None:
    check(root)
    assert check(root).deferred is not None
    apply, expected = CHANGES[change]
    apply(root)
    decoded.clear()
    changed = check(root)
    assert changed.deferred is None
    assert sorted(decoded) == expected
    complete = check_images(paths_of(root), cache=root.parent / "other", workers=1, on_progress=None)
    assert [*changed] == [*complete]
    again = check(root)
    assert [*again] == [*changed]
    read_all(root, again)


@pytest.mark.parametrize("change", [overwrite, replace])
def test_other_changes_are_noticed_when_the_image_is_read(
    root: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, int], None]
) -> None:
    """Even if the file system reports the old times of the folders."""
    check(root)
    change(root, 1)
    with monkeypatch.context() as patch:
        patch.setattr(FolderTimes, "are_unchanged", lambda self: True)
        results = check(root)
    decoded.clear()
    with pytest.raises(ImageReadError, match=r"/a/01\.png: this image has another content than when it was validated"):
        read_all(root, results)
    assert check(root).deferred is None
    assert decoded == ["01.png"]
    read_all(root, check(root))


def test_a_touched_or_removed_file_is_no_error(root: Path) -> None:
    check(root)
    paths, deferred = paths_of(root), check(root).deferred
    assert deferred is not None
    os.utime(paths[1], ns=(1, 1))
    Path(paths[2]).unlink()
    reader = ComparingReader(np.empty, paths, deferred)
    assert [len(reader(example)) for example in range(4)] == [0, 1, 2, 3], "a removed one may be in the image cache"


def test_images_that_could_not_be_read_are_always_compared(root: Path) -> None:
    path = root / "a" / "01.png"
    good = path.read_bytes()
    path.write_bytes(b"x" * len(good))
    for _ in range(2):
        assert check(root).unreadable(paths_of(root)).keys() == {str(path)}
    path.write_bytes(good)  # repaired in place
    assert not check(root).unreadable(paths_of(root))


def test_an_interrupted_comparison_is_repeated(root: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_images(paths_of(root), cache=root.parent / "cache", workers=1, on_progress=interrupt)
    assert not [*root.parent.glob("cache/validation/*.folders")]
    assert check(root).deferred is None
    (file,) = root.parent.glob("cache/validation/*.folders")
    file.write_bytes(b"\xff")
    assert check(root).deferred is None, "the record is damaged"


def test_the_record_is_of_one_list_of_images(root: Path, decoded: list[str]) -> None:
    lists = [paths_of(root)[0::2], paths_of(root)[1::2]]
    for paths in (*lists, lists[1]):
        results = check_images(paths, cache=root.parent / "cache", workers=1, on_progress=None)
    assert results.deferred is not None
    decoded.clear()
    replace(root, 3)
    for paths in lists:
        results = check_images(paths, cache=root.parent / "cache", workers=1, on_progress=None)
        assert results.deferred is None
    assert decoded == ["03.png"]
