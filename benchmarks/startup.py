"""Seconds from a command to the end of its first step, beside the import of torch, torchvision and accelerate.

    python -m benchmarks startup                 # python trainer/main.py, regraft train, accelerate launch
    python -m benchmarks startup --rounds 9

Each command trains SqueezeNet on eight small images. The first start also validates the images and measures precisions;
it is not counted. The commands run in turn. CPU seconds are those of the whole command: to the first step, and the rest
of an epoch of eight steps. They depend less on what else the machine does.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks.throughput import REPOSITORY

IMPORTS = "import torch, torchvision, accelerate"
_SECONDS_BETWEEN_READS = 0.01


class Start(NamedTuple):
    """What one command took."""

    seconds: float
    """Seconds to the end of the first step, or of the imports."""
    cpu_seconds: float
    """CPU seconds of the whole command."""


def write_images(folder: Path) -> Path:
    """Write eight images to train on and two to evaluate on."""
    random = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 1)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{number}.png")
    return folder


def commands(data: Path, cache: Path) -> dict[str, list[str]]:
    """Return name -> command without its run folder; the first one only imports."""
    options = {
        "data.root": data,
        "data.cache": cache,
        "data.image_size": 64,
        "model.name": "squeezenet1_1",
        "model.weights": "null",
        "train.batch_size": 1,
        "train.epochs": 1,
        "train.logs_per_epoch": 8,
    }
    words = [f"--{key}={value}" for key, value in options.items()]
    program = str(REPOSITORY / "trainer" / "main.py")
    launcher = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes=1"]
    return {
        IMPORTS: [sys.executable, "-c", IMPORTS],
        "python trainer/main.py": [sys.executable, program, *words],
        "regraft train": [sys.executable, "-m", "regraft", "train", *words],
        "accelerate launch": [sys.executable, *launcher, program, *words],
    }


def run(command: list[str], folder: Path) -> Start:
    """Run a command to its end; `folder` receives its run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    seconds: float | None = None
    words = [] if command[1] == "-c" else [f"--run.dir={folder}"]
    with subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            if seconds is None and has_step(folder / "metrics.jsonl"):
                seconds = time.perf_counter() - began
            time.sleep(_SECONDS_BETWEEN_READS)
    if process.returncode:
        raise SystemExit(f"exit code {process.returncode}: {' '.join(command)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Start(time.perf_counter() - began if seconds is None else seconds, cpu_seconds)


def has_step(metrics: Path) -> bool:
    """Return whether the metrics of the first step were written."""
    rows = metrics.read_text(encoding="utf-8").splitlines(keepends=True) if metrics.exists() else []
    return any(json.loads(row)["kind"] == "train" for row in rows if row.endswith("\n"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--rounds", type=int, default=5)


def main(arguments: argparse.Namespace) -> None:
    """Measure and print the medians, and the medians of the differences within a round."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        of_name = commands(write_images(folder / "data"), folder / "cache")
        for name, command in of_name.items():
            run(command, folder / f"first {name}")
        starts: dict[str, list[Start]] = {name: [] for name in of_name}
        for number in range(arguments.rounds):
            for name, command in of_name.items():
                starts[name].append(run(command, folder / f"{number} {name}"))
    print(f"{'medians of ' + str(arguments.rounds):40} {'seconds':>8} {'more than the imports':>22} {'CPU s':>6}")
    for name, each in starts.items():
        more = statistics.median(
            start.seconds - imports.seconds for start, imports in zip(each, starts[IMPORTS], strict=True)
        )
        seconds, cpu_seconds = (statistics.median(values) for values in zip(*each, strict=True))
        print(f"{name:40} {seconds:8.2f} {more:22.2f} {cpu_seconds:6.2f}")
