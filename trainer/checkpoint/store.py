"""`checkpoints/`: folders that are whole or absent, whatever kills the process that writes them. No pickle.

step-00000120-epoch-0004/   after 120 updates, of them 4 whole epochs
  model.safetensors           weights and buffers
  optimizer.safetensors       moments
  ema.safetensors             with regularization.ema: moving average of the weights
  statistics.safetensors      BatchNorm statistics of each process, where they differ
  state.json                  position of the run, and what the run is
  metrics.jsonl               the run's metrics up to here
  MANIFEST.json               size and SHA-256 of each of these files
LATEST                      name of the checkpoint written last, for people and scripts
damaged-1-step-...          quarantined: it failed its check

A checkpoint is written into a folder of another name, flushed to the disk with everything in it, and renamed. Then
LATEST is replaced, and checkpoints that are no longer kept are renamed and removed. When a checkpoint is read, it
counts only if it holds exactly the files that its manifest lists: names, sizes and sums are checked before any of them
is parsed.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.checkpoint.state import CheckpointId, CheckpointState
from trainer.errors import UserError
from trainer.run.atomic import remove_leftovers, sync_folder, write_text_atomically
from trainer.text import escape_unprintable, join_truncated

Tensors = dict[str, Tensor]

MANIFEST, LATEST, STATE, METRICS = "MANIFEST.json", "LATEST", "state.json", "metrics.jsonl"
MODEL, OPTIMIZER, STATISTICS = "model.safetensors", "optimizer.safetensors", "statistics.safetensors"
EMA = "ema.safetensors"
FORMAT = 1
_REQUIRED = {MODEL, OPTIMIZER, STATE, METRICS}
_ALLOWED = _REQUIRED | {STATISTICS, EMA}
_CHUNK = 1 << 22
_MOST_JSON = 1 << 26
"""Bytes of the largest manifest or state that is read: a class list takes some megabytes at most."""
_ERRORS_OF_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}
_WRITING, _LEAVING, _DAMAGED = ".writing-", ".leaving-", "damaged-"


class CorruptCheckpoint(Exception):
    """A folder is not the checkpoint that its name promises; the text says why."""


class LoadedCheckpoint(NamedTuple):
    """A checkpoint that passed its check."""

    path: Path
    state: CheckpointState
    metrics: str
    """Text of its metrics.jsonl."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state dict of `TrainState` that was saved.

        Raises:
            UserError: a file cannot be read.

        """
        state = self.state
        return {
            "model": load_tensors(self.path / MODEL),
            "optimizer": load_tensors(self.path / OPTIMIZER),
            "ema": load_tensors(self.path / EMA) if (self.path / EMA).exists() else {},
            "scaler": state.scaler,
            "epoch": state.epoch,
            "step": state.step,
            "metrics": state.metrics,
            "best": state.best,
        }

    def batch_norm_statistics(self) -> Tensors:
        """Return the BatchNorm statistics of each process, `RANK.NAME` -> tensor; empty if one process wrote it."""
        return load_tensors(self.path / STATISTICS) if (self.path / STATISTICS).exists() else {}


def to_files(saved: Mapping[str, Any], statistics: Tensors) -> dict[str, bytes]:
    """Return the tensors of a state dict, and those of the BatchNorm statistics, as file name -> content."""
    tensors = {MODEL: saved["model"], OPTIMIZER: saved["optimizer"]}
    optional = {EMA: saved["ema"], STATISTICS: statistics}
    tensors |= {name: held for name, held in optional.items() if held}
    return {name: save(held) for name, held in tensors.items()}


def load_tensors(path: Path) -> Tensors:
    """Return the tensors of a file of a checkpoint that was checked.

    Raises:
        UserError: it cannot be read.

    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:  # torch's, of an impossible shape
        reason = escape_unprintable(str(error).partition("\n")[0])
        raise UserError(
            f"{path}: could not be read ({reason}), although its check has passed; the same command tries again"
        ) from None


