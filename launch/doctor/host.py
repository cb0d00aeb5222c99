"""Check this machine: environment variables, ports, run folder, memory, disk and shared memory."""

import os
import re
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from launch import machine
from launch.doctor.finding import DoctorContext, Finding, Level, format_bytes, make_finding
from launch.slurm.allocation import is_port_free
from regraft.contract import available_cores
from regraft.memory import available_memory

_GIB, _MIB = 1 << 30, 1 << 20
_PORTS = range(20_000, 30_000, 1_250)
"""Ports to try, from those that Slurm jobs use for their rendezvous."""
_LAUNCHER = "(PET|TORCHELASTIC|ACCELERATE)_.*|((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)"
_Rule = tuple[str, Level, Callable[[str], bool], str]
"""Pattern of a variable's name, level, whether a value is a problem, message."""


def check_variables(_: DoctorContext) -> list[Finding]:
    """Check environment variables that change a run unintentionally."""
    cores, gpus = available_cores(), machine.gpus({})
    interfaces = [name for _, name in socket.if_nameindex()]
    no_interface = f"there is no such network interface; found {', '.join(interfaces)}"
    rules: tuple[_Rule, ...] = (
        ("ACCELERATE_(GRADIENT_ACCUMULATION_STEPS|DYNAMO_BACKEND)", "red", _is_not_default, "the trainer refuses it"),
        (_LAUNCHER, "yellow", lambda _: True, "set by another launcher; only `regraft train` ignores it"),
        ("(NCCL|GLOO)_SOCKET_IFNAME", "red", lambda v: not _matches(v, interfaces), no_interface),
        ("CUDA_VISIBLE_DEVICES", "yellow", lambda v: gpus > 0 and not v.strip(" ,"), f"hides all {gpus} GPUs"),
        ("OMP_NUM_THREADS", "yellow", lambda v: v == "1" and cores > 1, f"one thread for {cores} cores"),
        ("NCCL_(P2P|IB|SHM)_DISABLE", "yellow", _is_on, "disables a fast connection between GPUs"),
        ("CUDA_LAUNCH_BLOCKING", "yellow", _is_on, "waits for every CUDA kernel, which is slow"),
        ("TORCH_DISTRIBUTED_DEBUG", "yellow", lambda v: v.upper() == "DETAIL", "slows down every collective"),
        ("PYTHON(PATH|HOME)", "yellow", bool, "its modules come before the installed ones"),
        ("LD_PRELOAD", "yellow", bool, "is loaded into every process"),
    )
    findings: list[Finding] = []
    for name, value in sorted(os.environ.items()):
        for pattern, level, is_problem, message in rules:
            if re.fullmatch(pattern, name) and is_problem(value):
                shown = ascii(value)[1:-1][:80]
                findings.append(Finding("variables", level, f"{name}={shown}: {message}", f"unset {name}"))
                break
    return findings or [Finding("variables", "green", "no variable changes a run unintentionally")]


def _is_not_default(value: str) -> bool:
    return value.lower() not in ("", "1", "no")


def _is_on(value: str) -> bool:
    return value not in ("", "0")


def _matches(value: str, interfaces: Sequence[str]) -> bool:
    """Return whether an interface matches, by NCCL's rules: prefixes, `=` for exact names, `^` for exclusion."""
    if value.startswith("^") or not value:
        return True
    exact = value.startswith("=")
    names = [name.partition(":")[0] for name in value.removeprefix("=").split(",")]
    return any(one == name or (not exact and one.startswith(name)) for one in interfaces for name in names)


def check_ports(_: DoctorContext) -> list[Finding]:
    """Check that processes can find each other: a free port, and a host name that resolves to an address."""
    host, findings = socket.gethostname(), []
    if not any(map(is_port_free, _PORTS)):
        message = f"none of {len(_PORTS)} ports from {_PORTS[0]} to {_PORTS[-1]} can be bound"
        remedy = "a sandbox or firewall forbids it: ask for an exception, or train in one process"
        findings.append(Finding("ports", "red", message, remedy))
    try:
        address = socket.gethostbyname(host)
    except OSError:
        message = f"the host name {host} cannot be resolved: processes may not find each other"
        remedy = f"add '127.0.1.1 {host}' to /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
        findings.append(Finding("ports", "yellow", message, remedy))
    return findings or [Finding("ports", "green", f"ports can be bound; {host} resolves to {address}")]


