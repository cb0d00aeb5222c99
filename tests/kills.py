"""Runs that are killed, stopped and started again: what is left of their processes, and of their figures.

A run is compared with one that nobody disturbed, by all that it leaves: the tensors of its newest checkpoint and
of its model file, its figures without times, its best epoch, and what each update was made of (`run.audit`).
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
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.folders import image_folder
from tests.launching import MAIN, accelerate_launch, torchrun

EXAMPLES = 22
STEPS = 6
"""Updates of an epoch: 22 examples in batches of 4, the last one ragged."""
EPOCHS = 3
SAME_ANYWHERE = {
    "model__name": "shufflenet_v2_x0_5",
    "transfer__batch_norm": "frozen",
    "data__image_size": 32,
    "optim__lr": 3e-5,
}
"""Without BatchNorm's statistics and without dropout, processes differ by the order of sums alone; and at a small
learning rate that stays as small as it is: with the usual one, 48 updates make 5e-3 of a loss out of 1e-7."""
TIMED = {"seconds", "examples_per_sec", "examples_per_sec_compute", "memory_bytes"}
ON_CPU = {"ACCELERATE_USE_CPU": "true", "PYTHONDONTWRITEBYTECODE": "1"}
_MARK = "REGRAFT_TESTED_RUN"
_PATIENCE = 120.0


def pictures(factory: pytest.TempPathFactory) -> Path:
    """Return the data set of these tests, the same one for a whole session."""
    folder = factory.getbasetemp() / "pictures"
    if not folder.exists():
        parts = {"train": {"a": 9, "b": 7, "c": 6}, "val": {"a": 10, "b": 8, "c": 6}}
        image_folder(folder, parts, seed=7)
    return folder


def options(root: Path, folder: Path, **changes: object) -> list[str]:
    """Return the command line of a run that training's order, crops, masks, statistics and moments all matter to.

    Its model has BatchNorm and dropout. Keywords change it, dots written as double underscores.
    """
    settings: dict[str, object] = {
        "run.dir": folder,
        "run.threads": 1,
        "run.audit": "true",
        "data.root": root,
        "data.image_size": 64,
        "data.num_workers": 1,
        "data.cache": root.parent / "cache",
        "model.name": "mobilenet_v3_small",
        "model.weights": "null",
        "train.epochs": EPOCHS,
        "train.batch_size": 4,
        "train.logs_per_epoch": 99,
        "checkpoint.every": "2 steps",
    }
    settings |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in settings.items()]


def command(launcher: str | int, *arguments: str, restarts: int = 0) -> list[str]:
    """Return a command that starts the trainer: by `python`, `accelerate`, or torchrun with so many processes."""
    if launcher == "python":
        return [sys.executable, str(MAIN), *arguments]
    if launcher == "accelerate":
        # The single process that it starts; without the option, it asks for a config file of the user's.
        return accelerate_launch("--num_processes", "1", "--num_machines", "1", MAIN, *arguments)
    assert isinstance(launcher, int)
    return torchrun(launcher, f"--max-restarts={restarts}", MAIN, *arguments)


@dataclass(frozen=True)
class Run:
    """A start of a run, by its public command."""

    process: subprocess.Popen[bytes]
    """What was started: the trainer itself, or its launcher."""
    folder: Path
    """The run folder."""
    log: Path
    mark: str

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def alive(self) -> list[int]:
        """Return all living processes that come from this start, whoever is their parent now."""
        return [pid for pid in _pids() if self.mark in _read(pid, "environ") and state_of(pid) not in "ZX"]

    def trainers(self) -> list[int]:
        """Return the trainer's processes: not its launcher, nor those that load its data."""
        if "torch.distributed.run" in self.process.args or "accelerate.commands.launch" in self.process.args:
            return [pid for pid in children(self.process.pid) if str(MAIN) in _read(pid, "cmdline")]
        return [self.process.pid]

    def wait(self, condition: Callable[[], object], what: str, *, seconds: float = _PATIENCE) -> float:
        """Wait until something holds while the run goes on; returns how long it took."""
        began = time.monotonic()
        while not condition():
            taken = time.monotonic() - began
            if self.process.poll() is not None and not condition():
                raise AssertionError(f"{what}: the run has ended ({self.process.returncode}):\n{self.said}")
            if taken > seconds:
                raise AssertionError(f"{what}: not within {seconds:.0f} s:\n{self.said}")
            time.sleep(0.005)
        return time.monotonic() - began

    def wait_for_step(self, step: int, *, after: int = 0) -> None:
        """Wait until the run has made `step` updates, and this by an attempt later than `after`."""
        self.wait(lambda: trained_by(self.folder) > after and last_step(self.folder) >= step, f"step {step}")

    def end(self, *, code: int, seconds: float = _PATIENCE) -> str:
        """Wait for the end, check the exit code and that no process is left; returns what was said."""
        try:
            found = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it still runs after {seconds:.0f} s:\n{self.said}") from None
        self.require_gone(10)
        assert found == code, f"exit code {found}, expected {code}:\n{self.said}"
        return self.said

    def require_gone(self, seconds: float) -> float:
        """Check that all processes of this start are gone within some seconds; returns how long it took."""
        began = time.monotonic()
        while left := self.alive():
            if time.monotonic() - began > seconds:
                shown = [_read(pid, "cmdline").replace("\0", " ")[:200] for pid in left]
                raise AssertionError(f"processes {left} outlive their launcher: {shown}\n{self.said}")
            time.sleep(0.02)
        return time.monotonic() - began


