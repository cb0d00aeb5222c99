"""Memory of this machine, or of the control groups that this process is in: a container, a Slurm job."""

from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def total_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Return the memory of the machine, or the limit of a control group if that is less [bytes]."""
    return min([_read_numbers(proc / "meminfo")["MemTotal:"] * 1024, *(limit for limit, _ in _limits(proc, cgroup))])


def available_memory(proc: Path = _PROC, cgroup: Path = _CGROUP) -> int:
    """Return the available memory [bytes]: the machine's, or what is left of the limit of a control group."""
    available = _read_numbers(proc / "meminfo")["MemAvailable:"] * 1024
    return min([available, *(max(0, limit - used) for limit, used in _limits(proc, cgroup))])


def _limits(proc: Path, cgroup: Path) -> list[tuple[int, int]]:
    """Return (limit, memory in use without the page cache) of each control group that has a limit [bytes]."""
    limits = []
    for folder, limit_name, used_name in _groups(proc, cgroup):
        try:
            limit, used = (int((folder / name).read_text(encoding="ascii")) for name in (limit_name, used_name))
            stat = _read_numbers(folder / "memory.stat")
        except (OSError, ValueError):  # the root group, or `max`: no limit
            continue
        # The page cache counts as used, but the kernel frees it when memory is needed.
        cache = sum(stat.get(f"total_{name}", stat.get(name, 0)) for name in ("inactive_file", "active_file"))
        limits.append((limit, max(0, used - cache)))
    return limits


def _groups(proc: Path, cgroup: Path) -> list[tuple[Path, str, str]]:
    """Return the memory groups of this process up to the root: folder, file of the limit, file of the use."""
    groups = []
    for line in (proc / "self" / "cgroup").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, names = cgroup, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = cgroup / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container, the path may be that of the host: then only the root is there.
        relative = Path(path.lstrip("/"))
        groups += [(root / folder, *names) for folder in (relative, *relative.parents)]
    return groups


def _read_numbers(path: Path) -> dict[str, int]:
    """Return name -> number of a file with lines such as `MemAvailable: 5 kB`."""
    lines = map(str.split, path.read_text(encoding="ascii", errors="replace").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}