def nearest_existing(folder: Path) -> Path:
    """Return the folder in which a run folder will be made: the nearest parent that exists.

    A run folder that is a mount point, such as a volume of a container, is returned itself.
    """
    if folder.is_dir() and folder.stat().st_dev != folder.parent.stat().st_dev:
        return folder
    return next((parent for parent in folder.parents if parent.is_dir()), Path("/"))


def check_run_folder(context: DoctorContext) -> list[Finding]:
    """Check that files in the run folder can be written, replaced atomically and created exclusively."""
    problem = "not writable" if context.scratch is None else _file_system_problem(context.scratch)
    level: Level = "red" if problem else "green"
    message = f"{nearest_existing(context.run)}: {problem or 'files can be written and replaced'}"
    return [make_finding("run folder", level, message, "fix its permissions, or set run.dir to another disk")]


def _file_system_problem(folder: Path) -> str | None:
    target, temporary = folder / "target", folder / "temporary"
    try:
        target.write_bytes(b"old")
        with temporary.open("wb") as file:
            file.write(b"new")
            os.fsync(file.fileno())
        temporary.replace(target)
        if target.read_bytes() != b"new":
            return "replacing a file has no effect"
        with suppress(FileExistsError):
            target.open("xb").close()
            return "a file that exists can be created again, so that two runs could use one folder"
    except OSError as error:
        return f"writing fails ({error.strerror})"
    return None


def check_memory(context: DoctorContext) -> list[Finding]:
    """Check that the memory is enough for all processes, by the measured need of one."""
    step = context.measured.get("training step", {})
    measured = step.get("peak_bytes") if step.get("memory_bytes") is None else None  # else it is GPU memory
    available, each = available_memory(), measured or 2 * _GIB
    level: Level = "green" if available >= 1.5 * context.processes * each else "yellow"
    if measured and available < 0.75 * context.processes * each:
        level = "red"
    message = (
        f"{format_bytes(available)} available; {context.processes} x {format_bytes(each)} needed, "
        f"{'as measured' if measured else 'as an estimate'}"
    )
    remedy = "use train.micro_batch_size auto, fewer data.num_workers, a smaller --nproc, or more memory (--mem)"
    return [make_finding("memory", level, message, remedy)]


def check_disk(context: DoctorContext) -> list[Finding]:
    """Check that the run folder's disk has room for the checkpoints."""
    folder = nearest_existing(context.run)
    free = shutil.disk_usage(folder).free
    needed = context.measured.get("model", {}).get("checkpoints_bytes")
    least = needed if needed is not None else 512 * _MIB
    level: Level = "red" if free < least else "yellow" if free < 2 * least + 256 * _MIB else "green"
    message = f"{format_bytes(free)} free at {folder}"
    message += f"; the checkpoints need {format_bytes(needed)}" if needed is not None else ""
    remedy = "free some space, set run.dir to another disk, or use checkpoint.keep_last 1"
    return [make_finding("disk", level, message, remedy)]


def check_shared_memory(context: DoctorContext) -> list[Finding]:
    """Check that the data-loading workers have room for their batches in shared memory."""
    workers = context.processes * int(context.measured.get("model", {}).get("workers", 2))
    folder = Path("/dev/shm")  # noqa: S108 (nothing is written there)
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    level: Level = "red" if workers and free < 64 * _MIB else "yellow" if free < 512 * _MIB else "green"
    message = f"{format_bytes(free)} free in /dev/shm, for {workers} data-loading workers"
    remedy = "start the container with --shm-size 2g or --ipc host, or use --data.num_workers 0"
    return [make_finding("shared memory", level, message, remedy)]
