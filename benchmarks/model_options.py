"""Speed, compile time and memory of the model with train.compile and train.gradient_checkpointing.

    python -m benchmarks model-options                               # three models, fp32 and bf16
    python -m benchmarks model-options --models vit_b_16 --precisions bf16 --rounds 5

Each variant trains on one batch in memory, in a fresh process per round; within a round, the variants run in turn.
Ratios are medians of the rounds, beside the plain model of the same round. Compile time is the first update's with an
empty cache, less the time of a later update. Memory is the peak of a training update over the process before it:
resident on a CPU, allocated on a GPU.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks.measure import REPOSITORY, cores, processor, versions
from trainer.model.compile import compile_model
from trainer.model.create import build_model
from trainer.model.head import split_outputs

VARIANTS = ("plain", "compile", "gradient_checkpointing")
_RESET_PEAK, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def measure(model_name: str, variant: str, precision: str, arguments: argparse.Namespace) -> dict[str, float]:
    """Return `first` and `later` (seconds of an update) and `memory` [bytes] of a variant, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    recompute = variant == "gradient_checkpointing"
    model = build_model(
        model_name,
        image_size=arguments.image_size,
        num_classes=2,
        weights=None,
        head_init="xavier",
        gradient_checkpointing=recompute,
    ).model
    model.to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    images = torch.randn(arguments.batch_size, 3, arguments.image_size, arguments.image_size, device=device)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(2, (arguments.batch_size,), device=device)
    if variant == "compile":
        compile_model(model)

    def update() -> float:
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits, _ = split_outputs(model(images))
        cross_entropy(logits.float(), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    before = _memory(device, peak=False)
    first = update()
    if device.type == "cpu":
        _RESET_PEAK.write_text("5", encoding="ascii")  # see proc(5): the compiler's peak does not count
    later = statistics.median(update() for _ in range(arguments.updates))
    return {"first": first, "later": later, "memory": _memory(device, peak=True) - before}


def _memory(device: torch.device, *, peak: bool) -> float:
    if device.type == "cuda":
        if not peak:
            torch.cuda.reset_peak_memory_stats(device)
            return torch.cuda.memory_allocated(device)
        return torch.cuda.max_memory_allocated(device)
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in _STATUS.read_text(encoding="ascii").splitlines() if line.startswith(key))
    return 1024 * float(line.split()[1])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v3_small", "vit_b_16"])
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS[1:], default=list(VARIANTS[1:]))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--updates", type=int, default=4, help="number of updates of which the median is taken")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs=3, metavar=("MODEL", "VARIANT", "PRECISION"), help=argparse.SUPPRESS)


def _in_fresh_process(arguments: argparse.Namespace, *only: str, cache: Path) -> dict[str, float]:
    sizes = ("batch_size", "image_size", "threads", "updates")
    options = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in sizes]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "model-options", *options, "--only", *only],
        cwd=REPOSITORY,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(cache)},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main(arguments: argparse.Namespace) -> None:
    """Measure and print a table."""
    if arguments.only:
        print(json.dumps(measure(*arguments.only, arguments)))
        return
    print(f"batches of {arguments.batch_size} at {arguments.image_size} px, {arguments.threads} threads")
    print(f"{processor()}; {versions()}\n")
    print("| model | precision | variant | images/s | speed | compile time | memory |\n| --- " + "| --- " * 6 + "|")
    for model in arguments.models:
        for precision in arguments.precisions:
            variants = ["plain", *arguments.variants]
            rounds: list[dict[str, dict[str, float]]] = []
            with tempfile.TemporaryDirectory() as cache:
                for _ in range(arguments.rounds):
                    rounds.append(
                        {
                            variant: _in_fresh_process(arguments, model, variant, precision, cache=Path(cache))
                            for variant in variants
                        }
                    )
            for variant in variants:
                rate = arguments.batch_size / statistics.median(one[variant]["later"] for one in rounds)
                speed = statistics.median(one["plain"]["later"] / one[variant]["later"] for one in rounds)
                memory = statistics.median(one[variant]["memory"] for one in rounds)
                compiling = rounds[0][variant]["first"] - rounds[0][variant]["later"] if variant == "compile" else 0
                cells = (model, precision, variant, f"{rate:.1f}", f"{speed:.2f}", f"{compiling:.0f} s")
                print("|", " | ".join([*cells, f"{memory / 2**20:.0f} MiB"]), "|", flush=True)
