"""What checkpoints cost: one run that writes one after every second epoch; each such epoch beside its neighbours.

    python benchmarks/checkpoint.py                       # resnet18, bf16, drawn pictures of 500 x 375
    python benchmarks/checkpoint.py --precision fp32 --images 512

An epoch's time is that from the row of the epoch before to its own row in metrics.jsonl: the copy of the state, what
the writing thread takes from the training, the training and the evaluation. The checkpoint after epoch 2 falls into
epoch 3, so that epoch 3 is compared with the mean of epochs 2 and 4, epoch 5 with that of 4 and 6, and so on: a
machine's changing mood falls out. One epoch's time against another's is also what it costs to save after each.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import torch
import torchvision
from throughput import REPOSITORY, draw_photographs

_SECONDS_BETWEEN_LOOKS = 0.02


def epochs_end(data: Path, arguments: argparse.Namespace) -> list[float]:
    """Train; return when the row of each epoch came, in seconds."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        options = {
            "run.dir": folder,
            "run.threads": arguments.threads,
            "data.root": data,
            "data.image_size": 224,
            "model.name": arguments.model,
            "model.weights": "null",
            "train.precision": arguments.precision,
            "train.batch_size": 32,
            "train.epochs": 2 * arguments.pairs + 2,
            "checkpoint.every": "2epochs",
            "checkpoint.keep_best": "false",
        }
        program = [sys.executable, str(REPOSITORY / "trainer" / "main.py")]
        command = [*program, *(f"--{key}={value}" for key, value in options.items())]
        ends: list[float] = []
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None:
                found = epochs_in(Path(folder) / "metrics.jsonl")
                ends += [time.monotonic()] * (found - len(ends))
                time.sleep(_SECONDS_BETWEEN_LOOKS)
        if process.returncode:
            raise SystemExit(process.returncode)
        return ends


def epochs_in(metrics: Path) -> int:
    """Return how many epochs have their row."""
    rows = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    return sum(json.loads(row)["kind"] == "epoch" for row in rows if row.endswith("\n"))


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description="What checkpoints cost a training run.")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--images", type=int, default=512, help="pictures drawn, so an epoch's length")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--folder", help="where the run is written; default: the system's temporary folder")
    arguments = parser.parse_args()

    print(
        f"{arguments.model}, {arguments.precision}, epochs of {arguments.images} images, "
        f"{arguments.threads} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        ends = epochs_end(draw_photographs(Path(folder), train=arguments.images), arguments)
    seconds = [after - before for before, after in pairwise(ends)]  # epochs 2, 3, 4, ...
    ratios = []
    for before, saved, after in zip(seconds[::2], seconds[1::2], seconds[2::2], strict=False):
        ratios.append(2 * saved / (before + after))
        print(
            f"{saved:6.2f} s beside a checkpoint's writing, {before:6.2f} and {after:6.2f} s before and after, "
            f"ratio {ratios[-1]:.3f}"
        )
    print(
        f"ratio {statistics.median(ratios):.3f} in the median of {len(ratios)} ({min(ratios):.3f} to "
        f"{max(ratios):.3f}), {statistics.mean(ratios):.3f} in the mean "
        f"(standard error {statistics.stdev(ratios) / len(ratios) ** 0.5:.3f})"
    )


if __name__ == "__main__":
    main()
