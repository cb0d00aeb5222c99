"""Unpack a zip archive below one new folder that is whole or absent, and write nothing outside it.

An archive is foreign matter even where its hash is right: every member is looked at before the first byte
is written, and what is written is counted again. Times and permissions stored in the archive are not
applied, so nothing comes out executable or setuid. A Mac's resource forks (`__MACOSX/`) are passed over.
"""

import errno
import os
import re
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from rich.filesize import decimal

from trainer.errors import UserError

MOST_MEMBERS = 2_000_000
"""ImageNet has 1.3 million images."""
GREATEST_EXPANSION = 100
"""Unpacked bytes for each byte of the archive: plain bitmaps come near it, a zip bomb passes it by far."""
_SLACK = 2**20  # a tiny archive may hold a text that packs well
_CHUNK = 2**20
_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_LONGEST_NAME = 255  # bytes of one component of a path, on every usual file system

# What zipfile and zlib raise for damaged archives; OSError for an offset that no file has.
_DAMAGES = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)


def unpack_whole(archive: Path, folder: Path, *, holding: str) -> None:
    """Unpack beside `folder`, and rename to it at the end: it is whole or absent, whatever kills the process.

    One process at a time. `holding` is a folder that the archive must have.

    Raises:
        UserError, OSError: as `unpack`; nothing is left behind.

    """
    unpacking = folder.with_name(f".{folder.name}.unpacking")
    try:
        if unpacking.exists():  # an earlier process was killed here
            shutil.rmtree(unpacking)
        unpack(archive, unpacking)
        if not (unpacking / holding).is_dir():
            raise _refusal(archive, f"it has no folder {holding!r}")
        _stamp(unpacking).write_text(_contents(unpacking), encoding="ascii")
        unpacking.rename(folder)
    finally:
        shutil.rmtree(unpacking, ignore_errors=True)


def is_whole(folder: Path) -> bool:
    """Return whether `unpack_whole` has made the folder.

    Raises:
        UserError: it is not as it was made. Files are lost by hand, to a cleaner of old files, or in a power
            cut before they reached the disk. It is not replaced unasked: somebody may have worked in it.

    """
    if not folder.is_dir():
        return False
    stamp = _stamp(folder)
    was = stamp.read_text(encoding="ascii", errors="replace") if stamp.is_file() else "of unknown contents"
    now = _contents(folder)
    if now != was:
        raise UserError(
            f"{folder} has been changed since it was unpacked: it was {was}, and is {now}.\n"
            "Delete it, and it is unpacked again; or copy it elsewhere and set data.root to the copy"
        )
    return True


def _stamp(folder: Path) -> Path:
    return folder / ".unpacked"


def _contents(folder: Path) -> str:
    """Return the count and the size of a folder's files, without hidden ones: file managers leave some."""
    sizes = [
        (Path(parent) / name).stat().st_size
        for parent, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    ]
    return f"{len(sizes):,} files of {sum(sizes):,} bytes"


def unpack(archive: Path, folder: Path) -> None:
    """Write the members of `archive` below `folder`, which is made here.

    Raises:
        UserError: not a zip archive, damaged, or hostile; it names the member. Where a member's name, kind or
            announced size is at fault, nothing has been written.
        OSError: the disk is full or cannot be written; `folder` holds what was written so far.

    """
    with archive.open("rb") as file:
        with _damage_of(archive):
            opened = zipfile.ZipFile(file)
        with opened:
            members = _harmless(archive, opened.infolist())
            require_room(folder.parent, sum(info.file_size for info in members.values()))
            folder.mkdir()
            for path, info in members.items():
                place = folder / path
                if info.is_dir():
                    place.mkdir(parents=True, exist_ok=True)
                else:
                    place.parent.mkdir(parents=True, exist_ok=True)
                    _write(archive, opened, info, place)


