"""Runs in real processes that tests interrupt, and the comparison of two runs.

Two runs are compared by everything they leave: the tensors of the newest checkpoint and of the model files, the
metrics without times, the best epoch, and the audit of every update (`run.audit`).
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from tests.folders import image_folder
from tests.launching import MAIN, accelerate_launch, command_line, once, torchrun

EXAMPLES, STEPS, EPOCHS = 22, 6, 3
"""An epoch has 6 updates: 22 examples in batches of 4, the last one of 2."""
MODELS = ("mobilenet_v3_small", "shufflenet_v2_x0_5")
ALL_FEATURES = {
    "data__random_erasing": 0.25, "train__grad_accum_steps": 2,
    "transfer__trainable": "{0: head, 1: last:3, 2: all}", "transfer__batch_norm": "train",
    "transfer__l2_sp": 0.01, "transfer__wise_ft": "true",
    "optim__schedule": "one-cycle", "optim__warmup": "4 steps", "optim__max_grad_norm": 1.0, "optim__layer_decay": 0.9,
    "regularization__label_smoothing": 0.1, "regularization__mixup": 0.2, "regularization__cutmix": 1.0,
    "regularization__class_weights": "balanced", "regularization__ema": 0.9, "regularization__early_stopping": 99,
}  # fmt: skip
"""Every feature that has a state or randomness of its own; the model has BatchNorm and dropout."""
WORLD_SIZE_INDEPENDENT = {
    "model__name": MODELS[1], "transfer__batch_norm": "frozen", "data__image_size": 32, "optim__lr": 3e-5,
}  # fmt: skip
"""Without batch statistics and dropout, world sizes differ by the order of sums alone. A small learning rate does not
amplify the difference."""
LOSSES, WEIGHTS = 1e-5, 1e-5
"""Tolerances between world sizes: relative for losses. Measured: at most 2e-6 of a loss, and 3e-7 in a weight."""
TIMES = {"seconds", "evaluation_seconds", "examples_per_sec", "examples_per_sec_compute", "memory_bytes"}
"""Keys of metrics.jsonl that differ from run to run."""
ON_CPU = {"ACCELERATE_USE_CPU": "true", "PYTHONDONTWRITEBYTECODE": "1"}
LAUNCHERS = ("torch.distributed.run", "accelerate.commands.launch")
_MARK = "REGRAFT_TESTED_RUN"
_TIMEOUT = 120.0
_HANG_TIMEOUT = 90.0
"""Seconds without a step after which a run ends itself and writes its stacks, which a failing test then shows."""


def images(factory: pytest.TempPathFactory) -> Path:
    """Return the data set of these tests; pretrained weights of `MODELS` lie beside it."""

    def make(folder: Path) -> None:
        splits = {name: {"a": 9, "b": 7, "c": 6} for name in ("train", "test")}
        image_folder(folder / "data", {**splits, "val": {"a": 4, "b": 3, "c": 3}}, seed=7)
        for name in MODELS:
            torch.manual_seed(11)
            save_file(models.get_model(name).state_dict(), folder / f"{name}.safetensors")

    return once(factory, "images", make) / "data"


def options(factory: pytest.TempPathFactory, folder: Path, **changes: object) -> list[str]:
    """Return the options of a short run; keywords change them, dots written as double underscores."""
    root, model = images(factory), changes.get("model__name", MODELS[0])
    settings: dict[str, object] = {
        "run.dir": folder, "run.threads": 1, "run.audit": "true", "run.hang_timeout": _HANG_TIMEOUT,
        "data.root": root, "data.image_size": 64, "data.num_workers": 1, "data.cache": root.parent / "cache",
        "model.name": model, "model.weights": root.parent / f"{model}.safetensors",
        "train.epochs": EPOCHS, "train.batch_size": 4, "train.logs_per_epoch": 99, "checkpoint.every": "2 steps",
        "train.precision": "fp32", "train.channels_last": "true",
    }  # fmt: skip
    return command_line(settings, changes)


def command(launcher: str | int, *arguments: str, restarts: int = 0) -> list[str]:
    """Return a command that starts the trainer by `python`, `accelerate`, or torchrun with a number of processes."""
    if launcher == "python":
        return [sys.executable, str(MAIN), *arguments]
    if launcher == "accelerate":  # with options that keep it from looking for a config file of the user's
        return accelerate_launch("--num_processes", 1, "--num_machines", 1, MAIN, *arguments)
    assert isinstance(launcher, int)
    return torchrun(launcher, f"--max-restarts={restarts}", MAIN, *arguments)


@dataclass(frozen=True)
class Run:
    """One start of the trainer by its public command."""

    process: subprocess.Popen[bytes]
    """The trainer, or its launcher."""
    folder: Path
    """The run folder."""
    log: Path
    mark: str
    """Environment variable that all processes of this start inherit."""

    @property
    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> list[int]:
        """Return all living processes of this start, whatever their parent is now."""
        return [pid for pid in _pids() if self.mark in _read(pid, "environ") and process_state(pid) not in "ZX"]

    def trainers(self) -> list[int]:
        """Return the trainer's processes, without launchers and loader workers."""
        lines = {pid: _read(pid, "cmdline") for pid in self.alive()}
        pids = [pid for pid, line in lines.items() if str(MAIN) in line and not any(name in line for name in LAUNCHERS)]
        return sorted(set(pids) - {worker for pid in pids for worker in children(pid)})

    def wait(self, condition: Callable[[], object], what: str, *, seconds: float = _TIMEOUT) -> None:
        """Wait for a condition; fail if the run ends before."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.process.poll() is not None and not condition():
                raise AssertionError(f"{what}: the run has ended ({self.process.returncode}):\n{self.output}")
            if time.monotonic() > deadline:
                raise AssertionError(f"{what}: not within {seconds:.0f} s:\n{self.output}")
            time.sleep(0.005)

    def wait_for_step(self, step: int, *, after: int = 0) -> None:
        """Wait until an attempt later than `after` trains and the run has logged `step`."""
        self.wait(lambda: training_attempt(self.folder) > after and last_step(self.folder) >= step, f"step {step}")

    def end(self, *, code: int, seconds: float = _TIMEOUT) -> str:
        """Wait for the end, check the exit code and that no process is left; return the output."""
        try:
            returned = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {seconds:.0f} s:\n{self.output}{self._hangs()}") from None
        self.assert_gone(10)
        assert returned == code, f"exit code {returned}, expected {code}:\n{self.output}{self._hangs()}"
        return self.output

    def _hangs(self) -> str:
        """Return the stacks that the watchdogs of this run have written."""
        return "".join(f"\n{path.name}: {path.read_text(errors='replace')}" for path in self.folder.glob("hangs/*"))

    def assert_gone(self, seconds: float) -> None:
        """Check that all processes of this start end within some seconds."""
        deadline = time.monotonic() + seconds
        while left := self.alive():
            if time.monotonic() > deadline:
                shown = [_read(pid, "cmdline").replace("\0", " ")[:200] for pid in left]
                raise AssertionError(f"processes {left} outlive their launcher: {shown}\n{self.output}")
            time.sleep(0.02)


@contextmanager
def start(
    arguments: Sequence[str], folder: Path, *, environment: Mapping[str, str] = ON_CPU, logs: Path | None = None
) -> Iterator[Run]:
    """Start a command in a session of its own; kill what is left of it at the end of the block.

    `folder` is the run folder that it names. The output goes to `logs`, by default the run folder's parent.
    """
    identifier = str(uuid.uuid4())
    log = (logs or folder.parent) / f"output-{identifier[:8]}.txt"
    environment = {**os.environ, **environment, _MARK: identifier}
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with log.open("wb") as out:
        process = subprocess.Popen(
            arguments, cwd=log.parent, env=environment, stdout=out, start_new_session=True, **streams
        )
    run = Run(process, folder, log, f"{_MARK}={identifier}")
    try:
        yield run
    finally:
        for pid in run.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def finish(arguments: Sequence[str], folder: Path, *, code: int = 0, logs: Path | None = None) -> str:
    """Run a command to its end; return its output."""
    with start(arguments, folder, logs=logs) as run:
        return run.end(code=code)


def uninterrupted(factory: pytest.TempPathFactory, launcher: str | int, **changes: object) -> Path:
    """Return the folder of a run that was not interrupted; each is run once per session."""
    key = repr((launcher, sorted(changes.items())))

    def make(parent: Path) -> None:
        folder = parent / "run"
        finish(command(launcher, *options(factory, folder, **changes)), folder)
        assert_each_example_once(folder, epochs=int(str(changes.get("train__epochs", EPOCHS))))

    return once(factory, f"uninterrupted-{sha256(key.encode()).hexdigest()[:12]}", make) / "run"


# Processes


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return ""


def process_state(pid: int) -> str:
    """Return a process's state as in proc(5); X if it has ended."""
    return (_read(pid, "stat").rpartition(") ")[2] or "X")[0]


