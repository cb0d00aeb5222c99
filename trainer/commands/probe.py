"""What only torch can tell `regraft doctor` of a machine: one JSON object a line, as it is found.

    python trainer/commands/probe.py pace SCRATCH PROCESSES [options]   builds, reading, decoding, a step, writing
    torchrun ... trainer/commands/probe.py allreduce BYTES [cpu]        an exchange between processes

Each line names its `probe`; one that cannot be made holds an `error` instead of figures, and the others go on.
Files are written to SCRATCH alone, nothing is downloaded.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

if not __package__:
    # Run by path, Python puts this file's folder first on the search path: its modules must not pass for others.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch

from trainer.distributed.signals import exit_with_parent

_PATIENCE = timedelta(seconds=60)


def tell(probe: str, **found: Any) -> None:
    """Print one finding."""
    print(json.dumps({"probe": probe, **found}), flush=True)


def attempt(probe: str, find: Callable[[], dict[str, Any]]) -> None:
    """Tell what `find` returns, or the error that it ends with."""
    try:
        found = find()
    except Exception as error:  # noqa: BLE001 (whatever it is, it is what the doctor wants to know)
        tell(probe, error=_told(error))
    else:
        tell(probe, **found)


def _told(error: Exception) -> str:
    """Return an error as it is told: a user's own needs no name of a class."""
    name = "" if type(error).__name__ == "UserError" else f"{type(error).__name__}: "
    return f"{name}{error}"[:2000]


def build() -> dict[str, Any]:
    """Return torch's build, and the GPUs that it can use."""
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            one = torch.cuda.get_device_properties(i)
            gpus.append({"name": one.name, "memory": one.total_memory, "capability": [one.major, one.minor]})
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "gpus": gpus,
        "architectures": torch.cuda.get_arch_list() if gpus else [],
        "gloo": torch.distributed.is_available() and torch.distributed.is_gloo_available(),
        "nccl": torch.distributed.is_available() and torch.distributed.is_nccl_available(),
    }


def vision() -> dict[str, Any]:
    """Return torchvision's version; its operators are asked for, which another torch's do not load."""
    import torchvision  # noqa: PLC0415

    boxes, scores = torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0])
    torchvision.ops.nms(boxes, scores, 0.5)
    return {"torchvision": torchvision.__version__}


def pace(scratch: Path, processes: int, options: Sequence[str]) -> None:
    """Tell how fast a run of these options reads, decodes, trains and writes."""
    attempt("build", build)
    attempt("vision", vision)
    try:  # what is wrong with these imports is mostly told above
        from trainer.commands import measure  # noqa: PLC0415
        from trainer.config.parse import parse  # noqa: PLC0415
        from trainer.config.resolve import resolve  # noqa: PLC0415

        config = resolve(parse(options))
        sample = measure.sample(config, scratch)
    except Exception as error:  # noqa: BLE001 (as in `attempt`)
        tell("config", error=_told(error))
        return
    tell("config", model=config.model.name, batch_size=config.train.batch_size, images=sample.what)
    attempt("read", lambda: measure.reading(sample.paths))
    attempt("decode", lambda: measure.decoding(sample.images))
    try:
        model = measure.Model(config, processes=processes, classes=sample.classes)
    except Exception as error:  # noqa: BLE001 (as in `attempt`)
        tell("step", error=_told(error))
        return
    tell("model", **model.sizes())
    attempt("step", model.step)
    attempt("write", lambda: measure.writing(scratch, model.checkpoint_bytes))


def allreduce(size: int, *, on_cpu: bool) -> None:
    """Exchange `size` bytes between the processes of the launcher's group; rank 0 tells how fast."""
    local = int(os.environ["LOCAL_RANK"])
    on_gpu = not on_cpu and torch.cuda.is_available()
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=_PATIENCE)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    large = torch.full((max(1, size // 4),), float(rank + 1), device=device)
    small = torch.ones(2, device=device)

    def timed(tensor: torch.Tensor, count: int) -> float:
        torch.distributed.barrier()
        began = time.perf_counter()
        for _ in range(count):
            torch.distributed.all_reduce(tensor)
        if on_gpu:
            torch.cuda.synchronize(device)
        return (time.perf_counter() - began) / count

    timed(large, 1)
    expected = world_size * (world_size + 1) / 2
    right = bool((large == expected).all())
    large.fill_(0.0)
    once = torch.tensor([timed(large, 1)], device=device)
    torch.distributed.all_reduce(once, op=torch.distributed.ReduceOp.MAX)
    count = max(1, min(50, int(1.0 / max(1e-4, once.item()))))
    seconds, latency = timed(large, count), timed(small, 100)
    wrong = torch.tensor([int(not right)], device=device)
    torch.distributed.all_reduce(wrong)
    if rank == 0:
        tell(
            "allreduce",
            ranks=world_size,
            backend="nccl" if on_gpu else "gloo",
            right=wrong.item() == 0,
            bytes=large.numel() * 4,
            seconds=seconds,
            latency=latency,
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(argv: Sequence[str]) -> int:
    """Do what the command line asks for."""
    exit_with_parent()
    verb, *rest = argv
    if verb == "pace":
        pace(Path(rest[0]), int(rest[1]), rest[2:])
    else:
        allreduce(int(rest[0]), on_cpu="cpu" in rest[1:])
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)  # now and then gloo's threads abort a process that clears up; see main.leave
