"""Checkpoint states and files for tests."""

import copy
import dataclasses
import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId, CheckpointState, RunIdentity, RunMetadata
from trainer.checkpoint.store import METRICS, MODEL, OPTIMIZER, STATE, STATISTICS
from trainer.metrics import BestEpoch, MetricState

IDENTITY = RunIdentity(
    architecture="resnet18",
    classes=("ant", "猫 🐈", "two\nlines", "broken \udcff bytes"),
    examples=(4, 3, 2, 1),
    data="5e3a",
)
SCALER = {"scale": 1024.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2000, "_growth_tracker": 3}
METADATA = RunMetadata(
    identity=IDENTITY,
    seed=2**63 - 1,
    steps_per_epoch=3,
    schedule={"kind": "cosine", "warmup_steps": 1, "total_steps": 9},
    auto_resolved={"precision": "fp16", "channels_last": True},
    world_size=1,
    threads=2,
    attempt=1,
    versions={"torch": "2.11"},
)


def make_state(step: int = 4, epoch: int = 1, *, run: RunMetadata = METADATA, **changes: Any) -> CheckpointState:
    """Return a state; within an epoch it has metric sums."""
    within_epoch = step > epoch * run.steps_per_epoch
    sums = MetricState(rows=((0.1 * step, 1, 4),) * run.world_size, seconds=1.5, compute_seconds=0.7)
    fields: dict[str, Any] = {
        "epoch": epoch,
        "step": step,
        "metrics": sums if within_epoch else None,
        "best": BestEpoch(epoch=1, step=3, value=0.1 + 0.2, loss=1 / 3),
        "scaler": SCALER,
        "order_digest": "0f" * 32,
        "run": run,
    }
    return CheckpointState(**fields | changes)


def with_metadata(**changes: Any) -> RunMetadata:
    return dataclasses.replace(METADATA, **changes)


def make_files(checkpoint: CheckpointId) -> dict[str, bytes]:
    """Return the files of a checkpoint. No two have the same content, nor do those of two checkpoints."""
    generator = torch.Generator().manual_seed(checkpoint.step)
    model, moments, statistics = (torch.randn(size, generator=generator) for size in (300, 200, 100))
    return {
        MODEL: save({"weight": model, "batches": torch.tensor(checkpoint.step)}),
        OPTIMIZER: save({"momentum_buffer.weight": moments}),
        STATISTICS: save({"0.running_mean": statistics}),
        STATE: make_state(*checkpoint).to_json(),
        METRICS: "".join(f'{{"kind": "train", "epoch": {n}}}\n' for n in range(checkpoint.step)).encode(),
    }


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Checkpoints in a folder

FILES = (MODEL, OPTIMIZER, STATISTICS, STATE, METRICS)
OLDER, NEWER = CheckpointId(3, 1), CheckpointId(4, 1)
QUARANTINED = f"damaged-1-{NEWER.name}"


def write(folder: Path, *checkpoints: CheckpointId, files: Mapping[str, bytes] | None = None) -> None:
    for checkpoint in checkpoints:
        store.write(folder, checkpoint, files or make_files(checkpoint), check=lambda: None)


def load_latest(folder: Path) -> tuple[store.LoadedCheckpoint | None, list[str]]:
    """Return the newest valid checkpoint, and the lines that were logged."""
    lines: list[str] = []
    return store.load_latest(folder, log=lines.append), lines


def check_equal(loaded: store.LoadedCheckpoint | None, checkpoint: CheckpointId) -> None:
    assert loaded is not None
    assert (loaded.path.name, loaded.state) == (checkpoint.name, make_state(*checkpoint))
    files = make_files(checkpoint)
    assert {name: (loaded.path / name).read_bytes() for name in files} == files
    assert loaded.metrics.encode() == files[METRICS]


def tree(folder: Path) -> dict[str, object]:
    """Return everything below a folder: path -> content, target of a link, or kind."""
    entries: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            entries[name] = ("link", str(path.readlink()))
        else:
            entries[name] = path.read_bytes() if path.is_file() else "folder" if path.is_dir() else "special"
    return entries


def entry_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def manifest_entries(files: Mapping[str, bytes]) -> dict[str, dict[str, Any]]:
    return {
        name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()} for name, content in files.items()
    }


# Damaged JSON

JsonPath = tuple[str | int, ...]
_NOT_NUMBERS = (None, True, "x", [], {}, math.inf, -(10**400))
INVALID: dict[type, tuple[Any, ...]] = {
    str: (None, True, 1.5, [], {}),
    int: _NOT_NUMBERS,
    float: _NOT_NUMBERS,
    list: (None, True, 1.5, "x", [], {}, [[]]),
    dict: (None, True, 1.5, "x", [], [1]),
}
"""Values that are invalid in place of a value of a type."""


def json_entries(value: Any, path: JsonPath = ()) -> Iterator[tuple[JsonPath, Any]]:
    """Yield (path, value) of everything in JSON."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*path, key), child
        yield from json_entries(child, (*path, key))


def edited(content: Any, path: JsonPath, *value: Any) -> Any:
    """Return a copy of JSON with another value at a path, or without that path."""
    result = parent = copy.deepcopy(content)
    for key in path[:-1]:
        parent = parent[key]
    if value:
        parent[path[-1]] = value[0]
    else:
        del parent[path[-1]]
    return result
