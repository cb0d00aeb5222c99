"""Suggestions of data.group_by from file names and near-duplicates."""

import re
from collections.abc import Iterable

import pytest

from trainer.check.findings import DuplicateGroup, LabeledImage
from trainer.check.groups import describe_groups, suggest_pattern

ROOT = "/data/set"


def images(names: Iterable[str], *, split: str = "train") -> list[LabeledImage]:
    """Return images whose class is the folder before the first that follows the split."""
    return [LabeledImage(f"{ROOT}/{name}", re.sub(r"^(train|val)/", "", name).split("/")[0], split) for name in names]


@pytest.mark.parametrize(
    ("names", "pattern", "groups"),
    [
        ([f"{c}/patient{p}_{i:03}.jpg" for c in "ab" for p in range(10) for i in range(5)], "(patient[0-9]+)", 10),
        (
            [f"train/{c}/Patient {p:02}/{i}.jpg" for c in "ab" for p in range(9) for i in range(5)],
            "(Patient [0-9]+)",
            9,
        ),
        (
            [f"{c}/walk-{k}-{i:04}.jpg" for c in ("cat", "dog") for k in "abcdefgh" for i in range(5)],
            r"([^/]*[^/0-9])[0-9]+\.[^./]+$",
            8,
        ),
        (
            [f"{c}/hive {k}/{i}x.jpg" for c in ("ant", "bee") for k in "abc" for i in range(5)],
            "([^/]+/[^/]+)/[^/]+$",
            6,
        ),
        ([f"{c}/{c}_{i:03}.jpg" for c in ("ant", "bee") for i in range(50)], None, 0),  # the name of the class
        ([f"{c}/{i:03}.jpg" for c in ("ant", "bee") for i in range(50)], None, 0),
        ([f"{c}/IMG_{i:04}.jpg" for c in ("ant", "bee") for i in range(50)], None, 0),  # one group
        ([f"{c}/{i * 7919}_{i * 104729:x}.jpg" for c in ("ant", "bee") for i in range(50)], None, 0),  # of one image
        ([f"{c}/patient{i}.jpg" for c in ("ant", "bee") for i in range(50)], "(patient[0-9]+)", 50),
        ([f"{c}/patient{c}{i}.jpg" for c in "12" for i in range(50)], None, 0),  # each patient has one image
    ],
)
def test_patterns_of_file_names(names: list[str], pattern: str | None, groups: int) -> None:
    found = suggest_pattern(images(names), ROOT)
    assert (found and found.pattern, found.num_groups if found else 0) == (pattern, groups)


def test_divided_groups_are_a_warning_and_others_a_note() -> None:
    train = images(f"{c}/patient{p}_{i}.jpg" for c in "ab" for p in range(8) for i in range(3))
    (note,) = describe_groups(train, ROOT, (), dataset="set", split_made=False)
    assert note.severity == "note"
    assert "8 groups of images, such as patient0 of patient0_0.jpg" in note.message
    val = images((f"{c}/patient{p}_9.jpg" for c in "ab" for p in (6, 7, 8)), split="val")
    (warning,) = describe_groups([*train, *val], ROOT, (), dataset="set", split_made=True)
    assert (warning.severity, warning.count) == ("warning", 2 * 2 * 4)
    assert "2 of them have images in more than one split" in warning.message
    assert warning.options == ("--data.group_by '(patient[0-9]+)'",)


def test_many_near_duplicates_suggest_groups() -> None:
    listed = images(f"{c}/{i:03}.jpg" for c in ("ant", "bee") for i in range(50))
    bursts = [DuplicateGroup(images=tuple(listed[k : k + 3]), digests=("a", "b", "c")) for k in (0, 3)]
    (finding,) = describe_groups(listed, ROOT, bursts, dataset="my set", split_made=True)
    assert finding.options[0] == "regraft check 'my set' --groups-csv groups.csv"
    assert finding.message.startswith("6 of 100 images have near-duplicates")
    assert describe_groups(listed, ROOT, bursts[:1], dataset="set", split_made=True) == []
    exact = [DuplicateGroup(images=tuple(listed[:50]), digests=("a",) * 50)]
    assert describe_groups(listed, ROOT, exact, dataset="set", split_made=True) == []
