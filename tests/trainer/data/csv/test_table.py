import os
from pathlib import Path
from typing import Any

import pytest

from trainer.data.csv.table import TableFormat, read_table
from trainer.data.index import DatasetIndex
from trainer.data.read_index import read_index
from trainer.errors import UserError

HEADER = "path,label,split\n"


def make_csv(folder: Path, text: str | bytes, *, images: str = "a1 a2 a3 b1 b2 b3") -> Path:
    """Write a CSV and empty image files beside it."""
    for name in images.split():
        (folder / f"{name}.jpg").touch()
    file = folder / "list.csv"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return file


def read(file: Path, *, val_fraction: float = 0.0, table: TableFormat | None = None) -> DatasetIndex:
    return read_index(file, val_fraction=val_fraction, test_fraction=0.4, seed=0, extensions=(".png",), table=table)


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
        + f"b1.jpg,b,later\n./a1.jpg,a,test\n{tmp_path}/folder.jpg,b,train\nb2.jpg,b\n"
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
        "  line 7: the split is 'later', expected train, val or test",
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
        ("", r"no column for the path and the label is recognized.*first line is empty"),
        ("a1.jpg,a\n", r"Expected a CSV with the columns path, label .* first line is a1\.jpg, a"),
        ("path,label,path\na1.jpg,a,a1.jpg\n", "several columns may be the path: path, path"),
        ("image,class,category\n", r"several columns may be the label: class, category.*data\.csv_columns"),
        ("filename,width\na1.jpg,1\n", r"no column for the label is recognized\. .*\{path: filename, label: CLASS\}"),
        ("gs://bucket/a1.jpg,a\n", "The first line seems to be a row: put a line with the names"),
        ("path,label,split\na1.jpg,a,0\na2.jpg,a,1\n", "line 2: the split is '0', expected train, val or test"),
        (
            "path,label,type,stage\na1.jpg,a,train,train\na2.jpg,a,val,val\n",
            "several columns may be the split: type, st",
        ),
        ("path,label\nx/deep/a1.jpg,a\n", r"a1\.jpg exists, but in another folder: correct the paths"),
        ("path,label\nhttp://x.org/a1.jpg,a\n", r"(?s)a URL, but images must be files.*set data\.csv_root to "),
        ("filename,cat,dog\na1.jpg,1,0\na2.jpg,1,1\n", r"line 3: no column for .* 2 of these classes \(cat, dog\)"),
        ("path,label\n", "there are no rows after the header"),
        (
            "path,label\n" + "".join(f"gone{i}.jpg,a\n" for i in range(25)),
            r"(?s)25 problems(?!.*gone10\.jpg).*gone9\.jpg.*\n  and 15 more",
        ),
        ("path,label\na1.jpg,a\na2.jpg,a \nb1.jpg,b\n", "the classes 'a' and 'a ' differ only in spaces"),
        ("path,label,split\na1.jpg,a,test\n", "no row has the split train"),
        (
            'path,label\na1.jpg,#N/A\na2.jpg,\na3.jpg,"  "\n',
            r"(?s)line 2: the label is #N/A, .*3: .*empty.*4: .* of spaces",
        ),
        ("path,label\na1.jpg ,a\n", r"no such file: '.*/a1\.jpg ' \(the path begins .* one without the spaces\)"),
        ("path,label\nC:\\data\\a1.jpg,a\n", r"C:\\data\\a1\.jpg \(a path of Windows"),
        ("path,label\nA1.JPG,a\n", "(?s)A1.JPG\n.*/a1.jpg exists, which differs in case"),
        ("id,breed\na1,a\n", r"(?s)/a1\n.*a1\.jpg exists: set data\.csv_root to .* and data\.csv_suffix to \.jpg"),
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


IDS = "id;breed\na1;a\na2;a\nb1;b\nb2;b\n"


