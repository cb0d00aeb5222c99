"""Measure for `regraft doctor` what needs torch; prints one JSON object per line.

    python trainer/commands/probe.py measure FOLDER PROCESSES [options]   torch's build, decoding, a training step
    torchrun ... trainer/commands/probe.py allreduce BYTES [cpu]          a sum between processes

Each line names its `probe`; if a measurement fails, it has an `error`, and the others continue. Nothing is downloaded,
and files are written only to FOLDER.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]
    from regraft.search_path import protect_imports

    protect_imports()

import json
import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch

from trainer.distributed.signals import exit_with_parent


def report(probe: str, measure: Callable[[], dict[str, Any]]) -> bool:
    """Print what `measure` returns, or the error that it raises; return whether it succeeded."""
    try:
        values = measure()
    except Exception as error:  # noqa: BLE001 (the doctor reports it)
        name = "" if type(error).__name__ == "UserError" else f"{type(error).__name__}: "
        values = {"error": f"{name}{error}"[:2000]}
    print(json.dumps({"probe": probe, **values}), flush=True)
    return "error" not in values


def torch_build() -> dict[str, Any]:
    """Return torch's build, and the GPUs that it can use."""
    gpus = []
    # device_count() alone counts GPUs whose driver is too old.
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, memory = torch.cuda.mem_get_info(i)
        gpus.append({"name": torch.cuda.get_device_name(i), "memory": memory, "free": free})
    return {"torch": torch.__version__, "cuda": torch.version.cuda, "hip": torch.version.hip, "gpus": gpus}


def torchvision_operators() -> dict[str, Any]:
    """Run an operator of torchvision, which fails if it was built for another torch."""
    import torchvision  # noqa: PLC0415

    torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.tensor([1.0]), 0.5)
    return {"torchvision": torchvision.__version__}


def measure_run(folder: Path, processes: int, options: Sequence[str]) -> None:
    """Measure decoding and training steps of a run with these options."""
    report("torch", torch_build)
    report("torchvision", torchvision_operators)
    runs: list[Any] = []

    def configure() -> dict[str, Any]:
        from trainer.commands.measure import MeasuredRun  # noqa: PLC0415 (an error of this import is reported)

        runs.append(MeasuredRun(options, folder, processes=processes))
        return dict(runs[0].description)

    if report("config", configure):
        report("decoding", runs[0].decoding)
        if report("model", runs[0].build_model):
            report("training step", runs[0].step)


def all_reduce(size: int, *, on_cpu: bool) -> None:
    """Sum a tensor of `size` bytes over all processes of the launcher; rank 0 prints how long it takes."""
    device = torch.device("cpu")
    if torch.cuda.is_available() and not on_cpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, timeout=timedelta(seconds=60))
    rank, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
    tensor = torch.full((max(1, size // 4),), float(rank + 1), device=device)
    torch.distributed.all_reduce(tensor)
    correct = (tensor == processes * (processes + 1) / 2).all().int()
    torch.distributed.all_reduce(correct)
    tensor.zero_()
    repeats = 5
    start = time.perf_counter()
    for _ in range(repeats):
        torch.distributed.all_reduce(tensor)
    tensor[0].item()  # waits for the GPU
    seconds = (time.perf_counter() - start) / repeats
    values = {"processes": processes, "backend": backend, "correct": correct.item() == processes}
    if rank == 0:
        report("all-reduce", lambda: {**values, "bytes": tensor.numel() * 4, "seconds": seconds})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def main(argv: Sequence[str]) -> int:
    """Run the measurement on the command line."""
    exit_with_parent()
    verb, first, *rest = argv
    if verb == "measure":
        measure_run(Path(first), int(rest[0]), rest[1:])
    else:
        all_reduce(int(first), on_cpu="cpu" in rest)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # gloo's threads sometimes abort a process that exits normally, as in trainer/cli.py
