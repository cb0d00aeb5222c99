"""Measure programs in fresh processes, and compare them by median ratios with an interval."""

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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
PEERS = {
    "d2l_loop": None,
    "torchvision_loop": None,
    "timm_train": "timm",
    "accelerate_loop": None,
    "lightning_trainer": "lightning",
    "hf_trainer": "transformers",
    "fastai_learner": "fastai",
}
"""Program of benchmarks/peers beside regraft -> the package that it needs besides torch."""


@dataclass(frozen=True, kw_only=True)
class Program:
    """A program of benchmarks/peers and its options (`benchmarks.peers.common.Settings`)."""

    name: str
    precision: str = "default"
    layout: str = "default"
    model: str = "resnet18"
    weights: Path | None = None
    trainable: str = "all"
    fixed_views: bool = False
    epochs: int = 3
    batch_size: int = 64
    lr: float = 1e-3
    reduction: str = "mean"
    config: Path | None = None
    extra: tuple[str, ...] = ()
    """More options of regraft, as `data.cache_images=off`."""
    workers: int = 0
    threads: int
    """CPU threads per process."""
    ranks: int = 1
    """Number of processes, started by torchrun."""

    def __str__(self) -> str:
        precision = "" if self.precision == "default" else f":{self.precision}"
        parts = [self.name + precision, self.model]
        parts += [] if self.trainable == "all" else [self.trainable]
        parts += ["fixed views"] if self.fixed_views else []
        parts += [f"{self.ranks} ranks"] if self.ranks > 1 else []
        parts += self.extra
        return " ".join(parts)

    def options(self) -> list[str]:
        """Return the command-line options."""
        values = {
            "precision": self.precision,
            "layout": self.layout,
            "model": self.model,
            "weights": self.weights,
            "trainable": self.trainable,
            "epochs": self.epochs,
            "batch-size": self.batch_size,
            "lr": self.lr,
            "reduction": self.reduction,
            "config": self.config,
            "workers": self.workers,
            "threads": self.threads,
        }
        options = [f"--{key}={value}" for key, value in values.items() if value is not None]
        options += [f"--extra={option}" for option in self.extra]
        return [*options, *["--fixed-views"] * self.fixed_views]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one run of a program measured."""

    first: float
    """Images per second of the first epoch."""
    later: float
    """Images per second of the other epochs; of the first one if there is no other."""
    accuracy: float
    """Accuracy after the last epoch."""
    cold: float
    """Seconds from the end of the imports to the end, without the training of the later epochs."""
    work: float
    """Seconds from the end of the imports to the end."""
    seconds: float
    """Seconds from the command to its end."""


def run(program: Program, data: Path, *, seed: int = 0) -> Result:
    """Run a program in a fresh process, with an empty cache folder."""
    start = [sys.executable]
    if program.ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={program.ranks}"]
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "record.json"
        options = [f"--data-root={data.absolute()}", f"--record={record}", f"--seed={seed}", *program.options()]
        environment = {
            **os.environ,
            "REGRAFT_CACHE": str(Path(folder) / "cache"),
            "OMP_NUM_THREADS": str(program.threads),
            "PYTHONPATH": os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH")))),
        }
        began = time.perf_counter()
        done = subprocess.run(
            [*start, "-m", f"benchmarks.peers.{program.name}", *options],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        seconds = time.perf_counter() - began
        if done.returncode:
            raise SystemExit(f"{program} failed:\n{done.stdout}{done.stderr}")
        written = json.loads(record.read_text())
    first, *later = written["epochs"]
    later_seconds = sum(row["seconds"] for row in later)
    first_rate = first["images"] / first["seconds"]
    return Result(
        first=first_rate,
        later=sum(row["images"] for row in later) / later_seconds if later else first_rate,
        accuracy=[first, *later][-1]["accuracy"],
        cold=written["seconds"] - later_seconds,
        work=written["seconds"],
        seconds=seconds,
    )


def median_interval(ratios: Sequence[float]) -> tuple[float, float, float]:
    """Return the median and its 95 % interval by the bootstrap."""
    return _interval(ratios, statistics.median)


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean and its 95 % interval by the bootstrap."""
    return _interval(values, statistics.fmean)


def _interval(
    values: Sequence[float], statistic: Callable[[Sequence[float]], float], resamples: int = 2000
) -> tuple[float, float, float]:
    random_ = random.Random(0)
    drawn = sorted(statistic(random_.choices(values, k=len(values))) for _ in range(resamples))
    return statistic(values), drawn[int(0.025 * resamples)], drawn[int(0.975 * resamples)]


def interleaved(
    runs: Mapping[str, Program], data: Path, *, rounds: int, after_round: Callable[[dict[str, list[Result]]], None]
) -> dict[str, list[Result]]:
    """Run every program once per round, in a random order, and print each result.

    Args:
        runs: label -> program. The same program under two labels is an A/A control: its ratio is 1 but for noise.
        data: image folder.
        rounds: number of rounds; the number of a round is the seed of its runs.
        after_round: called with the results so far after every round.

    """
    results: dict[str, list[Result]] = {label: [] for label in runs}
    random_ = random.Random(0)
    for number in range(rounds):
        for label in random_.sample(list(runs), len(runs)):
            result = run(runs[label], data, seed=number)
            results[label].append(result)
            print(
                f"round {number + 1}: {label:40} {result.later:8.1f} images/s, first epoch {result.first:8.1f}, "
                f"accuracy {result.accuracy:.3f}, {result.seconds:.1f} s",
                flush=True,
            )
        after_round(results)
    return results


def default_workers(name: str, threads: int) -> int:
    """Return the loader workers of a program: timm decodes in worker processes (`-j`), the others in the loop."""
    return threads if name == "timm_train" else 0


def is_installed(package: str | None) -> bool:
    """Return whether a package can be imported; None stands for what regraft itself needs."""
    return package is None or importlib.util.find_spec(package) is not None


def installed_peers() -> list[str]:
    """Return the programs that can run here."""
    return [name for name, package in PEERS.items() if is_installed(package)]


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


def cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0))