@pytest.mark.parametrize(
    ("text", "options", "note"),
    [
        ("path;label\na1.jpg;a\na2.jpg;a\nb1.jpg;b\nb2.jpg;b\n", {}, "4 images"),
        ("path\tlabel\na1.jpg\ta\na2.jpg\ta\nb1.jpg\tb\nb2.jpg\tb\n", {}, "4 images"),
        ("path|label\na1.jpg|a\na2.jpg|a\nb1.jpg|b\nb2.jpg|b\n", {}, "4 images"),
        ("sep=;\nclass;file name\na;a1.jpg\na;a2.jpg\nb;b1.jpg\nb;b2.jpg\n", {}, "path: file name, label: class"),
        ("\n\nimage_id,ClassId\na1.jpg,a\na2.jpg,a\nb1.jpg,b\nb2.jpg,b\n", {}, "path: image_id, label: ClassId"),
        ("path,label\n.\\a1.jpg,a\n.\\a2.jpg,a\n.\\b1.jpg,b\n.\\b2.jpg,b\n", {}, "4 images"),
        (IDS, {"suffix": ".jpg"}, "path: id, label: breed"),
        (IDS, {"suffix": ".jpg", "root": ".."}, "4 images"),  # found by name below the folder
        ("x,y,z\na1.jpg,,a\na2.jpg,,a\nb1.jpg,,b\nb2.jpg,,b\n", {"columns": {"path": "x", "label": "Z"}}, "ignored: y"),
        # columns of one-hot labels: Roboflow, ISIC
        ("filename, a, b\na1.jpg, 1, 0\na2.jpg, 1, 0\nb1.jpg, 0, 1\nb2.jpg, 0, 1\n", {}, "that are classes: a, b"),
        ("image,a,c,b\na1,1.0,0.0,0.0\na2,1.0,0.0,0.0\nb1,0.0,0.0,1.0\nb2,0.0,0.0,1.0\n", {"suffix": ".jpg"}, "a, c"),
        # spaces; commas in a header with semicolons; empty fields and rows
        ("path label\na1.jpg a\na2.jpg a\nb1.jpg b\nb2.jpg b\n", {}, "4 images"),
        ("path;label;size (w,h,d,e)\na1.jpg;a;0,5\na2.jpg;a;1,5\nb1.jpg;b;2\nb2.jpg;b;3,5\n", {}, "size (w,h,d,e)"),
        ("path,label,,\na1.jpg,a\na2.jpg,a,\nb1.jpg,b,,\n,,\nb2.jpg,b,,,,\n", {}, "4 images"),
        # paths of another machine
        ("path,label\n/x/img/a1.jpg,a\n/x/img/a2.jpg,a\n/x/img/b1.jpg,b\n/x/img/b2.jpg,b\n", {"root": "."}, "4 images"),
        ("path,label\nC:\\x\\a1.jpg,a\nC:\\x\\a2.jpg,a\nC:\\x\\b1.jpg,b\nC:\\x\\b2.jpg,b\n", {"root": "../img"}, "4 i"),
        ("id,label,dataset\na1.jpg,a,rosendahl\na2.jpg,a,vidir\nb1.jpg,b,x\nb2.jpg,b,y\n", {}, "ignored: dataset"),
    ],
)  # fmt: skip
def test_csv_of_another_form_is_read(tmp_path: Path, text: str, options: dict[str, Any], note: str) -> None:
    (tmp_path / "img").mkdir()
    index = read(make_csv(tmp_path / "img", text), table=TableFormat(**options))
    assert (index.classes, sorted(names((*index.train, *index.test)))) == (("a", "b"), ["a1", "a2", "b1", "b2"])
    assert any(note in text for text in index.notes)


def test_splits_of_a_csv_have_any_common_spelling(tmp_path: Path) -> None:
    rows = [
        "a1.jpg,a,Training",
        "b1.jpg,b,train_set",
        "a2.jpg,a,dev",
        "b2.jpg,b,eval",
        "a3.jpg,a,TESTING",
        "b3.jpg,,pred",
    ]
    index = read(make_csv(tmp_path, "filepaths,labels,data set\n" + "\n".join(rows)))
    assert [names(split) for split in (index.train, index.val, index.test)] == [["a1", "b1"], ["a2", "b2"], ["a3"]]
    assert any("split has no labels, ignored: 1" in note for note in index.notes)


@pytest.mark.parametrize(
    ("column", "values", "sizes", "note"),
    [
        ("is_valid", "False False True False False True", (4, 0, 2), "is_valid marks val"),  # fastai
        ("is_train", "1 1 0 1 1 0", (4, 0, 2), "is_train marks train"),
        ("is_val,is_test", "0,0 1,0 0,1 0,0 1,0 0,1", (2, 2, 2), "is_val marks val, is_test marks test"),
        ("partition", "0 0 1 0 0 2", (4, 1, 1), "0 is train, 1 is val, 2 is test"),  # CelebA
        ("set", "1.0 1.0 2.0 1.0 1.0 3.0", (4, 1, 1), "1.0 is train, 2.0 is val, 3.0 is test"),
        ("ML use", "TRAIN TRAIN VALIDATE TRAIN TRAIN TEST", (4, 1, 1), "split: ML use"),
        # an image that is not damaged; folds
        ("is_valid", "1 1 1 1 0 1", (4, 0, 2), "ignored: is_valid"),
        ("fold", "0 1 2 0 1 2", (4, 0, 2), "ignored: fold"),
    ],
)
def test_split_is_found_by_the_values_of_a_column(
    tmp_path: Path, column: str, values: str, sizes: tuple[int, ...], note: str
) -> None:
    images = ["a1", "a2", "a3", "b1", "b2", "b3"]
    rows = "".join(f"{name}.jpg,{name[0]},{value}\n" for name, value in zip(images, values.split(), strict=True))
    index = read(make_csv(tmp_path, f"path,label,{column}\n{rows}"))
    assert (len(index.train), len(index.val), len(index.test)) == sizes
    assert any(note in text for text in index.notes)


