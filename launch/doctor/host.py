"""Room, limits and ports of this machine."""

import errno
import os
import random
import resource
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.doctor.finding import Finding, green, red, size, yellow

_GIB = 1 << 30
_MIB = 1 << 20
PORTS_FROM = 20000
"""Ports for rendezvous are taken from here to where the kernel begins to hand out its own."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What this machine lets a process have; None: unlimited, or not known."""

    open_files: int | None
    processes: int | None
    """Of this user; a container's pids.max where that is less."""
    cores: int
    """By affinity."""
    quota: float | None
    """Cores, by the control group."""


def read_limits(groups: Path = Path("/sys/fs/cgroup")) -> Limits:
    """Return this process's limits."""

    def soft(which: int) -> int | None:
        value = resource.getrlimit(which)[0]
        return None if value == resource.RLIM_INFINITY else value

    pids = _number(groups / "pids.max")
    processes = min((n for n in (soft(resource.RLIMIT_NPROC), pids) if n is not None), default=None)
    quota: float | None = None
    words = _words(groups / "cpu.max")
    if len(words) == 2 and words[0].isdigit() and words[1].isdigit():
        quota = int(words[0]) / int(words[1])
    return Limits(
        open_files=soft(resource.RLIMIT_NOFILE),
        processes=processes,
        cores=len(os.sched_getaffinity(0)),
        quota=quota,
    )


def limits(found: Limits, *, processes: int, workers: int) -> list[Finding]:
    """Return whether the limits do for `processes` processes with `workers` that decode for each."""
    findings: list[Finding] = []
    files = 256 + 16 * workers
    if found.open_files is not None and found.open_files < files:
        findings.append(
            red("limits", f"{found.open_files} open files; a process needs about {files}", "ulimit -n 4096")
        )
    elif found.open_files is not None and found.open_files < 1024:
        findings.append(yellow("limits", f"{found.open_files} open files: few", "ulimit -n 4096"))
    # Threads count as processes: torch, BLAS and CUDA start some for every core.
    needed = processes * (64 + 2 * found.cores + 8 * workers)
    if found.processes is not None and found.processes < needed:
        findings.append(
            red(
                "limits",
                f"{found.processes} processes and threads; {processes} trainers need about {needed}",
                "ulimit -u unlimited; in a container, start it with a larger --pids-limit",
            )
        )
    if found.quota is not None and found.quota < 1:
        findings.append(
            yellow("limits", f"a quota of {found.quota:.2g} cores", "ask for more: --cpus, --cpus-per-task")
        )
    elif processes > found.cores:
        findings.append(
            yellow(
                "limits",
                f"{processes} processes on {found.cores} cores",
                "fewer --nproc, or more cores: --cpus-per-task",
            )
        )
    cores = f"{found.cores} cores" + (f", a quota of {found.quota:.3g}" if found.quota is not None else "")
    files_told = "any number of" if found.open_files is None else f"{found.open_files:,}"
    told = "any number of" if found.processes is None else f"{found.processes:,}"
    return findings or [green("limits", f"{cores}; {files_told} open files, {told} processes")]


def load(busy: float, *, cores: int) -> Finding:
    """Return whether others work on this machine's cores; `busy` is how many tasks ran or waited in the last minute."""
    what = f"{busy:.1f} tasks on {cores} cores in the last minute"
    if busy > 0.5 * cores:
        return yellow(
            "load",
            f"{what}: others work here, and what is measured below is too slow",
            "measure again when they are done; in Slurm, within a job of one's own (--exclusive)",
        )
    return green("load", what)


