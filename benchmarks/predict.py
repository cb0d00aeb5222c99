"""Speed of `regraft predict` beside timm's inference loop: interleaved runs in fresh processes, an A/A control.

    pip install -e '.[bench]'
    python -m benchmarks predict                         # both in their fastest precision
    python -m benchmarks predict --tier equal            # both in fp32

timm is tuned first: its precision, batch size, number of workers, memory layout and torch.compile, on a part of the
images. Both predict the same JPEG files with the same weights, and write a CSV. `images/s` counts from the start of the
data loading; `command` is the time of the whole process. The answers are compared.
"""

import argparse
import csv
import itertools
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torchvision.models import get_model

from benchmarks.images import write_photographs
from benchmarks.measure import REPOSITORY, cores, median_interval, processor, versions
from benchmarks.peers.common import MEAN, STD
from trainer.data.preprocessing import Preprocessing
from trainer.distributed.precision import Execution
from trainer.model.metadata import ModelMetadata, write_model

CLASSES = ("a", "b")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run of a program."""

    rate: float
    """Images per second from the start of the data loading."""
    seconds: float
    """Seconds of the whole process."""
    labels: dict[str, str]
    """Folder and name of an image -> the predicted class."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--tier", choices=("best", "equal"), default="best", help="fastest precision of each, or fp32")
    parser.add_argument("--model", choices=("resnet18", "resnet34", "resnet50"), default="resnet18")
    parser.add_argument("--images", type=int, default=1024, help="number of JPEG files")
    parser.add_argument("--drawn", type=int, default=256, help="number of different ones among them")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="let timm use torch.compile too, which takes a minute")
    parser.add_argument("--threads", type=int, default=cores())


def main(arguments: argparse.Namespace) -> None:
    """Tune timm, and print the ratios."""
    print(f"{processor()}; {versions()}\n{' '.join(sys.argv[1:])}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        images = write_photographs(work / "images", train=arguments.drawn, copies=arguments.images // arguments.drawn)
        part = write_photographs(work / "part", train=min(arguments.drawn, 128), val=2) / "train"
        model = _write_model_file(work / "model.safetensors", arguments)
        options = _tune_timm(model, part, work, arguments)
        programs = {
            "regraft": lambda: _regraft(model, images / "train", work),
            "timm": lambda: _timm(model, images / "train", work, arguments, options),
            "regraft again": lambda: _regraft(model, images / "train", work),
        }
        results: dict[str, list[Measurement]] = {name: [] for name in programs}
        random_ = random.Random(0)
        for number in range(arguments.pairs):
            for name in random_.sample(list(programs), len(programs)):
                result = programs[name]()
                results[name].append(result)
                print(f"round {number + 1}: {name:14} {result.rate:7.1f} images/s, {result.seconds:.1f} s", flush=True)
    print(f"\nratios regraft / other, tier {arguments.tier}: median (95 % interval) of {arguments.pairs} rounds")
    for name in ("timm", "regraft again"):
        pairs = list(zip(results["regraft"], results[name], strict=True))
        rates = median_interval([a.rate / b.rate for a, b in pairs])
        commands = median_interval([b.seconds / a.seconds for a, b in pairs])
        texts = ["{} {:.2f} ({:.2f} to {:.2f})".format(*row) for row in (("images/s", *rates), ("command", *commands))]
        labels, others = pairs[0][0].labels, pairs[0][1].labels
        equal = sum(others[image] == label for image, label in labels.items())
        print(f"  {name:14} {', '.join(texts)}; equal answers {equal} of {len(labels)}")


def _write_model_file(path: Path, arguments: argparse.Namespace) -> Path:
    """Write a model whose answers differ from image to image; timm's names of its weights are the same."""
    torch.manual_seed(0)
    model = get_model(arguments.model, num_classes=len(CLASSES))
    model.train()
    with torch.no_grad():
        for _ in range(8):  # statistics of BatchNorm
            model(torch.randn(8, 3, 224, 224) + torch.randn(8, 3, 1, 1))
    assert isinstance(model.fc, nn.Linear)
    precision = "fp32" if arguments.tier == "equal" else "bf16"
    metadata = ModelMetadata(
        version="0",
        architecture=arguments.model,
        classes=CLASSES,
        preprocessing=Preprocessing(
            image_size=224, resize_size=256, resize="shorter", interpolation="bilinear", mean=MEAN, std=STD
        ),
        source="random",
        metrics={},
        execution=Execution(precision, channels_last=True),
    )
    write_model(path, model.state_dict(), metadata)
    return path


def _tune_timm(model: Path, images: Path, work: Path, arguments: argparse.Namespace) -> list[str]:
    """Return the fastest options of timm's inference."""
    precisions = ["fp32"] if arguments.tier == "equal" else ["amp", "bf16"]
    sizes = [8, 32, 128] if not torch.cuda.is_available() else [128, 256, 512]
    workers = sorted({1, max(1, arguments.threads // 2), arguments.threads})
    candidates = [
        [f"--precision={precision}", f"--batch-size={size}", f"--workers={count}", *layout, *compiled]
        for precision, size, count, layout, compiled in itertools.product(
            precisions, sizes, workers, [["--channels-last"], []], [[], ["--compile"]][: 1 + arguments.compile]
        )
    ]
    rates = {}
    for options in candidates:
        rates[" ".join(options)] = _timm(model, images, work, arguments, options).rate
        print(f"tuning timm: {rates[' '.join(options)]:7.1f} images/s  {' '.join(options)}", flush=True)
    return max(rates, key=rates.__getitem__).split()


def _timm(model: Path, images: Path, work: Path, arguments: argparse.Namespace, options: Sequence[str]) -> Measurement:
    output, record = work / "timm.csv", work / "timm.json"
    command = [
        *(sys.executable, "-m", "benchmarks.peers.timm_inference", f"--data={images}", f"--model={arguments.model}"),
        *(f"--checkpoint={model}", f"--num-classes={len(CLASSES)}", f"--threads={arguments.threads}"),
        *(f"--output={output}", f"--record={record}", *options),
    ]
    seconds, _ = _run(command)
    with output.open(newline="") as stream:
        labels = {_name(path): CLASSES[int(label)] for path, label, _ in csv.reader(stream)}
    written = json.loads(record.read_text())
    return Measurement(rate=written["images"] / written["seconds"], seconds=seconds, labels=labels)


def _regraft(model: Path, images: Path, work: Path) -> Measurement:
    output = work / "regraft.csv"
    output.unlink(missing_ok=True)
    program = str(REPOSITORY / "trainer" / "commands" / "predict.py")
    seconds, text = _run([sys.executable, program, str(model), str(images), f"--output={output}"])
    with output.open(newline="") as stream:
        labels = {_name(row["path"]): row["label"] for row in csv.DictReader(stream)}
    rate = re.search(r"([0-9.]+) per second", text)
    assert rate is not None, text
    return Measurement(rate=float(rate[1]), seconds=seconds, labels=labels)


def _name(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def _run(command: Sequence[str]) -> tuple[float, str]:
    """Return the seconds of a command, and its standard error."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    began = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return seconds, done.stderr
