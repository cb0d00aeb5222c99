import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torchvision.datasets import ImageFolder

from trainer.data.folders import scan
from trainer.data.index import DatasetIndex, Example, Examples, without_images, write_split
from trainer.data.read_index import read_index
from trainer.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
NOT_UTF8 = os.fsdecode(b"caf\xe9\xff")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def make_classes(root: Path, split: str, counts: dict[str, int]) -> Path:
    """Create `count` empty files for each class; an index does not open them."""
    return touch(root, *(f"{split}/{name}/{i:03}.jpg" for name, count in counts.items() for i in range(count)))


def read(root: Path, **options: Any) -> DatasetIndex:
    defaults = {"val_fraction": 0.0, "test_fraction": 0.2, "seed": 0, "extensions": EXTENSIONS}
    return read_index(root, **defaults | options)


def sizes(index: DatasetIndex) -> tuple[int, int, int]:
    return len(index.train), len(index.val), len(index.test)


def make_index(tmp_path: Path) -> DatasetIndex:
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        make_classes(tmp_path, split, {"a": count, "b": count})
    return read(tmp_path)


def relative_paths(root: Path, examples: tuple[Example, ...]) -> list[tuple[str, int]]:
    return [(os.path.relpath(path, root), label) for path, label in examples]


def has_note(index: DatasetIndex, *words: str) -> bool:
    return any(all(word in note for word in words) for note in index.notes)


def test_training_examples_equal_those_of_image_folder(tmp_path: Path) -> None:
    touch(
        tmp_path / "train",
        *["b/2.jpg", "b/10.jpg", "b/x.PNG", "b/deep/1.jpeg", "b/deep/er/1.jpg", "b/deep-er/1.jpg", "b/Z.tiff"],
        *("a b/with space.jpg", 'a b/a,"b\n.jpg', f"a b/{NOT_UTF8} .jpg", "猫/照片.JPG", "B/1.webp", "B/2.bmp"),
    )
    make_classes(tmp_path, "val", {"b": 2, "a b": 1, "猫": 1, "B": 1})
    index = read(tmp_path)
    reference = ImageFolder(str(tmp_path / "train"))
    assert list(index.classes) == reference.classes == ["B", "a b", "b", "猫"]
    assert list(index.train) == reference.samples
    assert list(index.test) == ImageFolder(str(tmp_path / "val")).samples
    assert index.root == tmp_path


def test_val_selects_and_test_is_reported_if_both_exist(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    assert (sizes(index), index.val_split, index.reported) == ((4, 2, 2), "val", "test/")
    assert not index.split_made
    assert all(f"{os.sep}val{os.sep}" in path for path, _ in index.val)
    with pytest.raises(UserError, match=r"data\.val_fraction is 0\.1, but .*val/.*test/.* set data\.val_fraction to 0"):
        read(tmp_path, val_fraction=0.1)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "TEST"])
def test_single_evaluation_folder_is_reported(tmp_path: Path, name: str) -> None:
    make_classes(tmp_path, "train", {"a": 10, "b": 20})
    make_classes(tmp_path, name, {"a": 1, "b": 1})
    index = read(tmp_path)
    assert (sizes(index), index.reported, index.val_split) == ((30, 0, 2), f"{name}/", None)
    assert not index.split_made
    index = read(tmp_path, val_fraction=0.2)
    assert (sizes(index), index.reported, index.val_split) == ((24, 6, 2), f"{name}/", "val")
    assert index.split_made
    assert [label for _, label in index.val] == [0, 0, 1, 1, 1, 1]
    assert has_note(index, "6 of 30 images", "20 %")