def require_room(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) before the work if the disk of `folder` has fewer than `needed` bytes left."""
    disk = shutil.disk_usage(folder)
    if disk.total and disk.free < needed:  # some network file systems tell nothing
        raise OSError(errno.ENOSPC, f"{decimal(needed)} needed, {decimal(disk.free)} free", str(folder))


def _harmless(archive: Path, infos: Sequence[zipfile.ZipInfo]) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """Return path below the target -> member to write, once all members have been found to be harmless."""
    if len(infos) > MOST_MEMBERS:
        raise _refusal(archive, f"it has {len(infos):,} members, and at most {MOST_MEMBERS:,} are taken")
    allowed = GREATEST_EXPANSION * archive.stat().st_size + _SLACK
    unpacked = 0
    members: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for info in infos:
        fault = _fault(info)
        if fault:
            raise _refusal(archive, f"member {info.orig_filename!r} {fault}")
        unpacked += info.file_size
        if unpacked > allowed:
            bomb = f"with member {info.orig_filename!r} it unpacks to over {allowed:,} bytes: a zip bomb"
            raise _refusal(archive, bomb)
        path = PurePosixPath(info.filename)
        earlier = members.setdefault(path, info)
        if earlier is not info and not (earlier.is_dir() and info.is_dir()):
            raise _refusal(archive, f"member {info.orig_filename!r} comes twice")
    for path in members:
        for parent in path.parents:
            if parent in members and not members[parent].is_dir():
                raise _refusal(archive, f"member {str(parent)!r} is a file, and the folder of {str(path)!r}")
    return {path: info for path, info in members.items() if path.parts[:1] != ("__MACOSX",)}


def _fault(info: zipfile.ZipInfo) -> str | None:
    """Return what is wrong with a member's name, kind or packing; None: nothing."""
    # The name as it stands, and as zipfile reads it: it cuts at a NUL, and takes another from an extra field.
    names = (info.orig_filename, info.filename)
    paths = [PurePosixPath(name) for name in names]
    parts = [part for path in paths for part in path.parts]
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the archive comes from a system without such kinds
    expected = (0, stat.S_IFREG, stat.S_IFDIR) if info.is_dir() else (0, stat.S_IFREG)
    faults = (
        (any(path.is_absolute() for path in paths), "has an absolute path"),
        (any("\\" in name or re.match("[A-Za-z]:", name) for name in names), "has a Windows path"),
        (".." in parts, "leaves the folder"),
        (any(ord(character) < 32 for character in "".join(names)), "has control characters in its name"),
        (not (parts or info.is_dir()), "has no name"),
        (any(len(os.fsencode(part)) > _LONGEST_NAME for part in parts), "has too long a name"),
        (kind == stat.S_IFLNK, "is a symbolic link"),
        (kind not in expected, "is neither a file nor a folder"),
        (info.flag_bits & 1, "is encrypted"),
        (info.compress_type not in _PACKINGS, f"is packed by unknown method {info.compress_type}"),
    )
    return next((text for wrong, text in faults if wrong), None)


def _write(archive: Path, opened: zipfile.ZipFile, info: zipfile.ZipInfo, place: Path) -> None:
    """Write a member to a file that is not there yet; its size is checked here, its CRC by zipfile."""
    written = 0
    with _damage_of(archive, info):
        source = opened.open(info)
    with source, place.open("xb") as file:
        while True:
            with _damage_of(archive, info):
                chunk = source.read(_CHUNK)
            if not chunk:
                break
            written += len(chunk)
            if written > info.file_size:
                break
            file.write(chunk)
    if written != info.file_size:
        fault = f"member {info.orig_filename!r} does not have the {info.file_size:,} bytes that it announces"
        raise _refusal(archive, fault, damaged=True)


@contextmanager
def _damage_of(archive: Path, info: zipfile.ZipInfo | None = None) -> Iterator[None]:
    """Turn what the reading of a damaged archive raises into an error that names the member."""
    try:
        yield
    except _DAMAGES as error:
        what = "it" if info is None else f"member {info.orig_filename!r}"
        raise _refusal(
            archive, f"{what} cannot be read ({str(error) or type(error).__name__})", damaged=True
        ) from error


def _refusal(archive: Path, why: str, *, damaged: bool = False) -> UserError:
    return UserError(f"{archive} {'is damaged' if damaged else 'was not unpacked'}: {why}")
