"""Training speed of regraft and of other programs: paired runs, median ratios with an interval, and an A/A control.

    pip install -e '.[bench]'
    python -m benchmarks peers --pairs 5
    python -m benchmarks peers --ours regraft:fp32 --peers d2l_loop:fp32 accelerate_loop:fp32     # equal arithmetic

Each run is a fresh process. A program whose package is not installed is left out.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.images import write_photographs

REPOSITORY = Path(__file__).resolve().parent.parent
PEERS = {
    "regraft": None,
    "d2l_loop": None,
    "timm_train": "timm",
    "accelerate_loop": None,
    "lightning_trainer": "lightning",
    "hf_trainer": "transformers",
    "fastai_learner": "fastai",
}
"""Program of benchmarks/peers -> the package that it needs besides torch."""


@dataclass(frozen=True)
class Result:
    """What one run of a program measured."""

    first: float
    """Images per second of the first epoch."""
    later: float
    """Images per second of the other epochs."""
    accuracy: float
    """Accuracy after the last epoch."""
    seconds: float
    """From the command to its end."""


def run(peer: str, options: list[str]) -> Result:
    """Run a program in a fresh process."""
    name, _, precision = peer.partition(":")
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        command = [sys.executable, "-m", f"benchmarks.peers.{name}", f"--record={record}", *options]
        if precision:
            command.append(f"--precision={precision}")
        environment = os.environ | {"REGRAFT_CACHE": str(Path(folder) / "cache")}
        began = time.perf_counter()
        done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{peer} failed:\n{done.stdout}{done.stderr}")
        first, *later = json.loads(record.read_text())["epochs"]
    return Result(
        first["images"] / first["seconds"],
        sum(row["images"] for row in later) / sum(row["seconds"] for row in later),
        (later or [first])[-1]["accuracy"],
        seconds,
    )


def median_interval(ratios: list[float], *, resamples: int = 2000) -> tuple[float, float, float]:
    """Return the median of ratios and its 95 % interval by the bootstrap."""
    random_ = random.Random(0)
    medians = sorted(statistics.median(random_.choices(ratios, k=len(ratios))) for _ in range(resamples))
    return statistics.median(ratios), medians[int(0.025 * resamples)], medians[int(0.975 * resamples)]


def versions() -> str:
    """Return the versions of the packages that are compared."""
    names = ["torch", "torchvision", "accelerate", *(package for package in PEERS.values() if package)]
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return f"Python {platform.python_version()}, {', '.join(found)}"


def processor() -> str:
    """Return the name of the processor and the number of cores that this process may use."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(": ")[2] for line in text.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument(
        "--peers",
        nargs="+",
        default=[name for name, package in PEERS.items() if name != "regraft" and is_installed(package)],
        help="programs to compare with, each with an optional precision, as in d2l_loop:fp32; default: all installed",
    )
    parser.add_argument("--ours", default="regraft", help="regraft or regraft:PRECISION (default: its own choice)")
    parser.add_argument("--data-root", type=Path, help="image folder with train/ and val/; default: drawn photographs")
    parser.add_argument("--images", type=int, default=256, help="number of drawn training images")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", type=Path, help="pretrained weights (.safetensors); default: random weights")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--trainable", choices=("all", "last", "head"), default="all")
    parser.add_argument("--fixed-views", action="store_true", help="train without random crops")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--workers", type=int, default=0, help="loader workers of the other programs")
    parser.add_argument("--pairs", type=int, default=5)


def is_installed(package: str | None) -> bool:
    """Return whether a package can be imported; None stands for what regraft itself needs."""
    return package is None or importlib.util.find_spec(package) is not None


def main(arguments: argparse.Namespace) -> None:
    """Run and print the comparison. In each round every program runs once, in a random order."""
    with tempfile.TemporaryDirectory() as folder:
        data = arguments.data_root or write_photographs(Path(folder), train=arguments.images)
        options = [f"--data-root={data.absolute()}"]
        for name in ("model", "weights", "epochs", "batch_size", "lr", "trainable", "threads", "workers"):
            if (value := getattr(arguments, name)) is not None:
                options.append(f"--{name.replace('_', '-')}={value}")
        options += ["--fixed-views"] * arguments.fixed_views
        print(f"{processor()}; {versions()}\n{' '.join(sys.argv[1:])}", flush=True)
        # The A/A control: the same program twice, whose ratio is 1 but for noise.
        runs = [arguments.ours, *arguments.peers, f"{arguments.ours} again"]
        results: dict[str, list[Result]] = {name: [] for name in runs}
        random_ = random.Random(0)
        for number in range(arguments.pairs):
            for name in random_.sample(runs, len(runs)):
                result = run(name.removesuffix(" again"), options)
                results[name].append(result)
                print(
                    f"round {number + 1}: {name:24} {result.later:7.1f} images/s, first epoch {result.first:7.1f}, "
                    f"accuracy {result.accuracy:.3f}, {result.seconds:.1f} s",
                    flush=True,
                )
    print(f"\nratios {arguments.ours} / other: median (95 % interval) of {arguments.pairs} rounds")
    for name in runs[1:]:
        columns = []
        for label, ratio in (
            ("training", lambda a, b: a.later / b.later),
            ("first epoch", lambda a, b: a.first / b.first),
            ("whole command", lambda a, b: b.seconds / a.seconds),
        ):
            median, low, high = median_interval(
                [ratio(a, b) for a, b in zip(results[arguments.ours], results[name], strict=True)]
            )
            columns.append(f"{label} {median:.2f} ({low:.2f} to {high:.2f})")
        accuracy = statistics.median(result.accuracy for result in results[name])
        print(f"  {name:24} {', '.join(columns)}; accuracy {accuracy:.3f}")
    print(f"  accuracy of {arguments.ours}: {statistics.median(r.accuracy for r in results[arguments.ours]):.3f}")
