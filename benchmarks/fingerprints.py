"""Show that a refactoring changes no result: fingerprints of seeded runs, before and after.

    python -m benchmarks fingerprints record before.json [--checkout FOLDER] [--only NAME,...]
    python -m benchmarks fingerprints compare before.json after.json

`record` trains small models on the drawn data sets, offline, once per configuration below. Of each run it keeps the
figures of every step (metrics.jsonl without its times) and the SHA-256 of every tensor in the run's model files.
`compare` prints a table and exits with 1 unless all of it is equal, bit for bit. Record both on the same machine,
with the same versions: another processor rounds differently. About 2 minutes on 2 cores.

`--checkout` trains with another commit's code. If options were renamed since, use that commit's own configurations:

    git worktree add /tmp/before COMMIT && cd /tmp/before && python -m benchmarks fingerprints record before.json
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

TIMES = {"seconds", "evaluation_seconds", "examples_per_sec", "examples_per_sec_compute", "memory_bytes"}
"""Keys of metrics.jsonl that differ from run to run, by time and memory."""
SMALL = [
    *("--data.image_size=32", "--data.resize_size=36", "--data.crop_scale=[0.6,1.0]", "--train.logs_per_epoch=1000"),
    *("--train.precision=fp32", "--train.channels_last=true"),  # not what is fastest at the moment
]
TARGET = ["--data.root=synthetic-target", "--train.batch_size=12", "--train.epochs=3", *SMALL]
SOURCE = "--model.weights=runs/source/model.safetensors"

CONFIGURATIONS: dict[str, list[str]] = {
    # The source model of the runs below; a ResNet-18 from scratch, AdamW, warm-up and cosine.
    "source": [
        "--data.root=synthetic-source",
        "--model.weights=null",
        "--optim.name=adamw",
        "--optim.lr=1.5e-3",
        "--optim.warmup=5%",
        "--train.epochs=1",
        "--train.batch_size=64",
        *SMALL,
    ],
    "d2l": [*TARGET, SOURCE, "--transfer.strategy=d2l"],
    "lp-ft": [*TARGET, SOURCE, "--transfer.strategy=lp-ft"],
    "gradual-unfreezing": [*TARGET, SOURCE, "--transfer.strategy=gradual-unfreezing", "--train.epochs=4"],
    "ema-mixup-l2sp": [
        *TARGET,
        SOURCE,
        "--regularization.ema=0.9",
        "--regularization.mixup=0.2",
        "--regularization.cutmix=1.0",
        "--regularization.label_smoothing=0.1",
        "--regularization.class_weights=balanced",
        "--transfer.l2_sp=0.01",
        "--data.random_erasing=0.25",
        "--optim.max_grad_norm=1.0",
        "--train.grad_accum_steps=2",
        "--optim.schedule=one-cycle",
    ],
    "wise-ft": [
        *TARGET,
        SOURCE,
        "--transfer.wise_ft=true",
        "--data.val_fraction=0.3",
        "--regularization.early_stopping=2",
    ],
    "source-classes-balanced-bf16": [
        *TARGET,
        "--model.weights=runs/source/model.safetensors",
        "--model.head_init=source-labels",
        "--data.sampling=balanced",
        "--train.precision=bf16",
        "--optim.name=adamw",
        "--optim.lr=3e-4",
        "--optim.layer_decay=0.7",
        "--optim.lr_mult={bn1: 0.5}",
        "--optim.decay_norm_and_bias=false",
        "--transfer.trainable=last:3",
        "--data.augment=trivialaugment",
    ],
    "two-ranks": [
        *TARGET,
        SOURCE,
        "--regularization.mixup=0.2",
        "--regularization.ema=0.9",
        "--transfer.l2_sp=0.01",
        "--train.batch_size=13",
    ],
    "two-ranks-gradual-wise-ft": [
        *TARGET,
        SOURCE,
        "--transfer.strategy=gradual-unfreezing",
        "--data.val_fraction=0.3",
        "--transfer.wise_ft=true",
    ],
    "resumed-in-mid-epoch": [
        *TARGET,
        SOURCE,
        "--regularization.ema=0.9",
        "--regularization.mixup=0.2",
        "--transfer.l2_sp=0.01",
        "--transfer.trainable={0: head, 1: 'last:2', 2: all}",
        "--checkpoint.every=1 steps",
        "--train.batch_size=4",
    ],
    "pretrain-and-baseline": [
        "--data.root=synthetic-target",
        "--model.weights=null",
        "--pretrain.root=synthetic-source",
        "--pretrain.epochs=1",
        "--pretrain.lr=1.5e-3",
        "--baseline.lr=3e-3",
        "--optim.name=adamw",
        "--train.epochs=2",
        *SMALL,
    ],
}
RANKS = {"two-ranks": 2, "two-ranks-gradual-wise-ft": 2}
RESUMED = {"resumed-in-mid-epoch"}


def command(checkout: Path, name: str, folder: Path) -> list[str]:
    """Return the command line of one configuration, writing to runs/NAME below `folder`."""
    ranks = RANKS.get(name, 1)
    options = [*CONFIGURATIONS[name], f"--run.dir={folder / 'runs' / name}", "--data.num_workers=0"]
    options.append(f"--run.threads={2 // ranks}")
    main = str(checkout / "trainer" / "main.py")
    if ranks == 1:
        return [sys.executable, main, *options]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", main, *options]


def stop_in_mid_epoch(words: Sequence[str], run: Path, **popen: Any) -> None:
    """Start a run and end it with SIGKILL within its second epoch, once a checkpoint of that epoch is there."""
    with subprocess.Popen(words, **popen) as process:
        while process.poll() is None:
            if list((run / "checkpoints").glob("step-*-epoch-0001")):
                process.kill()
            time.sleep(0.01)
    if process.returncode != -9:
        raise SystemExit(f"{run.name}: ended with {process.returncode} before it could be killed")


def fingerprint(run: Path) -> dict[str, Any]:
    """Return the figures of every step, and the SHA-256 of every tensor, of a finished run and its phases."""
    found: dict[str, Any] = {}
    for metrics in sorted(run.rglob("metrics.jsonl")):
        if "checkpoints" not in metrics.parts:
            rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
            key = "/".join(("metrics", *phase(metrics.relative_to(run).parent)))
            found[key] = [{k: v for k, v in row.items() if k not in TIMES} for row in rows]
    for file in sorted(run.glob("**/*.safetensors")):
        if "checkpoints" not in file.parts:
            digest = hashlib.sha256()
            with safe_open(file, framework="np") as tensors:
                for name in sorted(tensors.keys()):
                    digest.update(name.encode() + tensors.get_tensor(name).tobytes())
            name = {"start.safetensors": "initial.safetensors"}.get(file.name, file.name)  # renamed since
            found["/".join(("weights", *phase(file.relative_to(run).parent), name))] = digest.hexdigest()
    return found


def phase(folder: Path) -> tuple[str, ...]:
    """Return a phase's folder under the name that it has in this table, whatever the commit calls it."""
    return tuple({"source": "pretrain", "scratch": "baseline"}.get(part, part) for part in folder.parts)


