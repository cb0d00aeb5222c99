"""What this machine has, found without torch."""

import os
from collections.abc import Mapping
from pathlib import Path


def cores() -> int:
    """Return the CPU cores open to this process: its affinity, or its container's quota where that is less."""
    found = len(os.sched_getaffinity(0))
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, _, period = quota.read_text(encoding="ascii").strip().partition(" ")
        if limit.isdigit() and period.isdigit():
            found = min(found, max(1, int(limit) // int(period)))
    return found


def gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """Return the NVIDIA GPUs that CUDA will show to this process."""
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    there = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    if visible is None:
        return there
    named = [part.strip() for part in visible.split(",") if part.strip()]
    if "-1" in named:  # CUDA ends the list there
        named = named[: named.index("-1")]
    return min(len(named), there)
