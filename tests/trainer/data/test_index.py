import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder

from trainer.data import scan
from trainer.data.index import DatasetIndex, Example, read_index, without_images, write_split
from trainer.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
NOT_UTF8 = os.fsdecode(b"caf\xe9 \xff.jpg")


def touch(root: Path, *names: str) -> Path:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def make_classes(root: Path, split: str, counts: dict[str, int]) -> Path:
    """Create `count` empty files for each class; an index does not open them."""
    return touch(root, *(f"{split}/{name}/{i:03}.jpg" for name, count in counts.items() for i in range(count)))


def read(
    root: Path,
    *,
    val_fraction: float = 0.0,
    test_fraction: float = 0.2,
    seed: int = 0,
    extensions: tuple[str, ...] = EXTENSIONS,
) -> DatasetIndex:
    return read_index(root, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed, extensions=extensions)


def relative_paths(root: Path, examples: tuple[Example, ...]) -> list[tuple[str, int]]:
    return [(os.path.relpath(path, root), label) for path, label in examples]


def has_note(index: DatasetIndex, *words: str) -> bool:
    return any(all(word in note for word in words) for note in index.notes)


# Layouts


def test_training_examples_equal_those_of_image_folder(tmp_path: Path) -> None:
    touch(
        tmp_path / "train",
        *["b/2.jpg", "b/10.jpg", "b/x.PNG", "b/deep/1.jpeg", "b/deep/er/1.jpg", "b/deep-er/1.jpg", "b/Z.tiff"],
        *("a b/with space.jpg", 'a b/a,"b\n.jpg', f"a b/{NOT_UTF8}", "猫/照片.JPG", "B/1.webp", "B/2.bmp"),
    )
    make_classes(tmp_path, "val", {"b": 2, "a b": 1, "猫": 1, "B": 1})
    index = read(tmp_path)
    reference = ImageFolder(str(tmp_path / "train"))
    assert list(index.classes) == reference.classes == ["B", "a b", "b", "猫"]
    assert list(index.train) == reference.samples
    assert list(index.test) == ImageFolder(str(tmp_path / "val")).samples
    assert index.root == tmp_path


@pytest.mark.shared
def test_real_dataset_equals_image_folder(shared: Path) -> None:
    root = shared / "data" / "hymenoptera"
    index = read(root)
    assert list(index.train) == ImageFolder(str(root / "train")).samples
    assert list(index.test) == ImageFolder(str(root / "val")).samples
    assert (len(index.train), len(index.val), len(index.test)) == (244, 0, 153)
    assert (index.classes, index.reported, index.val_split) == (("ants", "bees"), "val/", None)
    assert len(index.notes) == 1
    assert has_note(index, "1 .gif", "extension")


def test_val_selects_and_test_is_reported_if_both_exist(tmp_path: Path) -> None:
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        make_classes(tmp_path, split, {"a": count, "b": count})
    index = read(tmp_path)
    assert [len(split) for split in (index.train, index.val, index.test)] == [6, 4, 2]
    assert (index.val_split, index.reported, index.split_made) == ("val", "test/", False)
    assert all(f"{os.sep}val{os.sep}" in path for path, _ in index.val)
    with pytest.raises(UserError, match=r"data\.val_fraction is 0\.1, but .*val/.*test/.* set data\.val_fraction to 0"):
        read(tmp_path, val_fraction=0.1)


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test", "Val", "TEST"])
def test_single_evaluation_folder_is_reported(tmp_path: Path, name: str) -> None:
    make_classes(tmp_path, "train", {"a": 10, "b": 20})
    make_classes(tmp_path, name, {"a": 1, "b": 1})
    index = read(tmp_path)
    assert (len(index.train), index.val, len(index.test)) == (30, (), 2)
    assert (index.reported, index.val_split, index.split_made) == (f"{name}/", None, False)

    index = read(tmp_path, val_fraction=0.2)
    assert (index.reported, index.val_split, index.split_made) == (f"{name}/", "val", True)
    assert [sum(label == c for _, label in index.val) for c in (0, 1)] == [2, 4]
    assert (len(index.train), len(index.test)) == (24, 2)
    assert set(index.train).isdisjoint(index.val)
    assert has_note(index, "6 of 30 images", "20 %")


@pytest.mark.parametrize("other", ["valid", "Validation", "VAL"])
def test_two_folders_for_one_split_are_refused(tmp_path: Path, other: str) -> None:
    for split in ("train", "val", other):
        make_classes(tmp_path, split, {"a": 2, "b": 2})
    with pytest.raises(UserError, match=r"val/.*same split, val\. Keep one") as caught:
        read(tmp_path)
    assert f"{other}/" in str(caught.value)


