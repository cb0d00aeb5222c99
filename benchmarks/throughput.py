"""regraft's training end to end, from JPEG files, beside one resident batch in plain torch: pairs, in turn.

    python benchmarks/throughput.py                       # resnet18, fp32 and bf16, drawn pictures of 500 x 375
    python benchmarks/throughput.py --data-root FOLDER --precisions bf16 --pairs 5

Both train the same model on batches of the same size, in the same layout, precision and number of threads.
regraft's figure is `examples_per_sec` of its epochs but the first (decoding, augmentation and all; evaluation
lies outside); the other's is that of benchmarks/resident.py. What counts is the ratio of each pair: these run
one right after the other, so that a machine's changing mood falls out.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

REPOSITORY = Path(__file__).resolve().parent.parent


def draw_photographs(folder: Path, *, train: int, seed: int = 0) -> Path:
    """Write JPEG files of 500 x 375 pixels with detail at every scale, about as hard to decode as photographs."""
    random = np.random.default_rng(seed)
    for part, count in (("train", train), ("val", 4)):
        for name in ("a", "b"):
            (folder / part / name).mkdir(parents=True)
            for i in range(count // 2):
                picture = np.zeros((375, 500, 3))
                for side in (4, 16, 64, 375):
                    noise = random.normal(0, 45 * (4 / side) ** 0.3, (side, side, 3))
                    shown = Image.fromarray(np.clip(noise + 128, 0, 255).astype(np.uint8)).resize((500, 375))
                    picture += np.asarray(shown, dtype=float) - 128
                image = Image.fromarray(np.clip(picture + 128, 0, 255).astype(np.uint8))
                image.save(folder / part / name / f"{i:03}.jpg", quality=85)
    return folder


def train(data: Path, arguments: argparse.Namespace, precision: str) -> float:
    """Return regraft's images a second."""
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "run.dir": folder,
            "run.threads": arguments.threads,
            "data.root": data,
            "data.image_size": 224,
            "data.num_workers": "null" if arguments.workers is None else arguments.workers,
            "model.name": arguments.model,
            "model.weights": "null",
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
    """Return images a second of the resident batch."""
    options = {
        "--model": arguments.model,
        "--batch-size": arguments.batch_size,
        "--precision": precision,
        "--threads": arguments.threads,
        "--updates": updates,
    }
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "resident.py")]
    command += [str(part) for option in options.items() for part in option]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description="regraft end to end beside one resident batch.")
    parser.add_argument("--data-root", type=Path, help="image folder; default: pictures drawn for this run")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=192, help="pictures drawn")
    parser.add_argument("--epochs", type=int, default=3, help="the first is not counted")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, help="as data.num_workers; default: as regraft chooses")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    arguments = parser.parse_args()

    print(
        f"{arguments.model}, batches of {arguments.batch_size}, {arguments.threads} threads; Python "
        f"{platform.python_version()}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    )
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data_root or draw_photographs(Path(folder), train=arguments.images)
        updates = max(4, (arguments.epochs - 1) * arguments.images // arguments.batch_size)
        for precision in arguments.precisions:
            ratios = []
            for _ in range(arguments.pairs):
                ours, best = train(data, arguments, precision), resident(arguments, precision, updates)
                ratios.append(ours / best)
                print(
                    f"{precision}: {ours:6.1f} images/s end to end, {best:6.1f} resident, ratio {ratios[-1]:.3f}"
                )
            print(
                f"{precision}: ratio {statistics.median(ratios):.3f} in the median of {len(ratios)} pairs "
                f"({min(ratios):.3f} to {max(ratios):.3f})",
                flush=True,
            )


if __name__ == "__main__":
    main()
