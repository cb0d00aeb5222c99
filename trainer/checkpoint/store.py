"""The folder `checkpoints/`: checkpoints are written atomically and verified when they are read. No pickle.

step-00000120-epoch-0004/   after 120 updates, of them 4 whole epochs
  model.safetensors           weights and buffers
  optimizer.safetensors       moments of the optimizer
  ema.safetensors             with regularization.ema: moving average of the weights
  statistics.safetensors      BatchNorm statistics of each process, if there are several
  state.json                  position and identity of the run
  metrics.jsonl               the run's metrics up to here
  MANIFEST.json               size and SHA-256 of each of these files
LATEST                      name of the newest checkpoint, for people and scripts
damaged-1-step-...          quarantined: it failed its check

A checkpoint is written into a temporary folder, flushed to the disk, and renamed. Then LATEST is replaced, and
checkpoints that are no longer kept are renamed and removed. A checkpoint is read only if it holds exactly the files
that its manifest lists: names, sizes and SHA-256 are checked before any of them is parsed.
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
_MAX_JSON = 1 << 26
"""Size limit of a manifest or state [bytes]. A long list of classes takes a few megabytes."""
_ERRORS_OF_DAMAGE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO}
_WRITING, _LEAVING, _DAMAGED = ".writing-", ".leaving-", "damaged-"


class CorruptCheckpoint(Exception):
    """A folder is not a valid checkpoint; the message says why."""


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
    tensors |= {name: entries for name, entries in optional.items() if entries}
    return {name: save(entries) for name, entries in tensors.items()}


def load_tensors(path: Path) -> Tensors:
    """Return the tensors of a file of a checkpoint that has passed its check.

    Raises:
        UserError: it cannot be read.

    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, RuntimeError, TypeError) as error:  # torch's, of an impossible shape
        reason = escape_unprintable(str(error).partition("\n")[0])
        raise UserError(
            f"{path}: could not be read ({reason}), although it has passed its check; the same command tries again"
        ) from None


def write(folder: Path, checkpoint: CheckpointId, files: Mapping[str, bytes], *, check: Callable[[], None]) -> None:
    """Write a checkpoint, and point LATEST to it.

    Args:
        folder: the folder of all checkpoints of the run.
        checkpoint: position of the checkpoint.
        files: name -> content.
        check: raises if this process may no longer write. It is called just before the checkpoint is renamed.

    Raises:
        OSError: the disk is full or has failed. The earlier checkpoints are unchanged.

    """
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)
    temporary = folder / f"{_WRITING}{checkpoint.name}-{secrets.token_hex(4)}"
    try:
        temporary.mkdir()
        manifest: dict[str, Any] = {"format": FORMAT, "files": {}}
        for name, content in files.items():
            _write_file(temporary / name, content)
            manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        _write_file(temporary / MANIFEST, json.dumps(manifest, indent=1).encode())
        sync_folder(temporary)
        check()
        temporary.rename(folder / checkpoint.name)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # makes room on a full disk
        raise
    sync_folder(folder)
    _update_latest(folder, checkpoint)


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        for start in range(0, len(content), _CHUNK):
            file.write(content[start : start + _CHUNK])
        file.flush()
        os.fsync(file.fileno())


def prune(folder: Path, keep: Iterable[CheckpointId], *, check: Callable[[], None]) -> None:
    """Remove the checkpoints that are not in `keep`, except the newest. Quarantined checkpoints stay.

    `check` raises if this process may no longer write. It is called before each removal.
    """
    kept = set(keep)
    for checkpoint in list_checkpoints(folder)[1:]:
        if checkpoint not in kept:
            check()
            leaving = folder / f"{_LEAVING}{checkpoint.name}"
            (folder / checkpoint.name).rename(leaving)  # a kill leaves no partial checkpoint under this name
            with suppress(OSError):  # a network file system may still use a file; the next start removes it
                _remove(leaving)


def clean_up(folder: Path) -> None:
    """Remove the partly written and partly removed checkpoints of a start that was killed."""
    for prefix in (_WRITING, _LEAVING):
        for path in folder.glob(f"{prefix}*"):
            _remove(path)
    remove_leftovers(folder, LATEST)


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():  # not a checkpoint, but something under its name
        path.unlink()
    else:
        shutil.rmtree(path)