def test_train_folder_alone_is_split(tmp_path: Path) -> None:
    make_classes(tmp_path, "train", {"a": 10, "b": 40})
    index = read(tmp_path, test_fraction=0.1)
    assert (len(index.train), len(index.val), len(index.test)) == (45, 0, 5)
    assert (index.reported, index.split_made) == ("a split of 10 %", True)
    assert has_note(index, "held out from train/", "5 of 50 images", "data.seed 0")
    with pytest.raises(UserError, match=r"data\.test_fraction is 0.*Set data\.test_fraction"):
        read(tmp_path, test_fraction=0)


def test_class_folders_alone_are_split(tmp_path: Path) -> None:
    make_classes(tmp_path, ".", {"a": 10, "b": 40})
    index = read(tmp_path)
    assert (len(index.train), len(index.val), len(index.test)) == (40, 0, 10)
    assert index.split_made
    three = read(tmp_path, val_fraction=0.25)
    assert three.test == index.test
    assert (len(three.train), len(three.val)) == (30, 10)  # a quarter of the images outside the test split
    assert sorted({*three.train, *three.val, *three.test}) == sorted({*index.train, *index.test})
    assert all(split == tuple(sorted(split, key=lambda e: (e.label, e.path))) for split in (three.train, three.val))
    with pytest.raises(UserError, match=r"data\.test_fraction is 0"):
        read(tmp_path, test_fraction=0, val_fraction=0.2)


def test_class_may_be_named_train(tmp_path: Path) -> None:
    make_classes(tmp_path, ".", {"bus": 5, "train": 5, "test": 5})
    assert read(tmp_path).classes == ("bus", "test", "train")
    touch(tmp_path, "train/steam/1.jpg")  # images and a folder: still a class
    assert read(tmp_path).classes == ("bus", "test", "train")


def test_images_beside_class_folders_are_ignored(tmp_path: Path) -> None:
    for split in ("train", "val"):
        make_classes(tmp_path, split, {"a": 3, "b": 3})
    touch(tmp_path, "train/stray.jpg", "train/notes.txt", "val/stray.jpg", "README.md", "annotations/x.xml")
    index = read(tmp_path)
    assert (index.classes, len(index.train), len(index.test)) == (("a", "b"), 6, 6)
    assert has_note(index, "files of train/ outside the class folders", ": 2")
    assert has_note(index, "files of val/", ": 1")
    assert has_note(index, "files of the folder", ": 1")
    assert has_note(index, "beside train/", "annotations/")


# Classes


def test_class_missing_from_evaluation_does_not_shift_labels(tmp_path: Path) -> None:
    make_classes(tmp_path, "train", {"a": 1, "b": 1, "c": 1, "d": 1})
    make_classes(tmp_path, "test", {"a": 1, "d": 1})
    (tmp_path / "test" / "b").mkdir()
    index = read(tmp_path)
    assert [(Path(path).parent.name, label) for path, label in index.test] == [("a", 0), ("d", 3)]
    assert has_note(index, "2 of 4 classes have no image to report on in test/: b, c")


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_class_missing_from_training_is_refused(tmp_path: Path, split: str) -> None:
    make_classes(tmp_path, "train", {"ants": 1, "bees": 1})
    make_classes(tmp_path, split, {"ants": 1, "Bees": 1, "wasps": 1})
    with pytest.raises(UserError, match=f"{split}/ has classes that are not training classes: Bees, wasps") as caught:
        read(tmp_path)
    assert "ants, bees" in str(caught.value)


def test_class_names_that_differ_in_unicode_normalization_are_explained(tmp_path: Path) -> None:
    make_classes(tmp_path, "train", {"caf\u00e9": 1, "tea": 1})
    make_classes(tmp_path, "val", {"cafe\u0301": 1, "tea": 1})
    with pytest.raises(UserError, match="NFC or NFD"):
        read(tmp_path)


def test_training_classes_without_images_are_refused(tmp_path: Path) -> None:
    make_classes(tmp_path, "train", {"a": 2, "b": 2})
    touch(tmp_path / "train" / "gifs", "1.gif", "2.GIF", "deep/notes.txt", "noextension")
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    text = str(caught.value)
    assert "2 of 4 class folders hold no image" in text
    assert "gifs/ holds 2 .gif, 1 .txt, 1 without an extension" in text
    assert "empty/ holds no files" in text
    assert "data.extensions is .jpg" in text
    (tmp_path / "train" / "empty").rmdir()
    index = read(tmp_path, extensions=(".JPG", ".gif"))
    assert (index.classes, len(index.train) + len(index.test)) == (("a", "b", "gifs"), 6)


