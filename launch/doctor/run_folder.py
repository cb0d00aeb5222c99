"""The run folder's disk: what a run does there is tried out, and its clock is read."""

import os
import secrets
import time
from contextlib import suppress
from pathlib import Path

from launch.doctor.finding import Finding, green, red, yellow

PATIENCE = 45.0
"""Seconds without a sign of life after which a run is taken for dead (`attempts/`): clocks must be much closer."""
_SKEW = 2.0
_IN_MEMORY = ("tmpfs", "ramfs")


def existing(folder: Path) -> Path:
    """Return the folder that a run folder will be made in: its parent, or the nearest that is there.

    A run folder that is a disk of its own, as one mounted into a container is, is itself where things are written.
    """
    if folder.is_dir() and folder.stat().st_dev != folder.parent.stat().st_dev:
        return folder
    for parent in folder.parents:
        if parent.is_dir():
            return parent
    return Path("/")


def try_out(folder: Path) -> list[str]:
    """Do in a folder what a run does to its files; returns what does not hold.

    Raises:
        OSError: it is refused.

    """
    wrong: list[str] = []
    place, other = folder / "tried", folder / f".tried.{secrets.token_hex(4)}.tmp"
    place.write_bytes(b"earlier")
    with other.open("xb") as file:
        file.write(b"later")
        file.flush()
        os.fsync(file.fileno())
    other.replace(place)
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
    if place.read_bytes() != b"later" or other.exists():
        wrong.append("a file that is renamed over another does not take its place")
    with suppress(FileExistsError):
        place.open("xb").close()
        wrong.append("a file can be made anew that is there: two runs would take one folder")
    os.utime(place)
    if place.name not in os.listdir(folder):  # noqa: PTH208
        wrong.append("a file is not listed that was made")
    place.unlink()
    return wrong


def clock_ahead(folder: Path) -> float:
    """Return by how many seconds this machine's clock is ahead of that by which the folder's files are dated."""
    path = folder / f"clock-{secrets.token_hex(4)}"
    before = time.time()
    try:
        path.write_bytes(b"")
        os.utime(path)  # as a sign of life is given: by the server's clock where the disk is a server's
        after = time.time()
        dated = path.stat().st_mtime
    finally:
        path.unlink(missing_ok=True)
    # The kernel dates files by its last tick, some milliseconds ago.
    return before - dated - 0.02 if dated < before - 0.02 else min(0.0, after - dated)


def clocks(ahead: dict[str, float]) -> Finding:
    """Return whether the machines' clocks agree; `ahead` is host -> seconds ahead of the run folder's."""
    spread = max([*ahead.values(), 0.0]) - min([*ahead.values(), 0.0])
    told = ", ".join(f"{host} {seconds:+.1f} s" for host, seconds in sorted(ahead.items()))
    what = f"against the run folder's: {told}"
    remedy = "let the machines take their time from one source (chrony, ntpd)"
    if spread > PATIENCE / 2:
        return red("clocks", f"{what}; whether a run lives is told by its files' times", remedy)
    return yellow("clocks", what, remedy) if spread > _SKEW else green("clocks", what)


def kind_of_disk(folder: Path, mounts: Path = Path("/proc/self/mountinfo")) -> str:
    """Return the type of the file system that a folder lies on; see proc(5), /proc/pid/mountinfo."""
    device = os.stat(folder).st_dev  # noqa: PTH116
    number = f"{os.major(device)}:{os.minor(device)}"
    whole = str(folder.resolve())
    longest, found = -1, "unknown"
    for line in mounts.read_text(encoding="utf-8", errors="replace").splitlines():
        fields, _, rest = line.partition(" - ")
        words = fields.split()
        point = words[4].encode().decode("unicode_escape", "replace")
        inside = whole == point or whole.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= longest and (words[2] == number or found == "unknown"):
            longest, found = len(point), rest.split()[0]
    return found


def judge(folder: Path, wrong: list[str], kind: str) -> Finding:
    """Return whether a disk does for a run folder."""
    if wrong:
        return red("run folder", f"{folder} ({kind}): {'; '.join(wrong)}", "put run.dir on another disk")
    if kind in _IN_MEMORY:
        return yellow(
            "run folder",
            f"{folder} lies in memory ({kind})",
            "put run.dir on a disk that outlives the machine",
        )
    if kind == "overlay":
        return yellow(
            "run folder",
            f"{folder} goes with its container (overlay)",
            "put run.dir on a volume that is mounted into it",
        )
    return green("run folder", f"{folder} ({kind}): what is written is renamed, synchronised and listed")
