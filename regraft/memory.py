"""Available memory of this machine or container. It imports the standard library alone."""

from collections.abc import Iterator
from pathlib import Path


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the available memory [bytes]: the machine's, or what is left of a limit of a container or a Slurm job."""
    available = _read_numbers(proc / "meminfo")["MemAvailable:"] * 1024
    return min([available, *(_left(folder) for folder in _limited(proc, cgroup))])


def _limited(proc: Path, cgroup: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups that have a limit (cgroup v2)."""
    try:
        own = (proc / "self" / "cgroup").read_text(encoding="utf-8").partition("0::/")[2].partition("\n")[0]
    except OSError:
        own = ""
    folder = cgroup / own
    for group in (folder, *folder.parents):
        if group.is_relative_to(cgroup) and _limit(group) is not None:
            yield group


def _limit(group: Path) -> int | None:
    try:
        return int((group / "memory.max").read_text(encoding="ascii"))
    except (OSError, ValueError):  # no control group, or `max`: no limit
        return None


def _left(group: Path) -> int:
    used = int((group / "memory.current").read_text(encoding="ascii"))
    # The page cache counts as used, but the kernel frees it when memory is needed.
    cache = _read_numbers(group / "memory.stat").get("inactive_file", 0)
    return max(0, (_limit(group) or 0) - used) + cache


def _read_numbers(path: Path) -> dict[str, int]:
    """Return name -> number of a file with lines such as `MemAvailable: 5 kB`."""
    lines = map(str.split, path.read_text(encoding="ascii", errors="replace").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
