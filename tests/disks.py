"""A disk of a test's own, small enough to be filled."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk(root: Path, size: str) -> Iterator[Path]:
    """Mount a file system of that size (`256k`, `32m`) for a block.

    Who may mount none has the test skipped, which .ci/run takes for a failure.
    """
    root.mkdir()
    mounted = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(root))
    if mounted.returncode:
        pytest.skip(
            f"this test fills a disk of its own, but may mount none ({mounted.stderr.strip()}): run the tests as root, "
            "in a container with CAP_SYS_ADMIN"
        )
    try:
        yield root
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


def resize(root: Path, size: str) -> None:
    done = _mount("-o", f"remount,size={size}", str(root))
    assert done.returncode == 0, done.stderr


def _mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