def free_memory(proc: Path = Path("/proc"), groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the memory [bytes] that can still be taken: the machine's, or the control group's where that is less."""
    for line in (proc / "meminfo").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            available = int(value.split()[0]) * 1024
            break
    else:
        raise OSError(errno.ENODATA, "no MemAvailable", str(proc / "meminfo"))
    limit, used = _number(groups / "memory.max"), _number(groups / "memory.current")
    if limit is not None and used is not None:
        # What files are cached of counts as used, and is given back when it is needed.
        available = min(available, max(0, limit - used) + _cached(groups))
    return available


def memory(free: int, *, processes: int, needed: int | None) -> Finding:
    """Return whether `processes` processes find the memory; `needed` is one's [bytes], where it was measured."""
    each = needed or 2 * _GIB
    what = f"{size(free)} free; {processes} x {size(each)} {'as measured' if needed else 'at a guess'}"
    remedy = "train.accumulation, fewer data.workers or --nproc, or more memory (--mem)"
    if free < processes * each * 0.75:
        return red("memory", what, remedy) if needed else yellow("memory", what, remedy)
    if free < processes * each * 1.5:
        return yellow("memory", what, remedy)
    return green("memory", what)


def disk(free: int, needed: int | None, *, where: Path, files: int | None = None) -> Finding:
    """Return whether a run folder finds room.

    Args:
        free: bytes.
        needed: by the checkpoints that are kept [bytes]; None where that is not known.
        where: a folder of that disk.
        files: how many more it takes; None where that is not known.

    """
    what = f"{size(free)} free at {where}"
    remedy = "make room, or put run.dir elsewhere; checkpoint.keep_last 1 keeps fewer"
    if files is not None and files < 1000:
        return red("disk", f"{what}, but room for {files} more files alone", remedy)
    if needed is not None:
        what += f"; the checkpoints take {size(needed)}"
    least = needed if needed is not None else 512 * _MIB
    if free < least:
        return red("disk", what, remedy)
    return yellow("disk", what, remedy) if free < 2 * least + 256 * _MIB else green("disk", what)


def room(folder: Path) -> tuple[int, int | None]:
    """Return (bytes, files) that a folder's disk still takes; some file systems do not count files."""
    found = os.statvfs(folder)
    return shutil.disk_usage(folder).free, found.f_favail if found.f_files else None


def shared_memory(free: int | None, *, workers: int) -> Finding:
    """Return whether workers that decode find room for their batches in /dev/shm [bytes]; None: there is none."""
    remedy = "in a container: --shm-size 2g (or --ipc host); or --data.workers 0"
    if free is None:
        judge = red if workers else yellow
        return judge("shared memory", "there is no /dev/shm", remedy)
    what = f"{size(free)} free in /dev/shm, for {workers} workers"
    if workers and free < 64 * _MIB:
        return red("shared memory", what, remedy)
    return yellow("shared memory", what, remedy) if free < 512 * _MIB else green("shared memory", what)


@dataclass(frozen=True, kw_only=True)
class Ports:
    """What was found of this machine's ports and name."""

    ephemeral_from: int
    """From here on, the kernel hands ports out by itself."""
    tried: int
    bound: int
    """How many of those tried could be had."""
    address: str | None
    """What the host's own name leads to; None: nothing."""


def try_ports(proc: Path = Path("/proc"), *, count: int = 8) -> Ports:
    """Bind some ports, for a moment each."""
    words = _words(proc / "sys" / "net" / "ipv4" / "ip_local_port_range")
    first = int(words[0]) if words else 32768
    wanted = random.sample(range(PORTS_FROM, max(first, PORTS_FROM + count)), count)
    bound = 0
    for port in wanted:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
                probe.listen(1)
                bound += 1
            except OSError:
                continue
    try:
        address: str | None = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = None
    return Ports(ephemeral_from=first, tried=count, bound=bound, address=address)


def ports(found: Ports, *, host: str) -> list[Finding]:
    """Return whether processes can meet on this machine's ports."""
    findings: list[Finding] = []
    if not found.bound:
        findings.append(
            red(
                "ports",
                f"none of {found.tried} between {PORTS_FROM} and {found.ephemeral_from} can be bound",
                "a sandbox or a firewall forbids it: ask for an exception, or train in one process",
            )
        )
    if found.ephemeral_from < PORTS_FROM + 1000:
        findings.append(
            yellow(
                "ports",
                f"the kernel hands out ports from {found.ephemeral_from} on: a rendezvous' may be taken",
                "sysctl net.ipv4.ip_local_port_range='32768 60999'",
            )
        )
    if found.address is None:
        findings.append(
            yellow(
                "ports",
                f"the host's own name, {host}, leads nowhere: processes may not find one another",
                f"add '127.0.1.1 {host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME (NCCL_SOCKET_IFNAME)",
            )
        )
    return findings or [
        green(
            "ports",
            f"{found.bound} of {found.tried} tried below {found.ephemeral_from} are free; {host} is "
            f"{found.address}",
        )
    ]


def interfaces() -> Sequence[str]:
    """Return the names of this machine's network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def _cached(groups: Path) -> int:
    for line in _lines(groups / "memory.stat"):
        name, _, value = line.partition(" ")
        if name == "inactive_file" and value.isdigit():
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return []