def handles_signal(pid: int, number: int) -> bool:
    """Return whether a process has installed a handler for a signal."""
    masks = dict(line.split(":\t", 1) for line in _read(pid, "status").splitlines() if ":\t" in line)
    return bool(int(masks.get("SigCgt", "0"), 16) >> (number - 1) & 1)


def children(pid: int) -> list[int]:
    parents = {child: _read(child, "stat").rpartition(") ")[2].split()[1:2] for child in _pids()}
    return [child for child, parent in parents.items() if parent == [str(pid)]]


def kill_trainer(run: Run, random_: random.Random) -> None:
    """Send SIGKILL to one of the trainer's processes; check that its loader workers end with it."""
    victim = random_.choice(run.trainers())
    workers = children(victim)
    print(f"attempt {training_attempt(run.folder)}, step {last_step(run.folder)}: SIGKILL to {victim}", flush=True)
    os.kill(victim, signal.SIGKILL)
    if victim != run.process.pid:
        deadline = time.monotonic() + 10
        while left := [pid for pid in (victim, *workers) if process_state(pid) not in "ZX"]:
            assert time.monotonic() < deadline, f"still alive: {[(pid, _read(pid, 'cmdline')) for pid in left]}"
            time.sleep(0.02)


# State of a run folder, while the run goes on or after it


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the complete rows of a file that may be missing or half written."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except FileNotFoundError:
        return []


