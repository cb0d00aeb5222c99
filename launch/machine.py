"""GPUs of this machine, found without importing torch, and the number of processes to start."""

from collections.abc import Mapping
from pathlib import Path

from regraft.contract import available_cores, physical_cores

CORES_PER_PROCESS = 8
"""A process gains little from more threads than this, so more cores get a second process."""


def gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> int:
    """Return the number of NVIDIA GPUs that CUDA will show to this process."""
    installed = sum(path.name.removeprefix("nvidia").isdigit() for path in devices.glob("nvidia*"))
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return installed
    ids = [part.strip() for part in visible.split(",") if part.strip()]
    if "-1" in ids:  # CUDA ignores this id and all after it
        ids = ids[: ids.index("-1")]
    return min(len(ids), installed)


def usable_cores(gpus: int) -> int:
    """Return how many cores the processes share: the physical ones if they train on them, all of them beside GPUs."""
    return available_cores() if gpus else physical_cores()


def processes_and_threads(nproc: int | None, *, gpus: int, cores: int) -> tuple[int, int]:
    """Return the number of processes, and the CPU threads of each.

    By default (`nproc` is None) one process is started for each GPU, or for every 8 cores where there is no GPU.
    """
    processes = nproc or gpus or max(1, cores // CORES_PER_PROCESS)
    threads = max(1, cores // processes)
    return processes, threads if not gpus else max(1, threads // 2)  # the other half decodes images