def test_paths_of_another_machine_have_one_root(tmp_path: Path) -> None:
    for name in ("cats/1.jpg", "dogs/1.jpg"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    file = make_csv(tmp_path, "path,label\n/content/cats/1.jpg,a\n/content/dogs/1.jpg,b\n", images="")
    assert [Path(row.path).parent.name for row in read_table(file, TableFormat(root="."))[0]] == ["cats", "dogs"]
    with pytest.raises(UserError, match=r"line 3: no such file: /content/dogs/1\.jpg"):
        read_table(file, TableFormat(root="cats"))
    with pytest.raises(UserError, match=rf"cats/1\.jpg exists: set data\.csv_root to {tmp_path}\n"):
        read_table(file)


def test_no_split_divides_a_group(tmp_path: Path) -> None:
    images = [f"{c}{i}" for c in "ab" for i in range(30)]
    lines = [f"{name}.jpg,{name[0]},patient {int(name[1:]) // 5}\n" for name in images]
    file = make_csv(tmp_path, "path,label,who\n" + "".join(lines), images=" ".join(images))
    index = read(file, val_fraction=0.3, table=TableFormat(columns={"group": "who"}))
    patients = [{int(name[1:]) // 5 for name in names(split)} for split in (index.train, index.val, index.test)]
    assert all(patients)
    assert sum(map(len, patients)) == len(set().union(*patients)) == 6
    # The only image of class c is in one of the groups, which is never held out.
    file = make_csv(tmp_path, "path,label,who\nc.jpg,c,patient 0\n" + "".join(lines), images="c")
    assert "c" in names(read(file, table=TableFormat(columns={"group": "who"})).train)
    with_split = make_csv(tmp_path, "path,label,split,who\na1.jpg,a,train,x\nb1.jpg,b,train,y\na2.jpg,a,test,x\n")
    notes = read(with_split, table=TableFormat(columns={"group": "who"})).notes
    assert any("groups with images in more than one split" in note and "1 of 2" in note for note in notes)


@pytest.mark.parametrize(
    ("header", "groups"),
    [
        ("path,label,group", 6),
        ("path,label,Group_ID", 6),
        ("path,group,who", 0),  # the option says that it is the label
        ("path,label,patient", 0),  # it may be a number of visits
    ],
)
def test_a_column_called_group_is_used(tmp_path: Path, header: str, groups: int) -> None:
    images = [f"{c}{i}" for c in "ab" for i in range(30)]
    lines = [f"{name}.jpg,{name[0]},patient {int(name[1:]) // 5}\n" for name in images]
    file = make_csv(tmp_path, f"{header}\n" + "".join(lines), images=" ".join(images))
    columns = {"label": "group"} if ",group," in header else {}
    index = read(file, table=TableFormat(columns=columns))
    assert len({*index.groups.values()}) == groups
    assert any(f"groups of the CSV: {groups} of 60 images" in note for note in index.notes) == bool(groups)


def test_a_column_called_group_may_hold_the_split(tmp_path: Path) -> None:
    file = make_csv(tmp_path, "path,label,group\na1.jpg,a,train\nb1.jpg,b,train\na2.jpg,a,test\nb2.jpg,b,test\n")
    index = read(file)
    assert (len(index.train), len(index.test), index.groups) == (2, 2, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"columns": {"label": "race"}}, "data.csv_columns says label: race, but no column has this name"),
        ({"columns": {"split": "breed"}}, "one column has two roles"),
        ({"root": "nowhere"}, "data.csv_root is nowhere: there is no such folder"),
        ({"root": ".", "suffix": ".jpg"}, r"2 files have this name: .*one/a1\.jpg, .*two/a1\.jpg"),
    ],
)
def test_options_that_do_not_fit_the_csv_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a1.jpg").touch()
    with pytest.raises(UserError, match=message):
        read(make_csv(tmp_path, IDS, images=""), table=TableFormat(**options))