def last_step(folder: Path) -> int:
    """Return the last update that the run has logged."""
    rows = _json_lines(folder / "metrics.jsonl")
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def completed_epochs(folder: Path) -> list[int]:
    return [row["epoch"] for row in _json_lines(folder / "metrics.jsonl") if row["kind"] == "epoch"]


def training_attempt(folder: Path) -> int:
    """Return the latest attempt that has made an update; 0 before the first."""
    return max((row["attempt"] for row in _json_lines(folder / "audit" / "rank-0.jsonl")), default=0)


def is_training(folder: Path, *, world_size: int, after: int) -> bool:
    """Return whether an attempt later than `after` has made an update on `world_size` processes."""
    rows = _json_lines(folder / "audit" / f"rank-{world_size - 1}.jsonl")
    return any(row["world_size"] == world_size and row["attempt"] > after for row in rows)


def attempts(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all attempts in order, without one that is created but not yet written."""
    texts = (path.read_text(encoding="ascii") for path in sorted((folder / "attempts").glob("*.json")))
    return [json.loads(text) for text in texts if text]


def latest_checkpoint(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("step-*"), key=lambda path: path.name)


def saved_step(folder: Path) -> int:
    """Return the step of the newest checkpoint; 0 if there is none."""
    return max((int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*")), default=0)


# What a run has computed


def _audit(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the audit rows of every update, one per rank; those of lost updates are left out."""
    latest: dict[int, list[dict[str, Any]]] = {}
    for row in (row for path in sorted((folder / "audit").glob("rank-*.jsonl")) for row in _json_lines(path)):
        rows = latest.setdefault(row["step"], [])
        if rows and row["attempt"] > rows[0]["attempt"]:
            rows.clear()
        if not rows or row["attempt"] == rows[0]["attempt"]:
            rows.append(row)
    assert sorted(latest) == list(range(len(latest))), "an update is missing"
    for step, rows in latest.items():
        assert len(rows) == rows[0]["world_size"], f"step {step}: a rank is missing"
    return [latest[step] for step in range(len(latest))]


def updates(folder: Path) -> list[tuple[int, float, dict[int, int]]]:
    """Return (epoch, learning-rate multiplier, {example: checksum of its pixels}) of every update."""
    result = []
    for step, rows in enumerate(_audit(folder)):
        pixels = [pair for row in rows for pair in zip(row["examples"], row["pixels"], strict=True)]
        assert len(dict(pixels)) == len(pixels), f"step {step}: an example came twice"
        result.append((rows[0]["epoch"], rows[0]["lr_multiplier"], dict(pixels)))
    return result


def world_sizes(folder: Path) -> list[int]:
    """Return the number of processes of every update."""
    return [len(rows) for rows in _audit(folder)]


def assert_each_example_once(folder: Path, *, epochs: int = EPOCHS) -> None:
    """Check that every epoch has trained on each example exactly once."""
    seen = Counter((epoch, example) for epoch, _, pixels in updates(folder) for example in pixels)
    assert seen == {(epoch, example): 1 for epoch in range(epochs) for example in range(EXAMPLES)}


def metrics_rows(folder: Path) -> list[dict[str, Any]]:
    """Return all rows of metrics.jsonl without times."""
    rows = _json_lines(folder / "metrics.jsonl")
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def assert_equal(actual: Path, expected: Path) -> None:
    """Check that two runs have computed the same, bit for bit."""
    assert updates(actual) == updates(expected), "examples, pixels or learning rates differ"
    assert_equal_results(actual, expected)


def assert_equal_results(actual: Path, expected: Path) -> None:
    """Check that two runs have equal metrics, model files and newest checkpoints, bit for bit."""
    assert metrics_rows(actual) == metrics_rows(expected)
    checkpoint, expected_checkpoint = latest_checkpoint(actual), latest_checkpoint(expected)
    assert checkpoint.name == expected_checkpoint.name
    for folder, other in ((actual, expected), (checkpoint, expected_checkpoint)):
        tensors, expected_tensors = _tensors(folder), _tensors(other)
        assert tensors.keys() == expected_tensors.keys()
        differing = [name for name, tensor in tensors.items() if not torch.equal(tensor, expected_tensors[name])]
        assert not differing, f"{folder}: {differing} differ"
    states = [json.loads((folder / "state.json").read_bytes()) for folder in (checkpoint, expected_checkpoint)]
    assert states[0]["best"] == states[1]["best"]


def _tensors(folder: Path, pattern: str = "*") -> dict[str, torch.Tensor]:
    paths = folder.glob(f"{pattern}.safetensors")
    return {f"{path.name}: {name}": tensor for path in paths for name, tensor in load_file(path).items()}


def assert_close(actual: Path, expected: Path) -> None:
    """Check that two runs saw the same examples, and that their results differ by the order of sums alone."""
    assert updates(actual) == updates(expected), "examples, pixels or learning rates differ"
    rows, expected_rows = metrics_rows(actual), metrics_rows(expected)

    def exact(row: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in row.items() if k in ("kind", "epoch", "step") or "lr" in k or "seen" in k}

    assert [exact(row) for row in rows] == [exact(row) for row in expected_rows]
    pairs = [(a[k], b[k]) for a, b in zip(rows, expected_rows, strict=True) for k in a if k.endswith("_loss")]
    loss_difference = max(abs(a - b) / abs(b) for a, b in pairs)
    difference = 0.0
    for pattern in ("model", "ema"):
        a, b = (_tensors(latest_checkpoint(folder), pattern) for folder in (actual, expected))
        assert a.keys() == b.keys()
        difference = max([difference, *((a[key].double() - b[key].double()).abs().max().item() for key in a)])
    print(f"differ by at most {loss_difference:.1e} of a loss, and {difference:.1e} in any weight")
    assert loss_difference <= LOSSES
    assert difference <= WEIGHTS