def record(output: Path, checkout: Path, only: Sequence[str]) -> None:
    """Run the configurations, and write their fingerprints to a JSON file."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        environment = {**os.environ, "PYTHONPATH": str(checkout), "REGRAFT_CACHE": str(folder / "cache")}
        for name in CONFIGURATIONS:
            if only and name not in ("source", *only):
                continue
            began = time.monotonic()
            words = command(checkout, name, folder)
            popen: dict[str, Any] = {"cwd": folder, "env": environment, "stdout": subprocess.DEVNULL}
            if name in RESUMED:
                stop_in_mid_epoch(words, folder / "runs" / name, **popen, stderr=subprocess.DEVNULL)
            subprocess.run(words, check=True, **popen)
            results[name] = fingerprint(folder / "runs" / name)
            print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
    output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def compare(before: Path, after: Path) -> int:
    """Print a table of two recordings; returns 1 if anything differs, else 0."""
    old, new = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    code = 0
    print("| configuration | logged steps | model files | first SHA-256 | equal |\n| --- | --- | --- | --- | --- |")
    for name in sorted({*old, *new}, key=list(CONFIGURATIONS).index):
        one, other = old.get(name, {}), new.get(name, {})
        differing = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
        steps = sum(len(value) for key, value in one.items() if key.startswith("metrics"))
        files = [value for key, value in one.items() if key.startswith("weights")]
        equal = f"NO: {', '.join(differing)}" if differing else "yes"
        code = code or int(bool(differing) or not files)
        print(f"| {name} | {steps} | {len(files)} | {files[0][:12] if files else '-'} | {equal} |")
    return code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of this benchmark."""
    verbs = parser.add_subparsers(dest="verb", required=True)
    recording = verbs.add_parser("record", help="run the configurations and write their fingerprints")
    recording.add_argument("output", type=Path)
    recording.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parent.parent)
    recording.add_argument("--only", type=lambda text: text.split(","), default=[])
    comparing = verbs.add_parser("compare", help="compare two recordings")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)


def main(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; return the exit code."""
    if arguments.verb == "compare":
        return compare(arguments.before, arguments.after)
    record(arguments.output, arguments.checkout.resolve(), arguments.only)
    return 0