def write(
    folder: Path, place: CheckpointId, files: Mapping[str, bytes], *, check: Callable[[], None]
) -> None:
    """Write a checkpoint, and point LATEST at it.

    Args:
        folder: of all checkpoints of the run.
        place: where in the run it stands.
        files: name -> content.
        check: raises where this process may no longer write; called last thing before anything is put in place.

    Raises:
        OSError: the disk is full, or fails; the earlier checkpoints are as they were.

    """
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
    temporary = folder / f"{_WRITING}{place.name}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
        manifest: dict[str, Any] = {"format": FORMAT, "files": {}}
        for name, content in files.items():
            _write_file(temporary / name, content)
            manifest["files"][name] = {
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        _write_file(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(temporary)
        check()
        temporary.rename(folder / place.name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk has room again
        raise
    sync_folder(folder)
    _point_at(folder, place)


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        for start in range(0, len(content), _CHUNK):
            file.write(content[start : start + _CHUNK])
        file.flush()
        os.fsync(file.fileno())


def prune(folder: Path, keep: Iterable[CheckpointId], *, check: Callable[[], None]) -> None:
    """Remove the checkpoints that are not to be kept, except the newest; what is set aside stays."""
    kept = set(keep)
    for place in list_checkpoints(folder)[1:]:
        if place not in kept:
            check()
            leaving = folder / f"{_LEAVING}{place.name}"
            (folder / place.name).rename(leaving)  # never a checkpoint that is half there
            with suppress(OSError):  # what a network file system holds on to, the next start removes
                _remove(leaving)


def clean_up(folder: Path) -> None:
    """Remove what an attempt that was killed has left half written or half removed."""
    for prefix in (_WRITING, _LEAVING):
        for path in folder.glob(f"{prefix}*"):
            _remove(path)
    remove_leftovers(folder, LATEST)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():  # none of ours, under one of our names
        path.unlink()
    else:
        shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[CheckpointId]:
    """Return where there are checkpoints, by their names alone, the newest first."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(filter(None, map(CheckpointId.of, names)), reverse=True)


def has_any(folder: Path) -> bool:
    """Return whether a checkpoint was ever finished here, be it damaged since."""
    return bool(list_checkpoints(folder)) or any(folder.glob(f"{_DAMAGED}*"))


def load_latest(folder: Path, *, log: Callable[[str], object]) -> LoadedCheckpoint | None:
    """Return the newest checkpoint that is whole; those that are not are set aside, with a line for each.

    Raises:
        UserError: there were some, and none is whole.

    """
    for place in list_checkpoints(folder):
        path = folder / place.name
        try:
            found = read(path)
        except CorruptCheckpoint as damage:
            aside = _quarantine(path)
            log(f"{path} is damaged ({damage}): set aside as {aside.name}")
            continue
        if not _points_at(folder, place):
            _point_at(folder, place)
        return found
    damaged = sorted(path.name for path in folder.glob(f"{_DAMAGED}*"))
    if damaged:
        raise UserError(
            f"{folder}: no checkpoint is whole; set aside: {join_truncated(damaged, limit=5)}. Restore one "
            "under its name, or "
            "start anew with --run.resume never, which moves the run aside"
        )
    return None


def _points_at(folder: Path, place: CheckpointId) -> bool:
    latest = folder / LATEST
    if latest.is_symlink() or not latest.is_file():
        return False
    expected = f"{place.name}\n".encode()
    with latest.open("rb") as file:
        return file.read(len(expected) + 1) == expected


def _point_at(folder: Path, place: CheckpointId) -> None:
    if (folder / LATEST).is_dir() and not (folder / LATEST).is_symlink():
        _quarantine(folder / LATEST)  # a folder gives way to no file
    write_text_atomically(folder / LATEST, place.name + "\n")


def _quarantine(path: Path) -> Path:
    number = 1
    while os.path.lexists(aside := path.with_name(f"{_DAMAGED}{number}-{path.name}")):
        number += 1
    path.rename(aside)
    sync_folder(path.parent)
    return aside


def read(path: Path) -> LoadedCheckpoint:
    """Return the checkpoint at `path` if it holds exactly what its manifest lists.

    Raises:
        Damaged: it does not, or is none of ours.
        OSError: it cannot be read here and now, as without permission: nothing against the checkpoint.
        UserError: a later regraft wrote it.

    """
    try:
        return _read(path)
    except CorruptCheckpoint as error:
        raise CorruptCheckpoint(escape_unprintable(str(error)[:200])) from None
    except OSError as error:
        if error.errno not in _ERRORS_OF_DAMAGE:
            raise
        raise CorruptCheckpoint(escape_unprintable(str(error)[:200])) from None


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Say in which file an error was met."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CorruptCheckpoint(f"{name}: {reason}") from None


def _read(path: Path) -> LoadedCheckpoint:
    _require_kind(path, stat.S_ISDIR, "a folder")
    with _naming(MANIFEST):
        expected = _manifest(path)
    there = set(os.listdir(path))  # noqa: PTH208 (names, not paths)
    for name in sorted(there ^ {*expected, MANIFEST}):
        raise CorruptCheckpoint(
            f"{name!r} is missing" if name in expected else f"{name!r} does not stand in its manifest"
        )
    for name, (size, digest) in expected.items():
        _require_kind(path / name, stat.S_ISREG, "a file")
        actual = (path / name).stat().st_size
        if actual != size:
            raise CorruptCheckpoint(f"{name} has {actual} bytes, its manifest says {size}")
        if _sha256(path / name) != digest:
            raise CorruptCheckpoint(
                f"{name} is not what was written: its SHA-256 differs from its manifest's"
            )
    for name in expected:
        if name.endswith(".safetensors"):
            with _naming(name), safe_open(path / name, framework="pt"):
                pass
    with _naming(STATE):
        state = CheckpointState.from_json(_small(path / STATE))
    if CheckpointId(state.step, state.epoch).name != path.name:
        raise CorruptCheckpoint(f"it holds the state after step {state.step} and {state.epoch} epochs")
    with _naming(METRICS):
        return LoadedCheckpoint(path, state, (path / METRICS).read_text(encoding="utf-8"))


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Return name -> (bytes, SHA-256), with names that are ours and nothing else."""
    _require_kind(path / MANIFEST, stat.S_ISREG, "a file")
    content = json.loads(_small(path / MANIFEST))
    if content["format"] != FORMAT:
        raise CorruptCheckpoint(f"format {content['format']!r}, this version of regraft reads {FORMAT}")
    files = content["files"]
    if not isinstance(files, dict):
        raise CorruptCheckpoint(
            f"its manifest lists {type(files).__name__}, expected names with sizes and sums"
        )
    unknown = files.keys() - _ALLOWED
    missing = _REQUIRED - files.keys()
    if unknown or missing:
        raise CorruptCheckpoint(f"its manifest lists {sorted(map(str, files))}, expected {sorted(_REQUIRED)}")
    for name, entry in files.items():
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise CorruptCheckpoint(f"its manifest says {entry!r} of {name}")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def _require_kind(path: Path, is_kind: Callable[[int], bool], what: str) -> None:
    # Without following links: a checkpoint holds its own files, and a pipe would be waited for.
    if not is_kind(path.lstat().st_mode):
        raise CorruptCheckpoint(f"{path.name} is not {what}")


def _small(path: Path) -> str:
    size = path.stat().st_size
    if size > _MOST_JSON:
        raise CorruptCheckpoint(f"{path.name} has {size} bytes, expected at most {_MOST_JSON}")
    return path.read_text(encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
