import os
from pathlib import Path

import pytest

from tests.trainer.data.test_index import make_classes, read, sizes, touch
from trainer.data.index import DatasetIndex, write_excluded
from trainer.data.prepare import exclude_images
from trainer.data.read_index import read_index
from trainer.errors import UserError

NOT_UTF8 = os.fsdecode(b"a/caf\xe9.jpg")


@pytest.fixture
def index(tmp_path: Path) -> DatasetIndex:
    root = tmp_path / "data"
    for split, count in (("train", 4), ("val", 2), ("test", 2)):
        make_classes(root, split, {"a": count, "b": count})
    touch(root / "train", NOT_UTF8, "a/with, comma.jpg")
    return read(root)


def names(index: DatasetIndex) -> set[str]:
    return {os.path.relpath(example.path, index.root) for example in (*index.train, *index.val, *index.test)}


@pytest.mark.parametrize(
    ("content", "excluded"),
    [
        (b"train/a/000.jpg\n\nval/b/001.jpg\r\ntrain/a/000.jpg\n", {"train/a/000.jpg", "val/b/001.jpg"}),
        (b"\xef\xbb\xbftrain/a/with, comma.jpg", {"train/a/with, comma.jpg"}),
        (b"label,path\nb,train/a/000.jpg\n", {"train/a/000.jpg"}),
        (b'\xef\xbb\xbf"Path";"why"\n"test/a/001.jpg";"blurred; dark"\n', {"test/a/001.jpg"}),
        (b'x,path\n1,"train/a/with, comma.jpg"\n', {"train/a/with, comma.jpg"}),
        (b"x,path\n,train/a/caf\xe9.jpg\n", {f"train/{NOT_UTF8}"}),
        (b"train/../train/./a/000.jpg", {"train/a/000.jpg"}),
        (b"path\n", set()),
        (b"", set()),
    ],
)  # fmt: skip
def test_listed_images_are_left_out_and_the_others_keep_their_splits(
    index: DatasetIndex, tmp_path: Path, content: bytes, excluded: set[str]
) -> None:
    (file := tmp_path / "list.csv").write_bytes(content)
    remaining = exclude_images(index, file)
    assert names(remaining) == names(index) - excluded
    assert [example for example in index.train if example.path in {e.path for e in remaining.train}] == [
        *remaining.train
    ]
    assert remaining.notes[-1].startswith(f"images left out by data.exclude {file}: {len(excluded)}")
    written = tmp_path / "excluded.csv"
    write_excluded(remaining, written)
    assert names(exclude_images(index, written)) == names(remaining), "the record of a run can be used again"


def test_absolute_paths_and_counts_by_split(index: DatasetIndex, tmp_path: Path) -> None:
    (file := tmp_path / "list.txt").write_text(f"{index.root}/train/b/000.jpg\ntest/a/000.jpg\n")
    remaining = exclude_images(index, file)
    assert sizes(remaining) == (len(index.train) - 1, 4, 3)
    assert remaining.notes[-1].endswith(": 2 (1 of train, 1 of test)")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"train/a/000.jpg\nnowhere/1.jpg\n", r"1 of its 2 paths are not images of the dataset: nowhere/1\.jpg\. Exp"),
        (b"image,label\ntrain/a/000.jpg,a\n", "2 of its 2 paths are not images"),
        (b"path,label\n,a\n", "line 2: the path is empty"),
        (b"label,path\na\n", "line 2: the path is empty"),
        (b'path,label\n"train/a"x,a\n', r"data\.exclude \S+, line 2: not a row of a CSV"),
        (b"\x89PNG\r\n\x1a\n\0\0", "line 3: not the path of an image"),
        (b"x" * 70_000, "line 1: not the path of an image"),
        (b"test/a/000.jpg\ntest/a/001.jpg\ntest/b/000.jpg\ntest/b/001.jpg", "none of the 4 images to report on"),
        (b"\n".join(b"train/b/00%d.jpg" % i for i in range(4)), "no training image of these classes is left .*: b"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_the_dataset_are_refused(
    index: DatasetIndex, tmp_path: Path, content: bytes, message: str
) -> None:
    (file := tmp_path / "list.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        exclude_images(index, file)


def test_missing_file_is_an_error(index: DatasetIndex, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.exclude .*none\.csv: cannot be read \(No such file"):
        exclude_images(index, tmp_path / "none.csv")


def test_the_test_split_that_regraft_makes_is_that_of_all_images(tmp_path: Path) -> None:
    """Otherwise an image that is left out would move others between training and test."""
    make_classes(tmp_path, "data", {"a": 20, "b": 20})
    index = read_index(tmp_path / "data", val_fraction=0.2, test_fraction=0.2, seed=0, extensions=(".jpg",))
    (file := tmp_path / "list.txt").write_text("a/000.jpg\nb/010.jpg\n")
    remaining = exclude_images(index, file)
    for before, after in ((index.train, remaining.train), (index.val, remaining.val), (index.test, remaining.test)):
        assert {*after} <= {*before}