def test_class_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    make_classes(tmp_path, "train", {os.fsdecode(b"caf\xe9"): 1, "b": 1})
    with pytest.raises(UserError, match=r"caf\\xe9: the name of a class folder is not UTF-8"):
        read(tmp_path)


# Ignored files


def test_ignored_files_are_counted(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_classes(tmp_path, split, {"a": 2, "b": 2})
        touch(tmp_path, f"{split}/a/x.gif", f"{split}/b/y.GIF", f"{split}/b/z.txt", f"{split}/b/noextension")
    touch(tmp_path, ".DS_Store", "test/b/desktop.ini", "__MACOSX/train/a/1.jpg")
    touch(tmp_path / "train", ".hidden/1.jpg", "a/.2.jpg", "a/Thumbs.db", "__MACOSX/1.jpg")
    index = read(tmp_path)
    assert (len(index.train), len(index.test)) == (4, 4)
    assert has_note(index, "4 .gif", "2 .txt", "2 without an extension")
    assert has_note(index, "hidden files and folders ignored: 7")
    assert len(index.notes) == 2


def test_broken_links_and_pipes_are_listed_for_validation(tmp_path: Path) -> None:
    for split in ("train", "test"):
        make_classes(tmp_path, split, {"a": 1, "b": 1})
    (tmp_path / "train/a/gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (tmp_path / "train/a/self.jpg").symlink_to(tmp_path / "train/a/self.jpg")
    os.mkfifo(tmp_path / "train/a/pipe.jpg")
    names = [Path(path).name for path, label in read(tmp_path).train if label == 0]
    assert names == ["000.jpg", "gone.jpg", "pipe.jpg", "self.jpg"]


# Links


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


def test_folder_linked_from_two_classes_or_splits_is_refused(tmp_path: Path) -> None:
    make_classes(tmp_path, "train", {"a": 2, "b": 2})
    (tmp_path / "val").symlink_to(tmp_path / "train")
    with pytest.raises(UserError, match=r"train/a and .*val/a contain the same folder through a link"):
        read(tmp_path)
    (tmp_path / "val").unlink()
    (tmp_path / "train" / "c").symlink_to(tmp_path / "train" / "a")
    with pytest.raises(UserError, match=r"train/a and .*train/c contain the same folder through a link"):
        read(tmp_path)


# Unknown layouts


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no folders and no images"),
        (["1.jpg", "2.jpg", "x.txt"], r"holds 2 images and no folders \(1 \.txt\)\. Expected train/"),
        (["x.txt"], r"holds no folders and no images \(1 \.txt\)"),
        (["hotdog/train/a/1.jpg", "hotdog/train/b/1.jpg"], "holds a single folder, hotdog/.*--data.root .*/hotdog$"),
        (["one/two/a/1.jpg", "one/two/b/1.jpg"], "--data.root .*/one/two$"),
        (["data/a/1.jpg", "data/b/1.jpg", "__MACOSX/data/a/1.jpg"], "--data.root .*/data$"),
        (["cats/1.jpg"], "a single class, cats, in the folder; expected at least two"),
        (["train/cats/1.jpg", "val/cats/2.jpg"], "a single class, cats, in train/; expected at least two"),
        (["val/a/1.jpg", "test/a/1.jpg"], "test/, val/ look like splits .* no train/ with class folders"),
        (["train/1.jpg", "test/1.jpg"], "test/, train/ look like splits"),
        (["Training/a/1.jpg", "Testing/a/1.jpg", "docs/1.jpg"], "Testing/, Training/ look like splits"),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "test/1.jpg"],
            "test: it has no class folders, so its 1 files have no label",
        ),
        (["train/a/1.jpg", "train/b/1.jpg", "val/.keep"], "val: it has no class folders"),
        (["train/a/1.jpg", "train/b/1.jpg", "test/a/1.gif"], "no image to report on in test/"),
        (
            ["train/a/1.jpg", "train/b/1.jpg", "val/a/1.gif", "test/a/1.jpg"],
            "no image to select the best epoch on in val/",
        ),
        (["a/1.jpg", "b/1.jpg"], "no image to report on in a split of 20 %.*needs two images"),
    ],
)
def test_unknown_layout_is_explained(tmp_path: Path, files: list[str], message: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    touch(root, *files)
    with pytest.raises(UserError, match=message):
        read(root)


def test_missing_path_or_pipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root .*nothing: cannot be read"):
        read(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a folder nor a CSV file"):
        read(tmp_path / "pipe")


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_classes(tmp_path, "train", {"a": 1, "b": 1})
    forbidden = str(tmp_path / "train" / "b")
    scandir: Callable[[str], object] = os.scandir

    def guarded(folder: str) -> object:
        if folder == forbidden:  # root may read any folder
            raise PermissionError(13, "Permission denied", folder)
        return scandir(folder)

    monkeypatch.setattr(scan.os, "scandir", guarded)
    with pytest.raises(UserError, match=r"train/b: the folder cannot be read \(Permission denied\)"):
        read(tmp_path)


# Splits


def test_split_does_not_depend_on_the_location_of_the_folder(tmp_path: Path) -> None:
    one, other = (make_classes(tmp_path / where, ".", {"a": 30, "b": 50}) for where in ("one", "z/other"))
    for root in (one, other):
        touch(root, "a/deep/1.jpg", "a/deep-er/1.jpg")
    first, second = (read(root, val_fraction=0.2) for root in (one, other))
    for split in ("train", "val", "test"):
        assert relative_paths(one, getattr(first, split)) == relative_paths(other, getattr(second, split))
    assert read(one, val_fraction=0.2) == first
    assert relative_paths(one, read(one, seed=1).test) != relative_paths(one, first.test)


def test_class_too_small_for_the_split_is_noted(tmp_path: Path) -> None:
    make_classes(tmp_path, ".", {"many": 20, "one": 1, "some": 10})
    index = read(tmp_path)
    assert [sum(label == c for _, label in index.test) for c in range(3)] == [4, 0, 2]
    assert has_note(index, "1 of 3 classes have no image to report on in a split of 20 %: one")


# without_images


def make_index(tmp_path: Path) -> DatasetIndex:
    for split, count in (("train", 2), ("val", 1), ("test", 1)):
        make_classes(tmp_path, split, {"a": count, "b": count})
    return read(tmp_path)


def test_unreadable_images_are_dropped_from_every_split(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    unreadable = {index.train[0].path: "truncated", index.val[1].path: "empty", index.test[0].path: "empty"}
    remaining = without_images(index, unreadable)
    assert (remaining.train, remaining.val, remaining.test) == (index.train[1:], index.val[:1], index.test[1:])
    assert remaining.classes == index.classes
    assert has_note(remaining, "classes have no image to report on", ": a")
    assert has_note(remaining, "classes have no image to select", ": b")
    assert without_images(index, {}) == index


@pytest.mark.parametrize(
    ("split", "positions", "message"),
    [
        ("train", [0, 1], "no training image of these classes can be read: a"),
        ("val", [0, 1], "none of the 2 images to select the best epoch on can be read"),
        ("test", [0, 1], "none of the 2 images to report on can be read"),
    ],
)
def test_dropping_all_images_of_a_class_or_split_is_refused(
    tmp_path: Path, split: str, positions: list[int], message: str
) -> None:
    index = make_index(tmp_path)
    examples = getattr(index, split)
    with pytest.raises(UserError, match=message):
        without_images(index, {examples[position].path: "empty" for position in positions})


# write_split


def test_written_split_is_read_unchanged(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    alphabet = "ab ,;\"'\n\r\t\\猫é\u0301-#=@" + os.fsdecode(b"\xe9\xff")
    kinds = ["a,b", ' "quoted"', "猫\n狗", "plain "]
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
    make_classes(Path("data"), ".", {"a": 5, "b": 5})
    index = read(Path("data"))
    write_split(index, Path("data/split.csv"))
    Path("run").mkdir()
    write_split(index, Path("run/split.csv"))
    assert Path("data/split.csv").read_text().startswith('"path","label","split"\n"a/00')
    Path("run").rename("moved")
    assert [Path(path).resolve() for path, _ in read(Path("moved/split.csv")).train] == [
        (tmp_path / path).resolve() for path, _ in index.train
    ]
    Path("data").rename("elsewhere")
    assert relative_paths(Path("elsewhere"), read(Path("elsewhere/split.csv")).train) == relative_paths(
        Path("data"), index.train
    )


def test_split_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    index = make_index(tmp_path)
    with pytest.raises(UserError, match="the split cannot be written"):
        write_split(index, tmp_path / "nowhere" / "split.csv")
