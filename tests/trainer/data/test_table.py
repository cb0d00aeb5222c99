import os
from pathlib import Path

import pytest

from trainer.data.index import DatasetIndex, read_index
from trainer.data.table import read_table
from trainer.errors import UserError

HEADER = "path,label,split\n"


def make_csv(folder: Path, text: str | bytes, *, images: str = "a1 a2 a3 b1 b2 b3") -> Path:
    """Write a CSV and empty image files beside it."""
    for name in images.split():
        (folder / f"{name}.jpg").touch()
    file = folder / "list.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def read(file: Path, *, val_fraction: float = 0.0, test_fraction: float = 0.4) -> DatasetIndex:
    return read_index(file, val_fraction=val_fraction, test_fraction=test_fraction, seed=0, extensions=(".png",))


def names(examples: tuple[tuple[str, int], ...]) -> list[str]:
    return [Path(path).stem for path, _ in examples]


ROWS = ["a1.jpg,a,train", "b1.jpg,b,train", "a2.jpg,a,{}", "b2.jpg,b,{}", "a3.jpg,a,test", "b3.jpg,b,test"]


@pytest.mark.parametrize("word", ["val", "valid", " VALIDATION "])
def test_splits_are_those_of_the_csv(tmp_path: Path, word: str) -> None:
    index = read(make_csv(tmp_path, HEADER + "\n".join(ROWS).format(word, word)))
    assert index.classes == ("a", "b")
    splits = [names(split) for split in (index.train, index.val, index.test)]
    assert splits == [["a1", "b1"], ["a2", "b2"], ["a3", "b3"]]
    assert (index.val_split, index.reported, index.split_made) == ("val", "the CSV's test rows", False)
    assert index.root == tmp_path
    assert index.notes == ("6 images listed in list.csv",)
    index = read(make_csv(tmp_path, HEADER + "\n".join(ROWS[:4]).format(word, word)))
    assert (names(index.test), index.val, index.reported) == (["a2", "b2"], (), "the CSV's val rows")


def test_split_made_without_the_column_does_not_depend_on_row_order(tmp_path: Path) -> None:
    rows = [(f"{c}{i}.jpg", c) for c in "ab" for i in range(1, 21)]
    images = " ".join(path[:-4] for path, _ in rows)
    lines = [f"{path},{label}\n" for path, label in rows]
    one = read(make_csv(tmp_path, "path,label\n" + "".join(lines), images=images), val_fraction=0.5)
    lines = [f"{label},{path}\n" for path, label in reversed(rows)]
    other = read(make_csv(tmp_path, "label,path\n" + "".join(lines)))
    assert (len(one.train), len(one.val), len(one.test)) == (12, 12, 16)
    assert (one.split_made, one.reported) == (True, "a split of 40 %")
    assert set(one.test) == set(other.test)


def test_paths_are_absolute_or_relative_to_the_csv_with_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "in here"
    (folder / "deep").mkdir(parents=True)
    not_utf8 = os.fsdecode(b"caf\xe9.jpg")
    paths = [folder / "deep/猫 1.jpg", tmp_path / "beside", folder / "x.dat", folder / not_utf8]
    for path in paths:
        path.touch()
    (folder / "hard link").hardlink_to(tmp_path / "beside")
    text = f"path,label\ndeep/猫 1.jpg,a\n../beside,a\n{folder / 'x.dat'},b\n{not_utf8},b\nhard link,b\n"
    rows, _ = read_table(make_csv(folder, os.fsencode(text)))
    monkeypatch.chdir(folder)
    assert [Path(row.path).resolve() for row in rows] == [*paths, folder / "hard link"]
    assert {row.split for row in rows} == {None}


def test_bom_case_spaces_quotes_and_extra_columns_are_accepted(tmp_path: Path) -> None:
    lines = ["\ufeffPath, Label ,SPLIT,size", "a1.jpg, a, train,3", "", '"a2.jpg","a",test,']
    lines += ["b1.jpg, b,Train,4", 'b2.jpg,"b",TEST,5']
    index = read(make_csv(tmp_path, "\r\n".join(lines)))
    assert (index.classes, names(index.train), names(index.test)) == (("a", "b"), ["a1", "b1"], ["a2", "b2"])
    assert any("ignored: size" in note for note in index.notes)


