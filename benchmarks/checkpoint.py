"""Overhead of checkpoints: a run saves one after every second epoch; these epochs are compared with their neighbors.

    python -m benchmarks checkpoint                       # resnet18, bf16, synthetic images of 500 x 375
    python -m benchmarks checkpoint --precision fp32 --images 512

The time of an epoch is measured between two rows of metrics.jsonl. It includes training, evaluation, the copy of the
state, and what the writing thread takes from training. The checkpoint after epoch 2 is written during epoch 3, so epoch
3 is compared with the mean of epochs 2 and 4, epoch 5 with that of 4 and 6, and so on, which cancels slow changes of
the machine's speed. The ratio is also the overhead of saving after every epoch.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from benchmarks.images import write_photographs
from benchmarks.measure import REPOSITORY, cores, processor, versions

_SECONDS_BETWEEN_READS = 0.02


def epoch_ends(data: Path, arguments: argparse.Namespace) -> list[float]:
    """Train; return the time at which each epoch ended, in seconds."""
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
                count = count_epochs(Path(folder) / "metrics.jsonl")
                ends += [time.monotonic()] * (count - len(ends))
                time.sleep(_SECONDS_BETWEEN_READS)
        if process.returncode:
            raise SystemExit(process.returncode)
        return ends


def count_epochs(metrics: Path) -> int:
    """Return the number of complete epoch rows."""
    rows = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    return sum(json.loads(row)["kind"] == "epoch" for row in rows if row.endswith("\n"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--images", type=int, default=512, help="number of synthetic images of an epoch")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--folder", help="parent of the run folder; default: the system's temporary folder")


def main(arguments: argparse.Namespace) -> None:
    """Measure and print the ratios."""
    print(
        f"{arguments.model}, {arguments.precision}, epochs of {arguments.images} images, "
        f"{arguments.threads} threads; {processor()}; {versions()}"
    )
    with tempfile.TemporaryDirectory() as folder:
        ends = epoch_ends(write_photographs(Path(folder), train=arguments.images), arguments)
    seconds = [after - before for before, after in pairwise(ends)]  # epochs 2, 3, 4, ...
    ratios = []
    for before, saved, after in zip(seconds[::2], seconds[1::2], seconds[2::2], strict=False):
        ratios.append(2 * saved / (before + after))
        print(
            f"{saved:6.2f} s with a checkpoint, {before:6.2f} and {after:6.2f} s for the epochs before and after, "
            f"ratio {ratios[-1]:.3f}"
        )
    print(summary(ratios))


def summary(ratios: list[float]) -> str:
    """Return median, range and mean of the ratios; of two or more also the standard error of the mean."""
    mean = f"mean {statistics.mean(ratios):.3f}"
    if len(ratios) > 1:
        mean += f" (standard error {statistics.stdev(ratios) / len(ratios) ** 0.5:.3f})"
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return f"median ratio {statistics.median(ratios):.3f} of {len(ratios)} ({spread}), {mean}"