@contextmanager
def started(
    arguments: Sequence[str],
    folder: Path,
    *,
    environment: Mapping[str, str] = ON_CPU,
    logs: Path | None = None,
) -> Iterator[Run]:
    """Start a run, in a session of its own; whatever is left of it in the end is killed.

    Args:
        arguments: the command.
        folder: the run folder that it names.
        environment: what is set beside that of the tests.
        logs: where to keep what it says; None: beside the run folder.

    """
    mark = f"{_MARK}={uuid.uuid4()}"
    log = (logs or folder.parent) / f"said-{mark[-8:]}.txt"
    with log.open("wb") as out:
        process = subprocess.Popen(
            arguments,
            cwd=log.parent,
            env={**os.environ, **environment, **dict([mark.split("=")])},
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    run = Run(process, folder, log, mark)
    try:
        yield run
    finally:
        for pid in run.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def finish(arguments: Sequence[str], folder: Path, *, code: int = 0, logs: Path | None = None) -> str:
    """Run a command to its end; returns what it said."""
    with started(arguments, folder, logs=logs) as run:
        return run.end(code=code)


_WHOLE: dict[str, Path] = {}


def whole_run(factory: pytest.TempPathFactory, launcher: str | int, **changes: object) -> Path:
    """Return the folder of a run that nobody has disturbed, made once a session."""
    key = repr((launcher, sorted(changes.items())))
    if key not in _WHOLE:
        folder = factory.mktemp("whole") / "run"
        finish(command(launcher, *options(pictures(factory), folder, **changes)), folder)
        require_each_once(folder, epochs=int(str(changes.get("train__epochs", EPOCHS))))
        _WHOLE[key] = folder
    return _WHOLE[key]


# Processes.


def _pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text(encoding="utf-8", errors="replace")
    except OSError:  # it has ended
        return ""


def state_of(pid: int) -> str:
    """Return a process's state as in proc(5), X if there is none."""
    return (_read(pid, "stat").rpartition(") ")[2] or "X")[0]


def catches(pid: int, number: int) -> bool:
    """Return whether a process has a handler of its own for a signal."""
    masks = dict(line.split(":\t", 1) for line in _read(pid, "status").splitlines() if ":\t" in line)
    return bool(int(masks.get("SigCgt", "0"), 16) >> (number - 1) & 1)


def children(pid: int) -> list[int]:
    """Return the children of a process."""
    parents = {child: _read(child, "stat").rpartition(") ")[2].split()[1:2] for child in _pids()}
    return [child for child, parent in parents.items() if parent == [str(pid)]]


def require_dead(pids: Sequence[int], seconds: float) -> None:
    """Check that these processes end within some seconds."""
    until = time.monotonic() + seconds
    while left := [pid for pid in pids if state_of(pid) not in "ZX"]:
        assert time.monotonic() < until, f"still alive: {[(pid, _read(pid, 'cmdline')) for pid in left]}"
        time.sleep(0.02)


def kill_a_trainer(run: Run, step: int, random_: random.Random, *, after: int) -> None:
    """Kill one of the trainer's processes once an attempt later than `after` has made `step` updates."""
    run.wait_for_step(step, after=after)
    victim = random_.choice(sorted(run.trainers()))
    loaders = children(victim)
    print(
        f"step {last_step(run.folder)} of attempt {trained_by(run.folder)}: SIGKILL to {victim}", flush=True
    )
    os.kill(victim, signal.SIGKILL)
    if victim != run.process.pid:
        require_dead([victim, *loaders], 10)


# What a run folder says while the run goes on.


def _lines(path: Path) -> list[str]:
    """Return the whole lines of a file that may not be there, or not to its end."""
    try:
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        return []


def last_step(folder: Path) -> int:
    """Return how many updates the run has told of."""
    found = [
        row["step"] for row in map(json.loads, _lines(folder / "metrics.jsonl")) if row["kind"] == "train"
    ]
    return max(found, default=0)


def trained_by(folder: Path) -> int:
    """Return the latest attempt that has come to an update."""
    return max((json.loads(line)["attempt"] for line in _lines(folder / "audit" / "rank-0.jsonl")), default=0)


def attempts(folder: Path) -> list[dict[str, Any]]:
    """Return the records of all attempts, in their order."""
    paths = sorted((folder / "attempts").glob("*.json"))
    return [json.loads(path.read_text(encoding="ascii")) for path in paths]


def newest(folder: Path) -> Path:
    """Return the newest checkpoint by its name; a folder that is not whole never has such a name."""
    return max((folder / "checkpoints").glob("step-*"), key=lambda path: path.name)


def saved_step(folder: Path) -> int:
    """Return the step of the newest checkpoint, 0 where there is none."""
    return max((int(path.name.split("-")[1]) for path in (folder / "checkpoints").glob("step-*")), default=0)


# What a run has done.


def _audit(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the rows of every update, one for each process that made it.

    Of a step's rows those of the latest attempt count: the earlier ones were lost, and made again.
    """
    latest: dict[int, list[dict[str, Any]]] = {}
    paths = sorted((folder / "audit").glob("rank-*.jsonl"))
    for row in (json.loads(line) for path in paths for line in path.read_text(encoding="ascii").splitlines()):
        kept = latest.setdefault(row["step"], [])
        if not kept or row["attempt"] > kept[0]["attempt"]:
            latest[row["step"]] = [row]
        elif row["attempt"] == kept[0]["attempt"]:
            kept.append(row)
    assert sorted(latest) == list(range(len(latest))), "no update is missing"
    for step, shares in latest.items():
        assert len(shares) == shares[0]["world"], f"step {step}: a share of every process"
    return [latest[step] for step in range(len(latest))]


def updates(folder: Path) -> list[tuple[int, float, dict[int, int]]]:
    """Return (epoch, share of the peak learning rate, {example: checksum of its pixels}) of every update."""
    found = []
    for step, shares in enumerate(_audit(folder)):
        pixels = [pair for row in shares for pair in zip(row["examples"], row["pixels"], strict=True)]
        assert len(dict(pixels)) == len(pixels), f"step {step}: no example twice"
        found.append((shares[0]["epoch"], shares[0]["lr_factor"], dict(pixels)))
    return found


def worlds(folder: Path) -> list[int]:
    """Return how many processes have made each update."""
    return [len(shares) for shares in _audit(folder)]


def require_each_once(folder: Path, *, epochs: int = EPOCHS) -> None:
    """Check that every epoch has seen each training example exactly once."""
    seen: Counter[tuple[int, int]] = Counter()
    for epoch, _, pixels in updates(folder):
        seen.update((epoch, example) for example in pixels)
    assert seen == {(epoch, example): 1 for epoch in range(epochs) for example in range(EXAMPLES)}


def figures(folder: Path) -> list[dict[str, Any]]:
    """Return all rows of a run's metrics without what is a matter of time."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMED} for line in lines]


def assert_equal_runs(found: Path, expected: Path) -> None:
    """Check that two runs have done and left the same, bit for bit."""
    assert updates(found) == updates(expected), "the same examples, crops and learning rates"
    assert figures(found) == figures(expected), "no hole, no repetition, the same figures"
    assert newest(found).name == newest(expected).name
    for name in ("model", "optimizer", "statistics"):
        _require_equal_tensors(*(newest(folder) / f"{name}.safetensors" for folder in (found, expected)))
    _require_equal_tensors(*(folder / "model.safetensors" for folder in (found, expected)))
    assert state(found)["best"] == state(expected)["best"]


def _require_equal_tensors(found: Path, expected: Path) -> None:
    assert found.exists() == expected.exists(), found.name
    if not found.exists():
        return
    one, other = load_file(found), load_file(expected)
    assert one.keys() == other.keys()
    differing = [key for key in one if not torch.equal(one[key], other[key])]
    assert not differing, f"{found}: {differing} differ"


def require_close(found: Path, expected: Path, *, losses: float, weights: float) -> None:
    """Check that two runs have seen the same, and that their results differ only by the order of sums.

    Args:
        found: a run folder.
        expected: that of another run.
        losses: how far the losses of every point and epoch may be apart, as a share of them.
        weights: how far any weight of the last model may be.

    """
    measured = differences(found, expected)
    print(f"apart by at most {measured[0]:.1e} of a loss, and {measured[1]:.1e} in any weight")
    assert measured[0] <= losses
    assert measured[1] <= weights


def differences(found: Path, expected: Path) -> tuple[float, float]:
    """Return the greatest relative difference of a loss, and the greatest difference of a weight."""
    assert updates(found) == updates(expected), "the same examples, crops and learning rates"
    one, other = figures(found), figures(expected)
    names = [(row["kind"], row["epoch"], row["step"]) for row in one]
    assert names == [(row["kind"], row["epoch"], row["step"]) for row in other], "no hole, no repetition"
    for a, b in zip(one, other, strict=True):
        assert {k: v for k, v in a.items() if "lr" in k or "seen" in k} == {
            k: v for k, v in b.items() if "lr" in k or "seen" in k
        }
    pairs = [(a[k], b[k]) for a, b in zip(one, other, strict=True) for k in a if k.endswith("_loss")]
    a, b = (load_file(newest(folder) / "model.safetensors") for folder in (found, expected))
    assert a.keys() == b.keys()
    apart = max((a[key].double() - b[key].double()).abs().max().item() for key in a)
    return max(abs(x - y) / abs(y) for x, y in pairs), apart


def state(folder: Path) -> dict[str, Any]:
    """Return the state of the newest checkpoint."""
    found: dict[str, Any] = json.loads((newest(folder) / "state.json").read_text(encoding="ascii"))
    return found


def epochs_of(folder: Path) -> list[int]:
    """Return the epochs that the figures tell of."""
    return [
        row["epoch"] for row in map(json.loads, _lines(folder / "metrics.jsonl")) if row["kind"] == "epoch"
    ]