@pytest.mark.parametrize(("split", "source"), [("train", "train/"), (".", "the folder")])
def test_training_images_alone_are_split(tmp_path: Path, split: str, source: str) -> None:
    make_classes(tmp_path, split, {"a": 10, "b": 40})
    index = read(tmp_path)
    assert (sizes(index), index.reported, index.split_made) == ((40, 0, 10), "a split of 20 %", True)
    assert has_note(index, f"held out from {source}", "10 of 50 images", "data.seed 0")
    three = read(tmp_path, val_fraction=0.25)
    assert three.test == index.test
    assert (len(three.train), len(three.val)) == (30, 10)  # a quarter of the images outside the test split
    assert sorted({*three.train, *three.val, *three.test}) == sorted({*index.train, *index.test})
    assert all(split == tuple(sorted(split, key=lambda e: (e.label, e.path))) for split in (three.train, three.val))
    with pytest.raises(UserError, match=r"data\.test_fraction is 0.*Set data\.test_fraction"):
        read(tmp_path, test_fraction=0, val_fraction=0.2)


def test_class_missing_from_evaluation_is_noted_and_does_not_shift_labels(tmp_path: Path) -> None:
    make_classes(tmp_path, "train", {"a": 1, "b": 1, "c": 1, "d": 1})
    make_classes(tmp_path, "test", {"a": 1, "d": 1})
    (tmp_path / "test" / "b").mkdir()
    index = read(tmp_path)
    assert [(Path(path).parent.name, label) for path, label in index.test] == [("a", 0), ("d", 3)]
    assert has_note(index, "2 of 4 classes have no image to report on in test/: b, c")
    make_classes(tmp_path / "small class", ".", {"many": 20, "one": 1, "some": 10})
    index = read(tmp_path / "small class")
    assert [sum(label == c for _, label in index.test) for c in range(3)] == [4, 0, 2]
    assert has_note(index, "1 of 3 classes have no image to report on in a split of 20 %: one")


def test_training_classes_without_images_are_refused(tmp_path: Path) -> None:
    make_classes(tmp_path, "train", {"a": 2, "b": 2})
    touch(tmp_path / "train", "gifs/1.gif", "gifs/2.GIF", "gifs/deep/notes.txt", "gifs/noextension", "raw/1.cr2")
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    text = str(caught.value)
    assert "2 of 4 class folders hold no image" in text
    assert "gifs/ holds 2 .gif, 1 .txt, 1 without an extension" in text
    assert "raw/ holds 1 .cr2" in text
    assert "data.extensions is .jpg" in text
    index = read(tmp_path, extensions=(".JPG", ".gif", ".cr2"))
    assert (index.classes, len(index.train) + len(index.test)) == (("a", "b", "gifs", "raw"), 7)


def test_ignored_files_are_counted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_classes(tmp_path, split, {"a": 2, "b": 2})
        touch(tmp_path / split, "stray.jpg", "a/x.gif", "b/y.GIF", "b/z.txt", "b/noextension")
    touch(tmp_path, "README.md", "annotations/x.xml", ".DS_Store", "test/b/desktop.ini", "__MACOSX/train/a/1.jpg")
    touch(tmp_path / "train", "notes.txt", ".hidden/1.jpg", "a/.2.jpg", "a/Thumbs.db", "__MACOSX/1.jpg")
    index = read(tmp_path)
    assert (index.classes, sizes(index)) == (("a", "b"), (4, 0, 4))
    assert has_note(index, "4 .gif", "2 .txt", "2 without an extension")
    assert has_note(index, "hidden files and folders ignored: 7")
    assert has_note(index, "files of train/ outside the class folders", ": 2")
    assert has_note(index, "files of test/", ": 1")
    assert has_note(index, "files of the folder", ": 1")
    assert has_note(index, "beside train/", "annotations/")
    assert len(index.notes) == 6


