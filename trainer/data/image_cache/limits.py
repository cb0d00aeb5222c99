"""The memory that a process may use: that of the machine, or of its control group (container, Slurm job)."""

from pathlib import Path

_PROC, _CGROUP = Path("/proc"), Path("/sys/fs/cgroup")


def total_memory() -> int:
    """Return the memory of this machine, or of the control group if that is less [bytes]."""
    return min([_meminfo()["MemTotal"], *(limit for limit, _ in _cgroup_limits())])


def available_memory() -> int:
    """Return the memory that can be used without swapping [bytes]: caches of files count as available."""
    return min([_meminfo()["MemAvailable"], *(max(0, limit - used) for limit, used in _cgroup_limits())])


def _meminfo() -> dict[str, int]:
    lines = (_PROC / "meminfo").read_text(encoding="ascii").splitlines()
    return {name: 1024 * int(value.split()[0]) for name, _, value in (line.partition(":") for line in lines)}


def _cgroup_limits() -> list[tuple[int, int]]:
    """Return (limit, memory in use without files) of each control group of this process that has a limit [bytes]."""
    limits = []
    for folder, limit_name, used_name in _cgroups():
        try:
            limit = (folder / limit_name).read_text(encoding="ascii").strip()
            used = int((folder / used_name).read_text(encoding="ascii"))
            stat = (folder / "memory.stat").read_text(encoding="ascii").split()
        except OSError:  # the root group has no limit
            continue
        if limit.isdigit():  # "max" in version 2; in version 1, a number that exceeds every memory
            fields = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
            files = fields.get("total_inactive_file", fields.get("inactive_file", 0))
            files += fields.get("total_active_file", fields.get("active_file", 0))
            limits.append((int(limit), max(0, used - files)))
    return limits


def _cgroups() -> list[tuple[Path, str, str]]:
    """Return the memory groups of this process, up to the root: folder, file of the limit, file of the use."""
    groups = []
    for line in (_PROC / "self" / "cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _CGROUP, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, names = _CGROUP / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        # In a container, the path may be that of the host: then only the root is there.
        relative = Path(path.lstrip("/"))
        groups += [(root / folder, *names) for folder in (relative, *relative.parents)]
    return groups
