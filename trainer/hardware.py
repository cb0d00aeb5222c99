"""What one host is made of, from files of its kernel: no program is started, no GPU initialised that is not in use."""

import os
import platform
import socket
from pathlib import Path
from typing import Any

import torch

from trainer.distributed.context import available_cores
from trainer.text import escape_unprintable


def hardware(device: torch.device, *, proc: Path = Path("/proc")) -> dict[str, Any]:
    """Return host, processor, cores, memory [bytes], GPUs and driver; what cannot be found is None."""
    return {
        "host": socket.gethostname(),
        "cpu": _cpu(proc),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "affinity": len(os.sched_getaffinity(0)),
        "usable_cores": available_cores(),
        "memory": _memory(proc),
        "gpus": _gpus(device, proc),
        "driver": _driver(proc),
    }


def _cpu(proc: Path) -> str | None:
    for line in _lines(proc / "cpuinfo"):
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model", "CPU part"):
            return escape_unprintable(value.strip())
    return None


def _memory(proc: Path) -> int | None:
    for line in _lines(proc / "meminfo"):
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    return None


def _gpus(device: torch.device, proc: Path) -> list[dict[str, Any]]:
    """Return the GPUs that torch sees where the run uses them, else those that the driver names."""
    if device.type == "cuda":
        found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return [
            {"name": one.name, "memory": one.total_memory, "capability": f"{one.major}.{one.minor}"}
            for one in found
        ]
    names: list[dict[str, Any]] = []
    for path in sorted(proc.glob("driver/nvidia/gpus/*/information")):
        for line in _lines(path):
            name, _, value = line.partition(":")
            if name == "Model":
                names.append({"name": escape_unprintable(value.strip())})
    return names


def _driver(proc: Path) -> str | None:
    """Return the NVIDIA kernel module's version: `NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05 ...`."""
    for line in _lines(proc / "driver" / "nvidia" / "version"):
        if line.startswith("NVRM"):
            return next((word for word in line.split() if word[:1].isdigit() and "." in word), None)
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