def test_invalid_rows_are_listed_by_line(tmp_path: Path) -> None:
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "a1.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    text = (
        HEADER
        + "a1.jpg,a,train\ngone.jpg,a,train\na2.jpg,,train\n"
        + '"b\n1.jpg",b,train\n'  # one row on two lines
        + f"b1.jpg,b,dev\n./a1.jpg,a,test\n{tmp_path}/folder.jpg,b,train\nb2.jpg,b\n"
        + ",b,train\nlink.jpg,b,train\npipe.jpg,b,train\n"
    )
    with pytest.raises(UserError) as caught:
        read_table(make_csv(tmp_path, text))
    lines = str(caught.value).splitlines()
    assert "10 problems in the rows" in lines[0]
    assert lines[1:-1] == [
        f"  line 3: no such file: {tmp_path}/gone.jpg",
        "  line 4: the label is empty",
        f"  line 5: no such file: {tmp_path}/b\\n1.jpg",
        "  line 7: the split is 'dev', expected train, val or test",
        "  line 8: ./a1.jpg is already on line 2 with split train, here test",
        f"  line 9: no such file: {tmp_path}/folder.jpg",
        "  line 10: 2 fields, expected 3 as in the header",
        "  line 11: the path is empty",
        "  line 12: link.jpg is already on line 2 with label a",
        f"  line 13: no such file: {tmp_path}/pipe.jpg",
    ]
    assert "Each row needs the path" in lines[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expected a CSV with the header path,label.*first line is empty"),
        ("a1.jpg,a\n", r"first line is a1\.jpg, a"),
        ("path;label\na1.jpg;a\n", r"separated by commas; its first line is path;label"),
        ("path,label,path\na1.jpg,a,a1.jpg\n", "duplicate columns: path"),
        ("path,label\n", "there are no rows after the header"),
        (
            "path,label\n" + "".join(f"gone{i}.jpg,a\n" for i in range(25)),
            r"(?s)25 problems(?!.*gone10\.jpg).*gone9\.jpg.*\n  and 15 more",
        ),
        ("path,label\na1.jpg,a\na2.jpg,a \nb1.jpg,b\n", "the labels 'a' and 'a ' differ only in spaces"),
        ("path,label,split\na1.jpg,a,test\n", "no row has the split train"),
        (HEADER + "a1.jpg,a,train\nb1.jpg,b,train\nb2.jpg,c,test\n", "classes that are not training classes: c"),
        ("path,label\na1.jpg,a\na2.jpg,a\n", "a single class, a, in the CSV's train rows"),
        ('path,label\na1.jpg,a\n"a2.jpg"x,a\n', r"line 3: not a row of a CSV .* double the quotes in it"),
        ('path,label\na1.jpg,a\n"a2.jpg,a\nb1.jpg,b\n', r"line 3: not a row of a CSV"),
        ("path,label\n" + "x" * 200_000 + ",a\n", r"line 2: not a row of a CSV \(field larger"),
        ("path,label\n" + "x" * 3_000_000, r"line 2: more than 1,048,576 characters"),
        ("path,label\na1.jpg,a\na2.jpg,\0\n", r"line 3: a NUL byte, so this is not a CSV in UTF-8"),
        ("path,label\na1.jpg,a\n".encode("utf-16"), r"line 1: a NUL byte.*save it as 'CSV UTF-8'"),
        (b"PK\x03\x04\x14\x00\x00\x00", r"line 1: a NUL byte.*extract an archive first"),
        (b"\xff\xd8\xff\xe0JFIF\n", r"line 1: not UTF-8"),
        ("path,label\na1.jpg,caf\u00e9\n".encode("latin-1"), r"line 2: not UTF-8"),
        ("path,label\ncaf\u00e9.jpg,a\n".encode("latin-1"), r"line 2: no such file: .*caf\\xe9.*saved as UTF-8\?"),
    ],
)
def test_invalid_csv_is_refused(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(make_csv(tmp_path, text))
