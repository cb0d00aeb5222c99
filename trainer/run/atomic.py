"""Files and folders that are whole or absent, whatever kills the process."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, and put it in place once it is on the disk."""
    # Not by its process's number: in containers, two machines' processes have the same.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_text_atomically(path: Path, text: str) -> None:
    """Write UTF-8 text that is whole or absent."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what a process that was killed while it wrote a file atomically has left; `name` may be a pattern."""
    for temporary in folder.glob(f".{name}.*.tmp"):
        temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk: what was made, renamed or removed in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
