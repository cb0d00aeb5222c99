"""Throughput of training from JPEG files, compared with plain torch on one batch in memory.

    python -m benchmarks throughput                       # resnet18, fp32 and bf16, synthetic images of 500 x 375
    python -m benchmarks throughput --data-root FOLDER --precisions bf16 --pairs 5

Both train the same model with the same batch size, memory layout, precision and number of threads. regraft's
throughput includes decoding and augmentation, and excludes evaluation and the first epoch. The other one is that of
`python -m benchmarks resident`. The two run in turn, and the ratio of each pair is reported, which cancels slow changes
of the machine's speed.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.images import write_photographs
from benchmarks.measure import REPOSITORY, cores, processor, versions


def train(data: Path, arguments: argparse.Namespace, precision: str) -> float:
    """Return regraft's throughput in images per second."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "run.dir": folder,
            "run.threads": arguments.threads,
            "data.root": data,
            "data.image_size": 224,
            "data.num_workers": "null" if arguments.num_workers is None else arguments.num_workers,
            "model.name": arguments.model,
            "model.weights": "null",
            "optim.momentum": 0.0,
            "train.precision": precision,
            "train.batch_size": arguments.batch_size,
            "train.epochs": arguments.epochs,
        }
        program = [sys.executable, str(REPOSITORY / "trainer" / "main.py")]
        command = [*program, *(f"--{key}={value}" for key, value in options.items())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = map(json.loads, (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        epochs = [row for row in rows if row["kind"] == "epoch"][1:]
        return float(sum(row["train_seen"] for row in epochs) / sum(row["seconds"] for row in epochs))


def resident(arguments: argparse.Namespace, precision: str, updates: int) -> float:
    """Return the throughput of the resident batch in images per second."""
    options = {
        "--model": arguments.model,
        "--batch-size": arguments.batch_size,
        "--precision": precision,
        "--threads": arguments.threads,
        "--updates": updates,
    }
    command = [sys.executable, "-m", "benchmarks", "resident"]
    command += [str(word) for option in options.items() for word in option]
    return float(subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True, text=True).stdout)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--data-root", type=Path, help="image folder; default: synthetic images")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=192, help="number of synthetic images")
    parser.add_argument("--epochs", type=int, default=3, help="number of epochs; the first is not counted")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--num-workers", type=int, help="option data.num_workers; default: chosen by regraft")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])


def main(arguments: argparse.Namespace) -> None:
    """Measure and print the ratios."""
    print(f"{arguments.model}, batches of {arguments.batch_size}, {arguments.threads} threads")
    print(f"{processor()}; {versions()}")
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data_root or write_photographs(Path(folder), train=arguments.images)
        updates = max(4, (arguments.epochs - 1) * arguments.images // arguments.batch_size)
        for precision in arguments.precisions:
            ratios = []
            for _ in range(arguments.pairs):
                ours, reference = train(data, arguments, precision), resident(arguments, precision, updates)
                ratios.append(ours / reference)
                print(
                    f"{precision}: {ours:6.1f} images/s end to end, {reference:6.1f} resident, ratio {ratios[-1]:.3f}"
                )
            print(
                f"{precision}: median ratio {statistics.median(ratios):.3f} of {len(ratios)} pairs "
                f"({min(ratios):.3f} to {max(ratios):.3f})",
                flush=True,
            )
