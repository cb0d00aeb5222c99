"""Write files atomically: after a kill or a power cut, a file is complete or absent."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, flush it to the disk, and rename it to `path`."""
    # A random name, not the pid: processes in two containers may have the same pid.
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
    """Write text as UTF-8, atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove the temporary files that killed processes have left of file `name`, which may be a glob pattern."""
    for temporary in folder.glob(f".{name}.*.tmp"):
        temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk: what was created, renamed or removed in it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe_missing(path: Path, error: Exception | None = None) -> str | None:
    """Return a message if a folder that contains `path` was deleted or moved, or None if all of them are there.

    Args:
        path: what a run was to write.
        error: why it could not; a FileNotFoundError names the path that is missing.

    """
    if isinstance(error, FileNotFoundError) and error.filename:
        path = Path(os.fsdecode(error.filename))
        paths = [*reversed(path.parents), path]
    else:
        paths = list(reversed(path.parents))
    missing = next((parent for parent in paths if not parent.exists()), None)
    if missing is None:
        return None
    return (
        f"{missing} is gone: it was deleted or moved while the run was in progress, and nothing was saved after that. "
        "Move it back, and the same command resumes from its newest checkpoint; without it, the run starts anew"
    )
