import os
import time
from pathlib import Path

import pytest

from tests.trainer.data.test_index import has_note, read, touch
from trainer.config.sections.data import DataConfig
from trainer.data import group_by
from trainer.data.group_by import check_pattern, find_groups
from trainer.data.index import DatasetIndex
from trainer.errors import UserError

PATTERN = r"(patient\d+)_"


def patients(examples: tuple[tuple[str, int], ...]) -> set[str]:
    return {Path(path).name.partition("_")[0] for path, _ in examples}


def make_images(root: Path, *, patients: int = 20) -> Path:
    return touch(root, *(f"{c}/patient{p}_{i}.jpg" for p in range(patients) for c in "ab" for i in range(1 + p % 4)))


def split(root: Path, **options: object) -> DatasetIndex:
    return read(root, val_fraction=0.25, group_by=PATTERN, **options)


def test_no_split_of_regraft_divides_a_group(tmp_path: Path) -> None:
    index = split(make_images(tmp_path))
    parts = [patients(examples) for examples in (index.train, index.val, index.test)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set().union(*parts)) == 20
    assert has_note(index, "groups of data.group_by: 20 of 100 images")
    assert index == split(tmp_path)
    assert index.test != split(tmp_path, seed=1).test
    assert {index.groups[path] for path, _ in index.test} == patients(index.test)


def test_images_that_do_not_match_are_groups_of_their_own(tmp_path: Path) -> None:
    root = touch(make_images(tmp_path), *(f"{c}/other{i}.jpg" for c in "ab" for i in range(20)))
    index = split(root)
    assert has_note(index, "20 of 100 images; 40 images do not match")
    assert any("other" in path for path, _ in index.train)
    assert any("other" in path for path, _ in index.test)


def test_groups_that_given_splits_divide_are_reported(tmp_path: Path) -> None:
    touch(
        tmp_path,
        *(f"{s}/{c}/patient{p}_{c}.jpg" for s, ps in (("train", "123"), ("val", "34")) for c in "ab" for p in ps),
    )
    index = read(tmp_path, group_by=PATTERN)
    assert has_note(index, "WARNING: groups with images in more than one split", "1 of 4, with 4 images (patient3)")


def test_groups_of_any_file_names(tmp_path: Path) -> None:
    strange = os.fsdecode(b"caf\xe9\n\xff")
    paths = [f"{tmp_path}/a/{name}-{i}.jpg" for name in (strange, "猫 ü", "x") for i in range(2)]
    groups, _ = find_groups(r"(?s)a/(?P<name>.*?)(-\d|$)", [*paths, f"{tmp_path}/b/1.jpg"], str(tmp_path))
    assert groups == {path: Path(path).name.rpartition("-")[0] for path in paths}


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        (r"patient\d+", "it has 0 capturing groups"),
        (r"(a)(b)", "it has 2 capturing groups"),
        (r"(?P<a>a)(?P<b>b)", "it has 2 named groups"),
        (r"(a", "missing \\)"),
        (r"(a{99999999999})", "repetition number is too large"),
        ("(" * 600, "missing \\)|recursion"),
        ("(a" + "b" * 1000 + ")", "more than 1000 characters"),
    ],
)
def test_expressions_without_one_group_are_refused_before_the_data_are_read(pattern: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"data\.group_by is .*{reason}.*expected a regular expression"):
        DataConfig(group_by=pattern)


def test_two_sources_of_groups_are_refused() -> None:
    with pytest.raises(UserError, match=r"data\.group_by and the group of data\.csv_columns are both set"):
        DataConfig(group_by="(a)", csv_columns={"group": "patient"})


def test_an_expression_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"matches no path, such as a/patient0_0\.jpg; expected"):
        read(make_images(tmp_path), group_by="(subject)")


def test_an_expression_cannot_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group_by, "_TIMEOUT", 0.5)
    check_pattern("data.group_by", "(a+)+$".replace("(", "(?:", 1) + "()")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"1 paths were not matched within 0\.5 s\. A repeat of a repeat"):
        find_groups(r"(?:a+)+$()", [f"{tmp_path}/{'a' * 60}!"], str(tmp_path))
    assert time.monotonic() - start < 10
