"""Which images `regraft check` suggests to leave out, and the groups that it writes."""

import os
from pathlib import Path

import pytest

from trainer.check.csv_files import suggest_excluded, write_groups
from trainer.check.findings import CheckResult, DuplicateGroup, LabeledImage, LabelError
from trainer.data.csv.table import read_table


def image(text: str) -> LabeledImage:
    """Return an image from text such as `train/a/1`."""
    split, label, _ = text.split("/")
    return LabeledImage(text, label, split)


@pytest.mark.parametrize(
    ("group", "excluded", "kept"),
    [
        ("train/a/1 train/a/2 test/a/3", "train/a/1 train/a/2", "test/a/3"),
        ("train/a/1 val/a/2", "train/a/1", "val/a/2"),
        ("val/a/1 test/a/2", "val/a/1", "test/a/2"),
        ("train/a/1 train/a/2 train/a/3", "train/a/2 train/a/3", "train/a/1"),
        ("test/a/1 test/a/2", "test/a/2", "test/a/1"),
        ("train/a/1 test/b/2", "train/a/1", "test/b/2"),
        ("train/a/1 train/b/2", "train/a/1 train/b/2", None),  # no one knows which label is right
        ("train/a/1 test/a/2 test/b/3", "train/a/1 test/a/2 test/b/3", None),
    ],
)
def test_one_copy_is_kept_in_the_last_split(group: str, excluded: str, kept: str | None) -> None:
    images = tuple(image(text) for text in group.split())
    duplicates = (DuplicateGroup(images=images, digests=("",) * len(images)),)
    result = CheckResult(root="", classes=("a", "b"), counts={}, duplicates=duplicates)
    found = [*suggest_excluded(result)]
    assert [each.image.path for each in found] == excluded.split()
    assert {each.kept for each in found} == {kept or ""}
    assert {each.reason for each in found} <= ({"copy"} if kept else {"copy", "conflicting-labels"})


def test_label_errors_of_the_training_split_are_excluded_once() -> None:
    copies = DuplicateGroup(images=(image("train/a/1"), image("test/a/2")), digests=("", ""))
    errors = tuple(LabelError(image(text), "b", -0.5) for text in ("train/a/1", "test/a/2", "train/a/3"))
    result = CheckResult(root="", classes=("a", "b"), counts={}, duplicates=(copies,), label_errors=errors)
    found = [(each.image.path, each.reason, each.suggested) for each in suggest_excluded(result)]
    assert found == [("train/a/1", "copy", ""), ("train/a/3", "label-error", "b")]


def test_training_reads_the_groups_whatever_the_names(tmp_path: Path) -> None:
    names = ['nan/1,"2".png', "nan/line\nbreak.png", os.fsdecode(b"caf\xe9/\xff.png"), "café/ 1 .png", "café/plain.png"]
    images = []
    for name in names:
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        images.append(LabeledImage(str(path), path.parent.name, "test"))
    images[2] = images[2]._replace(label="nan")
    assert write_groups(tmp_path / "groups.csv", images, [0, 0, 2, 3, 3]) == 2
    rows, _ = read_table(tmp_path / "groups.csv")
    assert [(row.path, row.label, row.split) for row in rows] == [(path, label, None) for path, label, _ in images]
    assert [row.group for row in rows] == ["0", "0", "", "3", "3"]
