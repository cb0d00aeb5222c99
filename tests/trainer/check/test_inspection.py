"""What `regraft check` finds in datasets with planted faults."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.folders import image_folder, noise_image
from tests.trainer.check.planted import picture, plant_copies
from trainer.check import images
from trainer.check.findings import CheckResult, Finding
from trainer.check.inspection import inspect, make_result
from trainer.config.sections.data import DataConfig
from trainer.errors import UserError

OF_EACH = 8


def check(root: Path, **options: object) -> CheckResult:
    data = DataConfig(root=str(root), cache=str(root.parent / "cache"), **options)  # type: ignore[arg-type]
    return make_result(inspect(data, workers=2), data)


def findings(result: CheckResult, kind: str) -> list[Finding]:
    return [finding for finding in result.findings if finding.kind == kind]


def write_pictures(folder: Path, seeds: range) -> list[Path]:
    folder.mkdir(parents=True)
    paths = [folder / f"{seed}.jpg" for seed in seeds]
    for seed, path in zip(seeds, paths, strict=True):
        picture(seed).save(path, quality=92)
    return paths


def test_planted_copies_are_found_across_the_splits_and_nothing_else(tmp_path: Path) -> None:
    originals = write_pictures(tmp_path / "data/train/a", range(60))
    write_pictures(tmp_path / "data/train/b", range(100, 140))
    write_pictures(tmp_path / "data/test/b", range(200, 230))
    planted = plant_copies(originals, tmp_path / "data/test/a", of_each=OF_EACH)
    result = check(tmp_path / "data")
    found = {frozenset(image.path for image in group.images): group.kind for group in result.duplicates}
    copies = {kind: {frozenset(map(str, pair)) for pair in pairs.items()} for kind, pairs in planted.items()}
    assert {pair for pair, kind in found.items() if kind == "exact"} == copies.pop("exact")
    assert {pair for pair, kind in found.items() if kind == "near"} == set().union(*copies.values())
    (leakage,) = findings(result, "leakage")
    total = OF_EACH * len(planted) + 30
    assert (leakage.severity, leakage.count) == ("error", OF_EACH * len(planted))
    assert leakage.message.startswith(
        f"{leakage.count} of {total} test images (61.5 %) are copies of training images (8 exact, 40 near), so the "
        "test accuracy is too high: if the model remembers the copies, a true 80.0 % is reported as 92.3 %."
    )


def test_conflicting_labels_repeated_images_and_shared_evaluation_images(tmp_path: Path) -> None:
    for split, label, seeds in (
        ("train", "a", (1, 2, 3, 3)),
        ("train", "b", (3, 4)),
        ("val", "a", (5,)),
        ("test", "a", (5,)),
    ):
        (tmp_path / "data" / split / label).mkdir(parents=True)
        for number, seed in enumerate(seeds):
            picture(seed).save(tmp_path / "data" / split / label / f"{number}.png")
    result = check(tmp_path / "data")
    assert not findings(result, "leakage")
    assert [(f.severity, f.count, len(f.paths)) for f in findings(result, "conflicting-labels")] == [("error", 1, 3)]
    assert [f.count for f in findings(result, "repeated")] == [2]
    assert [f.count for f in findings(result, "shared-evaluation")] == [1]
    assert result.duplicates[0].splits == {"val", "test"}, "groups of several splits come first"


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CheckResult]:
    """Return a dataset with one file of each fault, and its result."""
    root = image_folder(tmp_path_factory.mktemp("faulty") / "data", {"": {"a": 12, "b": 3}})
    folder = root / "a"
    picture(1).save(folder / "cut.jpg")
    (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:-2000])
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not an image")
    (folder / "broken-link.jpg").symlink_to("nowhere")
    os.mkfifo(folder / "pipe.jpg")
    noise_image(107).save(folder / "really-png.jpg", "PNG")
    noise_image(108).convert("RGBA").save(folder / "alpha.png")
    noise_image(109, size=(90, 30)).save(folder / "long.png")
    Image.new("RGB", (50, 50), "red").save(folder / "red.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    picture(3).save(folder / "upright.jpg")
    picture(3).transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif)
    for name in (b"\xff\xfe.png", b"<script>alert(1)<\x1b[31m.png", b"line\nbreak.png"):
        noise_image(sum(name)).save(folder / os.fsdecode(name))
    return root, check(root)


def test_unreadable_files_are_named_with_their_reasons(faulty: tuple[Path, CheckResult]) -> None:
    (unreadable,) = findings(faulty[1], "unreadable")
    names = {Path(path).name for path in unreadable.paths}
    assert names == {"cut.jpg", "empty.png", "text.jpg", "broken-link.jpg", "pipe.jpg"}
    assert unreadable.severity == "error"
    assert f"5 of {faulty[1].num_images} images cannot be read:\n" in unreadable.message
    assert "/a/empty.png: an empty file (0 bytes)\n" in unreadable.message
    assert "\n  and 2 more" in unreadable.message


@pytest.mark.parametrize(
    ("kind", "names"),
    [("wrong-extension", ["really-png.jpg"]), ("one-color", ["red.png"]), ("central-crop", ["long.png"])],
)
def test_one_fault_is_found_once(faulty: tuple[Path, CheckResult], kind: str, names: list[str]) -> None:
    (finding,) = findings(faulty[1], kind)
    assert [Path(path).name for path in finding.paths] == names


def test_an_image_turned_by_its_metadata_is_a_copy_of_the_upright_one(faulty: tuple[Path, CheckResult]) -> None:
    (group,) = faulty[1].duplicates
    assert {Path(image.path).name for image in group.images} == {"upright.jpg", "turned.jpg"}
    assert faulty[1].statistics["width"]["max"] == 200


def test_statistics_count_what_can_be_read(faulty: tuple[Path, CheckResult]) -> None:
    root, result = faulty
    statistics = result.statistics
    total = sum(len(list((root / name).iterdir())) for name in "ab")
    assert result.num_images == total == statistics["readable"] + 5
    assert statistics["formats"] == {"PNG": total - 7, "JPEG": 2}
    assert statistics["modes"] == {"RGB": statistics["readable"] - 1, "RGBA": 1}
    assert sum(entry["count"] for entry in statistics["aspect_ratio_histogram"]) == statistics["readable"]
    assert statistics["aspect_ratio"]["max"] == 3.0


@pytest.mark.parametrize(
    ("splits", "severity", "kind", "message"),
    [
        ({"": {"Cat": 3, "cat": 3}}, "error", "layout", "'Cat' and 'cat' differ only in upper and lower case"),
        ({"": {"Cat": 3, "cat": 3, "CAT ": 3}}, "error", "class-names", "differ only in"),
        ({"": {"e\u0301": 3, "\u00e9": 3}}, "error", "layout", "Unicode encoding of accents"),
        (
            {"train": {"a": 3, "b": 3}, "val": {"a": 1, "c": 1}},
            "error",
            "layout",
            "classes that are not training classes: c",
        ),
        (
            {"train": {"a": 3, "b": 3}, "val": {"a": 1}},
            "warning",
            "class-folders",
            "1 of 2 classes have no image in test",
        ),
        ({"train": {"a": 3}, "val": {"a": 1}}, "error", "layout", "a single class"),
        ({"": {"a": 120, "b": 10}}, "warning", "imbalance", "a has 96 training images, b has 8: 12 times fewer"),
        ({"": {"a": 20, "b": 4}}, "warning", "few-images", "1 of 2 classes have fewer than 10 training images: b"),
    ],
)
def test_classes_that_training_refuses_are_findings(
    tmp_path: Path, splits: dict[str, dict[str, int]], severity: str, kind: str, message: str
) -> None:
    result = check(image_folder(tmp_path / "data", splits))
    matching = [finding for finding in findings(result, kind) if message in finding.message]
    assert [finding.severity for finding in matching] == [severity]
    assert result.num_images == sum(sum(classes.values()) for classes in splits.values()), (
        "images are read all the same"
    )


def test_classes_in_different_formats(tmp_path: Path) -> None:
    for number in range(12):
        for name, extension in (("a", "jpg"), ("b", "png")):
            path = tmp_path / "data" / "train" / name / f"{number}.{extension}"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise_image(number).save(path)
    image_folder(tmp_path / "data", {"val": {"a": 1, "b": 1}})
    (finding,) = findings(check(tmp_path / "data"), "format-by-class")
    assert "(a is JPEG, b is PNG)" in finding.message


def test_a_folder_without_images_and_one_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    result = check(tmp_path / "empty")
    assert (result.num_images, result.duplicates, [f.kind for f in result.findings]) == (0, (), ["layout"])
    with pytest.raises(UserError, match="there is no such folder"):
        check(tmp_path / "nowhere")

    root = image_folder(tmp_path / "data", {"": {"a": 3, "b": 3, "locked": 3}})
    scan = os.scandir

    def scandir(folder: str) -> object:
        if str(folder).endswith("locked"):  # for root, no folder is locked
            raise PermissionError(13, "Permission denied", folder)
        return scan(folder)

    monkeypatch.setattr("os.scandir", scandir)
    result = check(root)
    assert result.num_images == 6
    messages = [finding.message for finding in findings(result, "layout")]
    assert sum("locked: the folder cannot be read (Permission denied)" in message for message in messages) == 1


def test_a_stop_reads_none_of_the_images_that_are_queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(1).save(path := tmp_path / "a.jpg")
    count = 0

    def read(path: str, thumbnail: np.ndarray) -> images.ImageFacts:
        nonlocal count
        count += 1
        return read_image(path, thumbnail)

    def stop(*_: int) -> None:
        raise KeyboardInterrupt

    read_image = images.read_image
    monkeypatch.setattr(images, "read_image", read)
    with pytest.raises(KeyboardInterrupt):
        images.read_images([str(path)] * 3000, workers=2, on_progress=stop)
    assert count < 1000


def test_a_csv_with_a_broken_row(tmp_path: Path) -> None:
    image_folder(tmp_path, {"": {"images": 4}})
    rows = ["path,label", *(f"images/00{number}.png,{'ab'[number % 2]}" for number in range(4))]
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert check(tmp_path / "list.csv").num_images == 4
    (tmp_path / "list.csv").write_text("\n".join([*rows, "images/nowhere.png,a"]))
    result = check(tmp_path / "list.csv")
    assert [(f.kind, f.severity) for f in result.findings] == [("layout", "error")]
