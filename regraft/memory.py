"""Available memory of this machine, or of the container that the process is in."""

from pathlib import Path


def available_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the available memory [bytes]: the machine's, or what is left of the container's limit."""
    available = _read_numbers(proc / "meminfo")["MemAvailable:"] * 1024
    try:
        limit, used = (int((cgroup / f"memory.{name}").read_text()) for name in ("max", "current"))
    except (OSError, ValueError):  # no control group, or `max`: no limit
        return available
    # The page cache counts as used, but the kernel frees it when memory is needed.
    cache = _read_numbers(cgroup / "memory.stat").get("inactive_file", 0)
    return min(available, max(0, limit - used) + cache)


def _read_numbers(path: Path) -> dict[str, int]:
    """Return name -> number of a file with lines such as `MemAvailable: 5 kB`."""
    lines = map(str.split, path.read_text(encoding="ascii", errors="replace").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
