"""What checkpoints cost: the same training with one every epoch, and with none but the last; pairs, in turn.

    python benchmarks/checkpoint.py                       # resnet18, bf16, drawn pictures of 500 x 375
    python benchmarks/checkpoint.py --precision fp32 --pairs 5

The time is that of the whole run, from the config's being written to the attempt's end: training, evaluation, the
copies of the state, what the writing thread takes from the training, and the wait for it at the end.
"""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torchvision
from throughput import REPOSITORY, draw_photographs


def train(data: Path, arguments: argparse.Namespace, *, every: str) -> float:
    """Return the seconds that a run takes."""
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
            "train.epochs": arguments.epochs,
            "checkpoint.every": every,
            "checkpoint.keep_best": "false",
        }
        program = [sys.executable, str(REPOSITORY / "trainer" / "main.py")]
        command = [*program, *(f"--{key}={value}" for key, value in options.items())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        end = (Path(folder) / "attempts" / "0001.json").stat().st_mtime
        return end - (Path(folder) / "config.yaml").stat().st_mtime


def main() -> None:
    """Measure, and print the ratios."""
    parser = argparse.ArgumentParser(description="What checkpoints cost a training run.")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--images", type=int, default=256, help="pictures drawn, so an epoch's length")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--folder", help="where runs are written; default: the system's temporary folder")
    arguments = parser.parse_args()

    print(
        f"{arguments.model}, {arguments.precision}, {arguments.epochs} epochs of {arguments.images} images, "
        f"{arguments.threads} threads; Python {platform.python_version()}, torch {torch.__version__}, "
        f"torchvision {torchvision.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        data = draw_photographs(Path(folder), train=arguments.images)
        ratios = []
        for number in range(arguments.pairs):
            order = (
                ("1 epoch", "null") if number % 2 else ("null", "1 epoch")
            )  # so that no side is always first
            seconds = {every: train(data, arguments, every=every) for every in order}
            ratios.append(seconds["1 epoch"] / seconds["null"])
            print(
                f"{seconds['1 epoch']:6.2f} s with a checkpoint every epoch, {seconds['null']:6.2f} s without, "
                f"ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(
        f"ratio {statistics.median(ratios):.3f} in the median of {len(ratios)} pairs "
        f"({min(ratios):.3f} to {max(ratios):.3f})"
    )


if __name__ == "__main__":
    main()
