"""Small file systems that a test may fill."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def disk(root: Path, size: str) -> Iterator[Path]:
    """Mount a tmpfs of a size such as `256k` or `32m` for a block.

    Skips the test if mounting is not permitted; .ci/run counts that as a failure.
    """
    root.mkdir()
    mounted = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(root))
    if mounted.returncode:
        pytest.skip(
            f"this test mounts a small disk, which failed ({mounted.stderr.strip()}): run it as root, in a container "
            "with CAP_SYS_ADMIN"
        )
    try:
        yield root
    finally:
        subprocess.run(["umount", "--lazy", root], check=True)


def resize(root: Path, size: str) -> None:
    done = _mount("-o", f"remount,size={size}", str(root))
    assert done.returncode == 0, done.stderr


def with_small_shared_memory(size: str) -> list[str]:
    """Return the start of a command that runs with a /dev/shm of a size such as `1m`.

    Skips the test if that is not permitted; .ci/run counts that as a failure.
    """
    prefix = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this test mounts a small /dev/shm, which failed ({tried.stderr.strip()}): run it as root")
    return prefix


def _mount(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["mount", *arguments], capture_output=True, text=True, check=False)