def list_checkpoints(folder: Path) -> list[CheckpointId]:
    """Return the checkpoints in a folder, by name, newest first."""
    try:
        names = [path.name for path in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted(filter(None, map(CheckpointId.of, names)), reverse=True)


def load_latest(folder: Path, *, log: Callable[[str], object]) -> LoadedCheckpoint | None:
    """Return the newest valid checkpoint. Quarantine newer ones that are damaged, and log a line for each.

    Raises:
        UserError: all checkpoints are damaged.

    """
    for checkpoint in list_checkpoints(folder):
        path = folder / checkpoint.name
        try:
            loaded = read(path)
        except CorruptCheckpoint as error:
            log(f"{path} is damaged ({error}): quarantined as {_quarantine(path).name}")
            continue
        if not _is_latest(folder, checkpoint):
            _update_latest(folder, checkpoint)
        return loaded
    damaged = sorted(path.name for path in folder.glob(f"{_DAMAGED}*"))
    if damaged:
        raise UserError(
            f"{folder}: all checkpoints are damaged: {join_truncated(damaged, limit=5)}. Repair one and restore its "
            "name, or start anew with --run.resume never, which archives the run"
        )
    return None


def _is_latest(folder: Path, checkpoint: CheckpointId) -> bool:
    latest = folder / LATEST
    if latest.is_symlink() or not latest.is_file():
        return False
    expected = f"{checkpoint.name}\n".encode()
    with latest.open("rb") as file:
        return file.read(len(expected) + 1) == expected


def _update_latest(folder: Path, checkpoint: CheckpointId) -> None:
    if (folder / LATEST).is_dir() and not (folder / LATEST).is_symlink():
        _quarantine(folder / LATEST)  # a file cannot replace a folder
    write_text_atomically(folder / LATEST, checkpoint.name + "\n")


def _quarantine(path: Path) -> Path:
    number = 1
    while os.path.lexists(quarantined := path.with_name(f"{_DAMAGED}{number}-{path.name}")):
        number += 1
    path.rename(quarantined)
    sync_folder(path.parent)
    return quarantined


def read(path: Path) -> LoadedCheckpoint:
    """Return the checkpoint at `path` if it holds exactly what its manifest lists.

    Raises:
        CorruptCheckpoint: it is damaged, or not a checkpoint.
        OSError: it cannot be read now, for example without permission. It may be valid.
        UserError: a later version of regraft wrote it.

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
def _report_damage(name: str) -> Iterator[None]:
    """Raise CorruptCheckpoint with the file's name for an error in its content."""
    try:
        yield
    except (ValueError, TypeError, KeyError, RecursionError, SafetensorError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise CorruptCheckpoint(f"{name}: {reason}") from None


def _read(path: Path) -> LoadedCheckpoint:
    _require_kind(path, stat.S_ISDIR, "a folder")
    with _report_damage(MANIFEST):
        expected = _manifest(path)
    names = set(os.listdir(path))  # noqa: PTH208 (names, not paths)
    for name in sorted(names ^ {*expected, MANIFEST}):
        raise CorruptCheckpoint(f"{name!r} is missing" if name in expected else f"{name!r} is not in its manifest")
    for name, (size, digest) in expected.items():
        _require_kind(path / name, stat.S_ISREG, "a file")
        actual = (path / name).stat().st_size
        if actual != size:
            raise CorruptCheckpoint(f"{name} has {actual} bytes, its manifest says {size}")
        if _sha256(path / name) != digest:
            raise CorruptCheckpoint(f"{name} was changed: its SHA-256 differs from its manifest's")
    for name in expected:
        if name.endswith(".safetensors"):
            with _report_damage(name), safe_open(path / name, framework="pt"):
                pass
    with _report_damage(STATE):
        state = CheckpointState.from_json(_read_limited(path / STATE))
    if CheckpointId(state.step, state.epoch).name != path.name:
        raise CorruptCheckpoint(f"it holds the state after step {state.step} and {state.epoch} epochs")
    with _report_damage(METRICS):
        return LoadedCheckpoint(path, state, (path / METRICS).read_text(encoding="utf-8"))


def _manifest(path: Path) -> dict[str, tuple[int, str]]:
    """Return name -> (bytes, SHA-256) for the names that a checkpoint may have."""
    _require_kind(path / MANIFEST, stat.S_ISREG, "a file")
    content = json.loads(_read_limited(path / MANIFEST))
    if content["format"] != FORMAT:
        raise ValueError(f"format {content['format']!r}, this version of regraft reads {FORMAT}")
    files = content["files"]
    if not isinstance(files, dict):
        raise CorruptCheckpoint(f"its manifest lists {type(files).__name__}, expected names with sizes and SHA-256")
    unknown = files.keys() - _ALLOWED
    missing = _REQUIRED - files.keys()
    if unknown or missing:
        raise CorruptCheckpoint(f"its manifest lists {sorted(map(str, files))}, expected {sorted(_REQUIRED)}")
    for name, entry in files.items():
        if type(entry["bytes"]) is not int or not isinstance(entry["sha256"], str):
            raise CorruptCheckpoint(f"its manifest says {entry!r} of {name}")
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}


def _require_kind(path: Path, is_kind: Callable[[int], bool], what: str) -> None:
    # Links are not followed, since a checkpoint holds its own files. Opening a pipe would block.
    if not is_kind(path.lstat().st_mode):
        raise CorruptCheckpoint(f"{path.name} is not {what}")


def _read_limited(path: Path) -> str:
    size = path.stat().st_size
    if size > _MAX_JSON:
        raise CorruptCheckpoint(f"{path.name} has {size} bytes, expected at most {_MAX_JSON}")
    return path.read_text(encoding="utf-8")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
