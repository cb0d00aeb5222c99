"""Images sorted into class folders."""

from pathlib import Path
from typing import Any

import pytest

from trainer.errors import UserError
from trainer.inference.answers import Prediction
from trainer.inference.rows import Row
from trainer.inference.sort_into import ImageSorter, class_folders


def row(path: Path, label: str = "a", *, is_unknown: bool = False) -> Row:
    return Row(str(path), Prediction((label,), (0.9,), is_unknown))


@pytest.fixture
def sources(tmp_path: Path) -> list[Path]:
    """Create three images of the same name."""
    paths = [tmp_path / folder / "x.jpg" for folder in ("one", "two", "three")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(path.parent.name)
    return paths


def test_class_names_become_names_of_folders() -> None:
    classes = [
        "ant",
        "../../etc",
        "a/b",
        "a_b",
        "A_B",
        ".hidden",
        "two\nlines",
        "",
        " ",
        "猫",
        "x" * 300,
        "\ud800\udcff",
    ]
    names = class_folders(classes)
    assert list(names) == classes
    assert list(names.values())[:10] == [
        "ant", "__.._etc", "a_b", "a_b-2", "A_B-3", "_hidden", "two_lines", "_", "_-2", "猫",
    ]  # fmt: skip
    assert len({name.casefold() for name in names.values()}) == len(classes)
    for name in names.values():
        assert "/" not in name
        assert name not in ("", ".", "..")
        assert len(name.encode("utf-8", "surrogateescape")) <= 210


@pytest.mark.parametrize("mode", ["copy", "symlink", "hardlink"])
def test_nothing_is_overwritten_and_a_second_time_nothing_is_added(
    mode: Any, sources: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "sorted"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "x.jpg").write_text("the user's")
    for _ in range(2):
        sorter = ImageSorter(folder, ["a", "b/c"], mode)
        for path in sources[:2]:
            sorter.add(row(path))
        sorter.add(row(sources[2], "b/c"))
        sorter.add(row(sources[2], is_unknown=True))
        sorter.add(Row("missing.jpg", None, "no such file"))
        found = {str(path.relative_to(folder)): path for path in folder.rglob("*") if not path.is_dir()}
        assert {name: path.read_text() for name, path in found.items()} == {
            "a/x.jpg": "the user's", "a/x-2.jpg": "one", "a/x-3.jpg": "two", "b_c/x.jpg": "three",
            "unknown/x.jpg": "three",
        }  # fmt: skip
        assert found["a/x-2.jpg"].is_symlink() == (mode == "symlink")
        assert found["a/x-2.jpg"].samefile(sources[0]) == (mode != "copy")
    assert [path.read_text() for path in sources] == ["one", "two", "three"]


def test_what_cannot_be_written_is_an_error(sources: list[Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file: the folder cannot be created"):
        ImageSorter(tmp_path / "file", ["a"], "copy")
    sorter = ImageSorter(tmp_path / "sorted", ["a"], "copy")
    (tmp_path / "sorted" / "a").touch()
    with pytest.raises(UserError, match=r"x.jpg cannot be written to .*sorted/a \("):
        sorter.add(row(sources[0]))
    (tmp_path / "sorted" / "a").unlink()
    with pytest.raises(UserError, match=r"gone.jpg cannot be written to .*\(No such file or directory\)"):
        sorter.add(row(tmp_path / "gone.jpg"))
    assert not [path for path in (tmp_path / "sorted").rglob("*") if path.is_file()]


def test_a_name_that_is_almost_all_extension_is_kept(tmp_path: Path) -> None:
    source = tmp_path / f"x.{'y' * 240}"
    source.write_text("one")
    ImageSorter(tmp_path / "sorted", ["a"], "copy").add(row(source))
    assert [path.read_text() for path in (tmp_path / "sorted" / "a").iterdir()] == ["one"]
