"""Labeled images of any layout, and the match of their classes with those of a model."""

import csv
from pathlib import Path

import pytest

from tests.folders import image_folder
from trainer.config.sections.data import DataConfig
from trainer.errors import UserError
from trainer.evaluation.class_mapping import map_classes, parse_mapping
from trainer.evaluation.labeled_images import list_images, list_labeled_images

MODEL = ("ant", "bee", "a=b", "cat, small\n", "caf\xe9")
OPTIONS = DataConfig()


@pytest.mark.parametrize(
    ("names", "texts", "expected"),
    [
        (["bee", "ant"], [], {"bee": 1, "ant": 0}),
        (["bee"], [], {"bee": 1}),
        (["Bee", "wasp"], ["Bee=bee", "wasp="], {"Bee": 1, "wasp": None}),
        (["bee", "ant"], ["bee=ant"], {"bee": 0, "ant": 0}),
        (["x=y"], ["x=y=a=b"], {"x=y": 2}),
        (["x=y"], ["x=y=cat, small\n"], {"x=y": 3}),
        (["a=b", "c"], ["c="], {"a=b": 2, "c": None}),
    ],
)
def test_labels_are_found_by_name(names: list[str], texts: list[str], expected: dict[str, int | None]) -> None:
    assert map_classes(names, MODEL, parse_mapping(texts, names, MODEL)) == expected


@pytest.mark.parametrize(
    ("names", "texts", "message"),
    [
        (["ant", "Bee"], [], r"1 of 2 classes of the data are not classes of the model:\n  Bee \(did you mean bee\?\)"),
        (["ant", "w\n"], [], r"\n  w\\n\nThe model's classes are ant, bee, a=b, cat, small\\n, café\. Give --map"),
        (["ant"], ["ant"], "--map ant: expected NAME=CLASS, or NAME= to leave a class out"),
        (["ant"], ["wasp=bee"], "--map wasp=bee: the data have no class wasp; their classes are ant"),
        (["wasp"], ["wasp=Be"], r"--map wasp=Be: the model has no class Be \(did you mean bee\?\)"),
        (["ant"], ["ant=bee", "ant="], "--map: ant is given twice, with different classes"),
        (
            ["cafe\u0301"],
            [],
            r"\n  caf.* \('cafe\\u0301' and 'caf\\xe9' differ only in the Unicode encoding of accents",
        ),
        (["ant"], ["ant="], "--map leaves out every class of the data"),
        ([str(number) for number in range(12)], [], r"12 of 12 classes .*\n  9\n  and 2 more"),
    ],
)
def test_other_classes_are_an_error(names: list[str], texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=f"(?s){message}"):
        map_classes(names, MODEL, parse_mapping(texts, names, MODEL))


def test_images_of_a_folder_of_classes_or_of_a_split(tmp_path: Path) -> None:
    flat = image_folder(tmp_path / "flat", {"": {"b": 2, "a": 1}})
    listed = list_labeled_images(flat, None, options=OPTIONS)
    assert (listed.split, listed.classes) == ("all", ["a", "b"])
    assert listed.images == tuple((str(flat / name), name[0]) for name in ("a/000.png", "b/000.png", "b/001.png"))
    divided = image_folder(tmp_path / "divided", {"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 1}, "test": {"b": 2}})
    counts = {
        split: len(list_labeled_images(divided, split, options=OPTIONS).images) for split in ("train", "val", None)
    }
    assert counts == {"train": 6, "val": 2, None: 2}
    assert list_labeled_images(divided, None, options=OPTIONS).split == "test"
    with pytest.raises(UserError, match=r"has no image of the split holdout; it has the splits test, train, val"):
        list_labeled_images(divided, "holdout", options=OPTIONS)
    with pytest.raises(UserError, match=r"flat: has no image of the split val; it is not divided into splits"):
        list_labeled_images(flat, "val", options=OPTIONS)


def test_images_of_a_csv(tmp_path: Path) -> None:
    image_folder(tmp_path, {"": {"x": 3}})
    rows = [("x/000.png", "b,\n1", "test"), ("x/001.png", "a", "test"), ("x/002.png", "a", "train")]
    for name, width in (("split.csv", 3), ("plain.csv", 2)):
        with (tmp_path / name).open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "split")[:width], *(row[:width] for row in rows)])
    listed = list_labeled_images(tmp_path / "split.csv", None, options=OPTIONS)
    assert listed.images == ((str(tmp_path / "x/001.png"), "a"), (str(tmp_path / "x/000.png"), "b,\n1"))
    assert list_labeled_images(tmp_path / "plain.csv", None, options=OPTIONS).split == "all"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "x: there is no such folder or CSV file"),
        (lambda path: path.mkdir(), "x: holds no folders and no images"),
        (
            lambda path: path.write_text("path,label\nmissing.png,a\n"),
            r"x: 1 problem in the rows:\n  line 2: .*missing.png",
        ),
        (lambda path: path.write_bytes(b"\0\1\2"), "x"),
    ],
)
def test_data_that_cannot_be_listed_are_an_error(tmp_path: Path, make: object, message: str) -> None:
    make(tmp_path / "x")  # type: ignore[operator]
    with pytest.raises(UserError, match=message) as error:
        list_labeled_images(tmp_path / "x", None, options=OPTIONS)
    assert not str(error.value).startswith("data.root")


def test_unlabeled_images_are_listed_from_all_subfolders(tmp_path: Path) -> None:
    image_folder(tmp_path, {"": {"x": 1, "y/z": 2}})
    assert len(list_images(tmp_path, options=OPTIONS)) == 3
    for folder in (tmp_path / "missing", tmp_path / "x/000.png"):
        with pytest.raises(UserError, match="there is no such folder"):
            list_images(folder, options=OPTIONS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no image"):
        list_images(tmp_path / "empty", options=OPTIONS)
