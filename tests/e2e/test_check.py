"""What `regraft check` writes, training reads: without the copies, or with copies in one split, there is no leakage."""

import csv
import json
import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import Options, Train
from tests.trainer.check.planted import picture
from trainer.commands import check


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """Return one folder per class, in which each of a few pictures has two copies: a resized and an equal one."""
    for name, seeds in (("a", range(20)), ("b", range(100, 120))):
        (folder := tmp_path / "data" / name).mkdir(parents=True)
        for seed in seeds:
            picture(seed).save(folder / f"{seed * 7919 % 1009}.png")
        for seed in list(seeds)[:6]:
            picture(seed).resize((100, 75)).save(folder / f"{seed * 7919 % 1009}_small.png")
            shutil.copy(folder / f"{seed * 7919 % 1009}.png", folder / f"{seed * 7919 % 1009}_same.png")
    return tmp_path / "data"


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(errors="surrogateescape", newline="") as stream:
        return list(csv.DictReader(stream))


def kinds(words: list[str], report: Path) -> dict[str, int]:
    """Return finding -> count of what `regraft check` finds."""
    assert check.main([*words, "--json", str(report), "--fail-on", "never"]) == 0
    return {finding["kind"]: finding["count"] for finding in json.loads(report.read_text())["findings"]}


def test_without_the_images_of_exclude_csv_nothing_leaks(
    copied: Path, options: Options, train: Train, tmp_path: Path
) -> None:
    with Image.open(copied / "a" / "0.png") as image:  # of another class: no one knows which label is right
        image.save(copied / "b" / os.fsdecode(b"caf\xe9 \xff.png"))
    excluded = tmp_path / "exclude.csv"
    found = kinds([str(copied), "--exclude-csv", str(excluded)], tmp_path / "check.json")
    assert {"leakage", "repeated", "conflicting-labels"} <= found.keys()
    output = train(0, options(data__root=copied, data__exclude=excluded, train__epochs=1))
    assert "images left out by data.exclude" in output
    again = tmp_path / "again.csv"
    words = [str(copied), "--data.exclude", str(excluded), "--exclude-csv", str(again)]
    assert not {"leakage", "repeated", "conflicting-labels"} & kinds(words, tmp_path / "check.json").keys()
    paths, again_paths = (sorted(row["path"] for row in rows(file)) for file in (excluded, again))
    assert again_paths == paths, "one list takes the place of the other"


def test_with_the_groups_of_groups_csv_nothing_leaks(
    copied: Path, options: Options, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert {"leakage", "groups"} <= kinds(["data", "--groups-csv", "groups.csv"], tmp_path / "check.json").keys()
    lines = Path("groups.csv").read_text().splitlines()
    assert lines[0] == '"path","label","group"'
    assert all(line.startswith('"data/') for line in lines[1:]), "the folder can be moved with its CSV"
    output = train(0, options(data__root="groups.csv", train__epochs=1))
    assert "groups of the CSV: 12 of 36 images" in output
    assert not {"leakage", "groups"} & kinds(["groups.csv"], tmp_path / "check.json").keys()
