"""Trainings of the checks, and the comparison of two of them."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from benchmarks.gpu.workplace import CheckFailed, CheckSkipped, Details, Workplace

PROGRAM = ("-m", "benchmarks.gpu.deterministic")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1")


@dataclasses.dataclass(frozen=True)
class Training:
    """A finished training."""

    folder: Path
    rows: list[dict[str, Any]]
    """The rows of metrics.jsonl."""

    @property
    def losses(self) -> list[float]:
        """Return the training loss of every logged step, and the losses of the evaluations."""
        return [value for row in self.rows for key, value in row.items() if key in ("train_loss", "test_loss")]

    @property
    def epoch_losses(self) -> list[float]:
        """Return the mean training loss of every epoch."""
        return [row["train_loss"] for row in self.rows if row["kind"] == "epoch"]


def command(work: Workplace, label: str, *options: str, launcher: Sequence[str] = ()) -> list[str]:
    """Return the command of a small training: from scratch, in fp32, two epochs of 8 steps."""
    defaults = {
        "run.dir": work.folder / "runs" / label,
        "run.device": work.device,
        "run.threads": 8 if work.on_gpu else 1,
        "data.root": work.small_images(),
        "data.image_size": work.image_size,
        "data.cache": work.folder / "cache",
        "data.augment": "none",
        "model.name": work.model,
        "model.weights": "null",
        "optim.lr": 1e-4,
        "train.precision": "fp32",
        "train.batch_size": work.batch_size,
        "train.epochs": 2,
        "train.logs_per_epoch": 8,
        "checkpoint.every": "null",
    }
    if not work.on_gpu:
        defaults["model.dropout"] = 0.0  # the order in which masks are drawn depends on the memory layout
    return [sys.executable, *launcher, *PROGRAM, *(f"--{key}={value}" for key, value in defaults.items()), *options]


def train(work: Workplace, label: str, *options: str, launcher: Sequence[str] = ()) -> Training:
    """Train, or return the training of the same label that an earlier check has finished.

    Raises:
        CheckFailed: the training has failed.

    """
    folder, output = work.folder / "runs" / label, work.folder / f"{label}.log"
    if not output.exists():
        words = command(work, label, *options, launcher=launcher)
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        if done.returncode:
            text = tail(done.stderr or done.stdout)
            raise CheckFailed(f"the training {label} ended with code {done.returncode}:\n{text}")
        output.write_text(done.stdout + done.stderr, encoding="utf-8")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return Training(folder, [json.loads(line) for line in lines])


def tail(text: str, lines: int = 12) -> str:
    """Return the last lines of a text."""
    return "\n".join(text.strip().splitlines()[-lines:])


def compare(one: Training, other: Training, tolerance: float) -> Details:
    """Return the largest relative difference between the losses of all logged steps; see `difference`."""
    return difference(one.losses, other.losses, tolerance)


def compare_epochs(one: Training, other: Training, tolerance: float) -> Details:
    """Return the largest relative difference between the mean losses of the epochs; see `difference`."""
    return difference(one.epoch_losses, other.epoch_losses, tolerance)


def difference(ones: Sequence[float], others: Sequence[float], tolerance: float) -> Details:
    """Return the largest relative difference between two series of losses.

    Raises:
        CheckFailed: it is above the tolerance, or the trainings have different steps.

    """
    if len(ones) != len(others):
        raise CheckFailed(f"{len(ones)} and {len(others)} losses were logged")
    largest = max(abs(a - b) / abs(b) for a, b in zip(ones, others, strict=True))
    if not largest <= tolerance:
        pairs = [f"{a:.5f} {b:.5f}" for a, b in zip(ones, others, strict=True)]
        raise CheckFailed(f"losses differ by {largest:.1e}, expected at most {tolerance:.0e}: {'; '.join(pairs)}")
    return {"largest relative difference of a loss": largest, "tolerance": tolerance, "losses": len(ones)}


def require_option(section: str, name: str, value: object = None) -> None:
    """Raise CheckSkipped unless this version of regraft has the option, and accepts the value if one is given."""
    from trainer.config.schema import Config  # noqa: PLC0415 (needs regraft's dependencies)
    from trainer.errors import UserError  # noqa: PLC0415

    if name not in get_type_hints(get_type_hints(Config)[section]):
        raise CheckSkipped(f"this version of regraft has no option {section}.{name}")
    if value is not None:
        from trainer.config.parse import parse  # noqa: PLC0415

        try:
            parse([f"--{section}.{name}={value}"])
        except UserError as error:
            raise CheckSkipped(f"this version of regraft does not take {section}.{name} {value}: {error}") from None
