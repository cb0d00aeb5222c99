import errno
import io
import os
import random
import signal
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from trainer.data import unpack as module
from trainer.data.unpack import is_whole, unpack, unpack_whole
from trainer.errors import UserError

# Offsets in a member's record of the central directory.
FLAGS, METHOD, CRC, SIZE, OFFSET = (8, "<H"), (10, "<H"), (16, "<L"), (24, "<L"), (42, "<L")

PICTURES = {
    "set/train/hot dog/一.jpg": os.urandom(3000),
    "set/train/other/1.png": b"",
    "set/test/hot dog/2.jpg": b"x" * 70_000,
}


def packed(members: Mapping[str, bytes], *, kind: int = stat.S_IFREG | 0o644) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = kind << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, content)
    return buffer.getvalue()


def patched(data: bytes, field: tuple[int, str], change: Callable[[int], int], *, member: int = 0) -> bytes:
    """Return the archive with a field of a member's central record changed."""
    record = -1
    for _ in range(member + 1):
        record = data.index(b"PK\x01\x02", record + 1)
    offset, form = field
    changed = bytearray(data)
    struct.pack_into(
        form, changed, record + offset, change(struct.unpack_from(form, data, record + offset)[0])
    )
    return bytes(changed)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder to unpack in, with a neighbour that must stay as it is."""
    (tmp_path / "neighbour").write_text("mine")
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


def write(folder: Path, data: bytes) -> Path:
    path = folder / "set.zip"
    path.write_bytes(data)
    return path


def test_what_is_packed_is_what_is_unpacked(folder: Path) -> None:
    members = {
        "./": b"",
        "set/": b"",
        "set//empty/": b"",
        "set/.hidden": b"h",
        **PICTURES,
        "__MACOSX/._set": b"fork",
    }
    unpack(write(folder, packed(members)), folder / "new")
    assert tree(folder / "new") == {**PICTURES, "set/.hidden": b"h"}
    assert (folder / "new/set/empty").is_dir()


def test_a_stored_archive_behind_other_bytes_is_read(folder: Path) -> None:
    buffer = io.BytesIO(b"#!/bin/sh\n")
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("a.txt", "a")
    unpack(write(folder, buffer.getvalue()), folder / "new")
    assert tree(folder / "new") == {"a.txt": b"a"}


def test_permissions_of_the_archive_are_not_applied(folder: Path) -> None:
    unpack(write(folder, packed({"a/b": b"#!/bin/sh"}, kind=stat.S_IFREG | 0o6777)), folder / "new")
    assert not (folder / "new/a/b").stat().st_mode & 0o7111


A = packed({"set/a.jpg": b"abc" * 50})
TWO = packed({"a.jpg": b"abc", "b.jpg": b"abc"})
HOSTILE: dict[str, tuple[bytes, str]] = {
    "parent": (packed({"good": b"", "../neighbour": b"evil"}), "'../neighbour' leaves the folder"),
    "deep parent": (packed({"a/../../neighbour": b""}), "leaves the folder"),
    "parent at the end": (packed({"a/..": b""}), "leaves the folder"),
    "parent folder": (packed({"../evil/": b""}), "leaves the folder"),
    "absolute": (packed({"/tmp/evil": b""}), "'/tmp/evil' has an absolute path"),
    "two slashes": (packed({"//tmp/evil": b""}), "has an absolute path"),
    "drive": (packed({"C:/evil": b""}), "'C:/evil' has a Windows path"),
    "drive, relative": (packed({"c:evil": b""}), "has a Windows path"),
    "backslash": (packed({"..\\neighbour": b""}), "has a Windows path"),
    "NUL": (A.replace(b"set/a.jpg", b"s\0t/a.jpg"), "has control characters in its name"),
    "escape sequence": (packed({"\x1b[2J": b""}), "'\\x1b[2J' has control characters"),
    "no name": (packed({".": b""}), "'.' has no name"),
    "long name": (packed({"图" * 86: b""}), "has too long a name"),
    "symbolic link": (packed({"link": b"/etc"}, kind=stat.S_IFLNK | 0o777), "'link' is a symbolic link"),
    "link as folder": (packed({"link/": b""}, kind=stat.S_IFLNK | 0o777), "is a symbolic link"),
    "pipe": (packed({"pipe": b""}, kind=stat.S_IFIFO | 0o666), "'pipe' is neither a file nor a folder"),
    "device": (packed({"dev": b""}, kind=stat.S_IFBLK | 0o666), "'dev' is neither a file nor a folder"),
    "folder without slash": (packed({"a": b""}, kind=stat.S_IFDIR | 0o755), "'a' is neither"),
    "encrypted": (patched(A, FLAGS, lambda flags: flags | 1), "'set/a.jpg' is encrypted"),
    "strongly encrypted": (patched(A, FLAGS, lambda flags: flags | 0x40), "'set/a.jpg' cannot be read"),
    "packing": (patched(A, METHOD, lambda _: 14), "is packed by unknown method 14"),
    "twice": (packed({"a.jpg": b"1", "b.jpg": b"2"}).replace(b"b.jpg", b"a.jpg"), "'a.jpg' comes twice"),
    "twice, spelt otherwise": (packed({"a/b": b"1", "a/./b": b"2"}), "'a/./b' comes twice"),
    "file and folder": (packed({"a": b"1", "a/": b""}), "'a/' comes twice"),
    "file as a folder": (packed({"a/b/c": b"1", "a": b"2"}), "'a' is a file, and the folder of 'a/b/c'"),
    "bomb": (packed({"good": b"", "bomb": bytes(4_000_000)}), "with member 'bomb' it unpacks to over"),
    "bomb announced": (patched(A, SIZE, lambda _: 0xFFFF_FFF0), "a zip bomb"),
    "more than announced": (patched(A, SIZE, lambda _: 20), "'set/a.jpg'"),
    "less than announced": (patched(A, SIZE, lambda size: size + 1), "'set/a.jpg'"),
    "announced as empty": (patched(A, SIZE, lambda _: 0), "'set/a.jpg' cannot be read (Bad CRC"),
    "wrong CRC": (patched(A, CRC, lambda crc: crc ^ 1), "'set/a.jpg' cannot be read"),
    "another's bytes": (patched(TWO, OFFSET, lambda _: 0, member=1), "'b.jpg' cannot be read"),
    "offset past the end": (patched(TWO, OFFSET, lambda _: 10**9, member=1), "'b.jpg' cannot be read"),
    "empty file": (b"", "it cannot be read"),
    "web page": (b"<html>404</html>", "it cannot be read"),
    "cut": (A[:-40], "it cannot be read"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_archive_is_refused_by_name_and_touches_nothing(case: str, folder: Path) -> None:
    data, expected = HOSTILE[case]
    archive = write(folder, data)
    before = tree(folder.parent)
    with pytest.raises(UserError) as caught:
        unpack_whole(archive, folder / "new", holding="set")
    assert expected in str(caught.value)
    assert str(archive) in str(caught.value)
    assert tree(folder.parent) == before
    assert [p.name for p in folder.iterdir()] == ["set.zip"]


def test_too_many_members_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_MEMBERS", 2)
    with pytest.raises(UserError, match=r"it has 3 members, and at most 2"):
        unpack(write(folder, packed(PICTURES)), folder / "new")


def test_damage_anywhere_is_noticed_or_harmless(folder: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    dice = random.Random(seed)
    whole = packed(PICTURES)
    refused = 0
    for i in range(300):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 4)):
            data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
        if dice.random() < 0.2:
            del data[dice.randrange(len(data)) :]
        new = folder / str(i)
        try:
            unpack(write(folder, bytes(data)), new)
        except UserError:
            refused += 1
        else:  # only names and dates are not covered by a checksum
            assert sorted(tree(new).values()) in (
                sorted(PICTURES.values()),
                sorted(list(PICTURES.values())[:2]),
            )
    assert refused > 100
    assert sorted(p.name for p in folder.parent.iterdir()) == ["inside", "neighbour"]


def test_whole_or_absent(folder: Path) -> None:
    archive, new = write(folder, packed(PICTURES)), folder / "new"
    assert not is_whole(new)
    unpack_whole(archive, new, holding="set/train")
    assert is_whole(new)
    assert sorted(p.name for p in folder.iterdir()) == ["new", "set.zip"]


def test_an_archive_without_the_folder_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="it has no folder 'hotdog'"):
        unpack_whole(write(folder, packed(PICTURES)), folder / "new", holding="hotdog")
    assert [p.name for p in folder.iterdir()] == ["set.zip"]


@pytest.mark.parametrize("change", ["lost", "emptied", "added", "stamp"])
def test_a_folder_that_was_changed_since_is_not_taken_for_whole(change: str, folder: Path) -> None:
    new = folder / "new"
    unpack_whole(write(folder, packed(PICTURES)), new, holding="set")
    (new / "set/.DS_Store").write_text("left by a file manager")
    assert is_whole(new)
    picture = new / "set/test/hot dog/2.jpg"
    if change == "lost":
        picture.unlink()
    elif change == "emptied":
        picture.write_bytes(b"")
    elif change == "added":
        (picture.parent / "3.jpg").write_bytes(b"")
    else:
        (new / ".unpacked").unlink()
    with pytest.raises(UserError, match="has been changed since it was unpacked"):
        is_whole(new)


def test_killed_in_the_middle_it_leaves_nothing_that_passes_for_whole(folder: Path, repository: Path) -> None:
    archive, new = write(folder, packed(PICTURES)), folder / "new"
    script = (
        "import os, sys; from pathlib import Path; from trainer.data import unpack\n"
        "def write(archive, opened, info, place, write=unpack._write):\n"
        "    write(archive, opened, info, place)\n"
        "    os.kill(os.getpid(), 9)\n"
        "unpack._write = write\n"
        "unpack.unpack_whole(Path(sys.argv[1]), Path(sys.argv[2]), holding='set')"
    )
    killed = subprocess.run([sys.executable, "-c", script, archive, new], cwd=repository, check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(tree(folder)) == 2, "the archive and one picture"
    assert not is_whole(new)
    unpack_whole(archive, new, holding="set")
    assert is_whole(new)
    assert sorted(p.name for p in folder.iterdir()) == ["new", "set.zip"]


def test_a_full_disk_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(archive: Path, opened: object, info: zipfile.ZipInfo, place: Path) -> None:
        if place.name == "2.jpg":
            raise OSError(errno.ENOSPC, "No space left on device")
        place.write_bytes(b"")

    archive = write(folder, packed(PICTURES))
    monkeypatch.setattr(module, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        unpack_whole(archive, folder / "new", holding="set")
    assert [p.name for p in folder.iterdir()] == ["set.zip"]


def test_too_little_room_is_told_before_anything_is_written(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = write(folder, packed(PICTURES))
    usage = module.shutil.disk_usage(folder)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: usage._replace(free=70_000))
    with pytest.raises(OSError, match=r"73.0 kB needed, 70.0 kB free") as caught:
        unpack(archive, folder / "new")
    assert caught.value.errno == errno.ENOSPC
    assert not (folder / "new").exists()
