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
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", root]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
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
    subprocess.run(["mount", "-o", f"remount,size={size}", root], check=True)


def with_small_shared_memory(size: str) -> list[str]:
    """Return the start of a command that runs with a /dev/shm of a size such as `1m`.

    Skips the test if that is not permitted; .ci/run counts that as a failure.
    """
    prefix = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"', "sh"]
    tried = subprocess.run([*prefix, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"this test mounts a small /dev/shm, which failed ({tried.stderr.strip()}): run it as root")
    return prefix
