"""Training speed of regraft and of other programs: interleaved runs, median ratios with an interval, an A/A control.

    pip install -e '.[bench]'
    python -m benchmarks peers --tier best       # each tuned as its documentation says
    python -m benchmarks peers --tier equal      # fp32, channels_last and the same updates for all

Each run is a fresh process. A program whose package is not installed is left out. `--peers d2l_loop:fp32 ...` chooses
programs, each with an optional precision that replaces the tier's.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from benchmarks.images import write_photographs
from benchmarks.measure import (
    Program,
    Result,
    cores,
    default_workers,
    installed_peers,
    interleaved,
    mean_interval,
    median_interval,
    processor,
    versions,
)
from benchmarks.scenarios import METRICS

BEST_PRECISION = {
    "torchvision_loop": "bf16",
    "accelerate_loop": "bf16",
    "lightning_trainer": "bf16",
    "hf_trainer": "bf16",
}
"""What a program's documentation recommends; the others choose by themselves, and the D2L loop trains in fp32."""
CONTROL = " again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--tier", choices=("best", "equal"), default="best", help="best of each, or equal arithmetic")
    parser.add_argument(
        "--peers",
        nargs="+",
        default=installed_peers(),
        help="programs to compare with, each with an optional precision, as in d2l_loop:bf16; default: all installed",
    )
    parser.add_argument("--ours", default="regraft", help="regraft or regraft:PRECISION (default: by the tier)")
    parser.add_argument("--data-root", type=Path, help="image folder with train/ and val/; default: drawn photographs")
    parser.add_argument("--images", type=int, default=256, help="number of drawn training images")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", type=Path, help="pretrained weights (.safetensors); default: random weights")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--trainable", choices=("all", "last", "head"), default="all")
    parser.add_argument("--fixed-views", action="store_true", help="train without random crops")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--workers", type=int, help="loader workers of the other programs; default: 0, timm: --threads")
    parser.add_argument("--pairs", type=int, default=5)


def tier_program(text: str, arguments: argparse.Namespace) -> Program:
    """Return the program NAME or NAME:PRECISION with the options of the command line and of the tier."""
    name, _, precision = text.partition(":")
    is_equal = arguments.tier == "equal"
    return Program(
        name=name,
        precision=precision or ("fp32" if is_equal else BEST_PRECISION.get(name, "default")),
        layout="channels_last" if is_equal else "default",
        model=arguments.model,
        weights=arguments.weights and arguments.weights.absolute(),
        trainable=arguments.trainable,
        fixed_views=arguments.fixed_views,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        lr=arguments.lr,
        workers=default_workers(name, arguments.threads) if arguments.workers is None else arguments.workers,
        threads=arguments.threads,
    )


def main(arguments: argparse.Namespace) -> None:
    """Run and print the comparison. In each round every program runs once, in a random order."""
    ours = arguments.ours
    names = [ours, *arguments.peers, ours + CONTROL]
    runs = {name: tier_program(name.removesuffix(CONTROL), arguments) for name in names}
    print(f"{processor()}; {versions()}\n{' '.join(sys.argv[1:])}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data_root or write_photographs(Path(folder), train=arguments.images)
        results = interleaved(runs, data, rounds=arguments.pairs, after_round=lambda _: None)
    print(f"\nratios {ours} / other, tier {arguments.tier}: median (95 % interval) of {arguments.pairs} rounds")
    for name in names[1:]:
        print(f"  {name:24} {describe_ratios(results[ours], results[name])}")
    print(f"  accuracy of {ours}: {statistics.fmean(result.accuracy for result in results[ours]):.3f}")


def describe_ratios(ours: list[Result], others: list[Result]) -> str:
    """Return the ratios of two programs, and the accuracy of the other one with its interval."""
    columns = []
    for name in ("training", "first epoch", "command"):
        median, low, high = median_interval([METRICS[name](a, b) for a, b in zip(ours, others, strict=True)])
        columns.append(f"{name} {median:.2f} ({low:.2f} to {high:.2f})")
    mean, low, high = mean_interval([result.accuracy for result in others])
    return f"{', '.join(columns)}; accuracy {mean:.3f} ({low:.3f} to {high:.3f})"
