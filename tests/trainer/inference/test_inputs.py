"""The images that words of a command line name."""

import io
from collections.abc import Sequence
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.inference.inputs import ImageLister

EXTENSIONS = (".jpg", ".png")


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create a folder with images and other files, and make its parent the working folder."""
    for name in ("b.jpg", "a.PNG", "sub/c.jpg", "sub/deep/d [1].jpg", "sub/notes.txt", ".hidden.jpg", "empty/x.txt"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "list.csv").write_text("image,size\nphotos/b.jpg,3\n\n'missing, too'.jpg,4\n", encoding="utf-8")
    (tmp_path / "two.csv").write_text('\ufeffpath;"the file"\nx;"photos/b.jpg"\n', encoding="utf-8")
    (tmp_path / "loop").symlink_to("loop")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "photos"


ALL = ["photos/a.PNG", "photos/b.jpg", "photos/sub/c.jpg", "photos/sub/deep/d [1].jpg"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["photos"], ALL),
        (["photos/"], ALL),
        (["photos/sub", "photos/b.jpg"], [*ALL[2:], "photos/b.jpg"]),
        (["photos/*.jpg"], ["photos/b.jpg"]),
        (["photos/**/*.jpg"], ALL[1:]),
        (["photos/su*"], ALL[2:]),
        (["photos/sub/deep/d [1].jpg"], ALL[3:]),
        (["loop"], ["loop"]),
        (["photos/sub/notes.txt"], ["photos/sub/notes.txt"]),
        (["-"], ["photos/b.jpg", "no such file.jpg", "w\udcff.jpg"]),
        (["list.csv"], ["photos/b.jpg", "'missing"]),
    ],
    ids=str,
)
def test_words_name_images(words: Sequence[str], expected: list[str], photos: Path) -> None:
    stdin = io.BytesIO(b"\xef\xbb\xbfphotos/b.jpg\r\n\nno such file.jpg\nw\xff.jpg")
    paths, _ = ImageLister(EXTENSIONS).find(words, stdin)
    assert paths == expected
    assert photos.is_dir()


def test_a_list_between_null_bytes_keeps_line_ends(photos: Path) -> None:
    paths, _ = ImageLister(EXTENSIONS).find(["-"], io.BytesIO(b"a\nb.jpg\0c.jpg\0"))
    assert paths == ["a\nb.jpg", "c.jpg"]


def test_a_column_of_a_csv_is_named(photos: Path) -> None:
    paths, _ = ImageLister(EXTENSIONS, column="the file").find([str(photos.parent / "two.csv")], None)
    assert paths == [f"{photos.parent}/photos/b.jpg"]


def test_notes_tell_what_is_left_out(photos: Path) -> None:
    paths, notes = ImageLister(EXTENSIONS, excluded=Path("photos/sub")).find(["photos", "photos/b.jpg"], None)
    assert paths == ALL[:2]
    assert notes == [
        "other files in the folders, which are ignored: 2 .txt",
        "images that are named more than once, predicted once: 1",
    ]


@pytest.mark.parametrize(
    ("words", "column", "message"),
    [
        (["nothing"], None, "^nothing: No such file or directory; expected images, folders, patterns"),
        (["photos/*.gif"], None, r"^photos/\*.gif: no file matches; expected"),
        (["photos/b.jpg/x"], None, "Not a directory"),
        (["a\0b"], None, r"a\\x00b: .*null"),
        (["photos/empty"], None, r"^photos/empty: no images \(other files: 1 .txt\); expected"),
        (["-"], None, "^-: no images; expected"),
        (["list.csv"], "size2", "^list.csv: --column size2: no column has this name. Its first line has image, size"),
        (["two.csv"], "nothing", "no column has this name"),
        (["bad.csv"], None, "^bad.csv: no column is recognized to hold the paths"),
        (["empty-path.csv"], None, "^empty-path.csv, line 2: the path is empty"),
        (["binary.csv"], None, "^binary.csv, line 1: a NUL byte"),
        (["empty.csv"], None, "^empty.csv: no column is recognized"),
    ],
)
def test_words_that_name_nothing_are_errors(words: list[str], column: str | None, message: str, photos: Path) -> None:
    Path("bad.csv").write_text("x,y\n1,2\n")
    Path("empty-path.csv").write_text("path,y\n,2\n")
    Path("binary.csv").write_bytes(b"\0\1")
    Path("empty.csv").write_bytes(b"")
    with pytest.raises(UserError, match=message):
        ImageLister(EXTENSIONS, column=column).find(words, io.BytesIO(b"\n \n"))