def test_broken_links_and_pipes_are_listed_for_validation(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_classes(tmp_path, split, {"a": 1, "b": 1})
    (tmp_path / "train/a/gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "train/a/self.jpg").symlink_to(tmp_path / "train/a/self.jpg")
    os.mkfifo(tmp_path / "train/a/pipe.jpg")
    names = [Path(path).name for path, label in read(tmp_path).train if label == 0]
    assert names == ["000.jpg", "gone.jpg", "pipe.jpg", "self.jpg"]


def test_linked_class_folders_are_followed(tmp_path: Path) -> None:
    make_classes(tmp_path / "elsewhere", ".", {"a": 2, "b": 3})
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "data" / "train" / "first").symlink_to(tmp_path / "elsewhere" / "a")
    (tmp_path / "data" / "train" / "second").symlink_to(tmp_path / "elsewhere" / "b")
    (tmp_path / "data" / "val").symlink_to(make_classes(tmp_path, "held out", {"first": 1, "second": 1}) / "held out")
    index = read(tmp_path / "data")
    assert list(index.train) == ImageFolder(str(tmp_path / "data" / "train")).samples
    assert len(index.test) == 2


@pytest.mark.timeout(20)
def test_link_to_a_parent_folder_is_followed_once(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_classes(tmp_path, split, {"a": 2, "b": 2})
    touch(tmp_path, "train/a/deep/1.jpg")
    for link, target in (("train/a/up", "train/a"), ("train/a/deep/up", "train"), ("train/b/root", ".")):
        (tmp_path / link).symlink_to(tmp_path / target)
    index = read(tmp_path)
    assert len(index.train) == 5
    assert has_note(index, "links to a folder that was already read, ignored: 3")


@pytest.mark.parametrize("link", ["val", "train/c"])
def test_folder_linked_from_two_classes_or_splits_is_refused(tmp_path: Path, link: str) -> None:
    make_classes(tmp_path, "train", {"a": 2, "b": 2})
    (tmp_path / link).symlink_to(tmp_path / "train" / ("a" if link == "train/c" else ""))
    with pytest.raises(UserError, match=r"train/a and .*/(val/a|train/c) contain the same folder through a link"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ("", "holds no folders and no images"),
        ("1.jpg 2.jpg x.txt", r"holds 2 images and no folders \(1 \.txt\)\. Expected train/"),
        ("hotdog/train/a/1.jpg hotdog/train/b/1.jpg", "holds a single folder with .*, hotdog/.*--data.root .*/hotdog$"),
        ("one/two/a/1.jpg one/two/b/1.jpg", "--data.root .*/one/two$"),
        ("a/1.txt b/.keep", "no class with images in the folder; expected at least two"),
        ("cats/1.jpg", "a single class, cats, in the folder; expected at least two"),
        ("train/cats/1.jpg val/cats/2.jpg", "a single class, cats, in train/; expected at least two"),
        ("val/a/1.jpg test/a/1.jpg", "test/, val/ look like splits .* no train/ with class folders"),
        ("train/a/1.jpg train/b/1.jpg test/a/1.gif", "no image to report on in test/"),
        ("train/a/1.jpg train/b/1.jpg val/a/1.gif test/a/1.jpg", "no image to select the best epoch on in val/"),
        (
            "train/a/1.jpg train/b/1.jpg val/a/1.jpg VAL/a/1.jpg",
            "VAL/ and val/ are the same split, val. Keep one, merge",
        ),
        ("train/a/1.jpg train/b/1.jpg val/a/1.jpg val/B/1.jpg", "val/ has classes that are not .*: B.*are a, b"),
        (f"{NOT_UTF8}/1.jpg b/1.jpg", r"caf\\xe9\\xff: the name of a class folder is not UTF-8"),
        ("a/1.jpg b/1.jpg", "no image to report on in a split of 20 %.*needs two images"),
    ],
)
def test_unknown_layout_is_explained(tmp_path: Path, files: str, message: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    touch(root, *files.split())
    with pytest.raises(UserError, match=message):
        read(root)


def test_unreadable_root_or_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"data\.root .*nothing: cannot be read"):
        read(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a folder nor a CSV file"):
        read(tmp_path / "pipe")
    make_classes(tmp_path, "train", {"a": 1, "b": 1})
    scandir: Callable[[str], object] = os.scandir

    def guarded(folder: str) -> object:
        if str(folder).endswith("train/b"):  # root may read any folder
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(scan.os, "scandir", guarded)
    with pytest.raises(UserError, match=r"train/b: the folder cannot be read \(Permission denied\)"):
        read(tmp_path)


def test_split_does_not_depend_on_the_location_of_the_folder(tmp_path: Path) -> None:
    one, other = (make_classes(tmp_path / where, ".", {"a": 30, "b": 50}) for where in ("one", "z/other"))
    for root in (one, other):
        touch(root, "a/deep/1.jpg", "a/deep-er/1.jpg")
    first, second = (read(root, val_fraction=0.2) for root in (one, other))
    for split in ("train", "val", "test"):
        assert relative_paths(one, getattr(first, split)) == relative_paths(other, getattr(second, split))
    assert read(one, val_fraction=0.2) == first
    assert relative_paths(one, read(one, seed=1).test) != relative_paths(one, first.test)


def test_unreadable_images_are_dropped_unless_a_class_or_split_would_be_empty(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    unreadable = {index.train[0].path: "truncated", index.val[1].path: "empty", index.test[0].path: "empty"}
    remaining = without_images(index, unreadable)
    assert (remaining.train, remaining.val, remaining.test) == (index.train[1:], index.val[:1], index.test[1:])
    assert remaining.classes == index.classes
    assert has_note(remaining, "classes have no image to report on", ": a")
    assert has_note(remaining, "classes have no image to select", ": b")
    assert without_images(index, {}) == index
    for examples, message in (
        (index.train, "no training image of these classes can be read: a"),
        (index.val, "none of the 2 images to select the best epoch on can be read"),
        (index.test, "none of the 2 images to report on can be read"),
    ):
        with pytest.raises(UserError, match=message):
            without_images(index, {example.path: "empty" for example in examples[:2]})


def test_written_split_is_read_unchanged(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    alphabet = "ab ,;\"'\n\r\t\\猫é\u0301-#=@" + os.fsdecode(b"\xe9\xff")
    kinds = ["a,b", ' "quoted"', "猫\n狗", "plain ", "nan"]
    for name in kinds:
        for i in range(8):
            stem = "".join(rng.choices(alphabet, k=rng.randint(1, 12)))
            touch(tmp_path / "data", f"{name}/{stem}{i}.jpg")
    index = read(tmp_path / "data", val_fraction=0.25)
    (tmp_path / "run").mkdir()
    for file in (tmp_path / "run" / "split.csv", tmp_path / "split.csv", tmp_path / "data" / "split.csv"):
        write_split(index, file)
        again = read(file, test_fraction=0)
        assert again.classes == index.classes == tuple(sorted(kinds))
        assert (again.train, again.val, again.test) == (index.train, index.val, index.test)
        assert not again.split_made
        assert [path.name for path in file.parent.iterdir() if "split" in path.name] == ["split.csv"]


def test_written_split_may_be_moved_with_or_without_its_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    index = read(make_classes(Path("data"), ".", {"a": 5, "b": 5}))
    train = relative_paths(Path("data"), index.train)
    write_split(index, Path("data/split.csv"))
    assert Path("data/split.csv").read_text().startswith('"path","label","split"\n"a/00')
    Path("run").mkdir()
    write_split(index, Path("run/split.csv"))
    Path("run").rename("moved")
    assert relative_paths(tmp_path / "data", read(Path("moved/split.csv")).train) == train
    Path("data").rename("elsewhere")
    assert relative_paths(Path("elsewhere"), read(Path("elsewhere/split.csv")).train) == train
    with pytest.raises(UserError, match="cannot be written"):
        write_split(index, tmp_path / "nowhere" / "split.csv")


@pytest.mark.parametrize(
    ("count", "expected"), [(6, "acegik"), (7, "abdfgik"), (12, "abcdefghijkl"), (50, "abcdefghijkl"), (0, "")]
)
def test_examples_are_spread_evenly(count: int, expected: str) -> None:
    spread = Examples("abcdefghijkl", range(12)).spread(count)
    assert "".join(spread.paths) == expected
    assert ["abcdefghijkl"[label] for label in spread.labels] == spread.paths
