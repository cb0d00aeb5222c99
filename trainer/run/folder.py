"""The run folder: its layout, whether a run in it can be resumed, and how earlier results are kept.

config.yaml         the resolved config; `--config` with it runs the same again
metrics.jsonl       one row per epoch, and rows within epochs
model.safetensors   weights of the best epoch, with all that is needed to predict
checkpoints/        training state, in folders that are whole or absent
attempts/           one file per start: who, how far, how it ended
environment/        one file per start: code, packages, hardware and settings
curves.png          losses and accuracies over the epochs
split.csv           the split, if one was made
pretrain/, baseline/    the other phases of a run, with the same layout
initial.safetensors     with transfer.wise_ft: the model before its first update
fine-tuned.safetensors  weights of the best epoch, if WiSE-FT put other weights into model.safetensors
wise.json           result of WiSE-FT
earlier-N-...       results whose checkpoints were gone when the run was started anew
audit/              with run.audit: what each process saw
hangs/              stacks of processes that hung
STOP                created by a person: the run saves and stops
"""

import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from safetensors import SafetensorError

from regraft.contract import (
    ATTEMPTS,
    BASELINE,
    CHECKPOINTS,
    CONFIG,
    CURVES,
    LOG_FOLDER,
    METRICS,
    MODEL,
    PRETRAIN,
    SPLIT,
    read_attempts,
)
from trainer.errors import UserError
from trainer.run.atomic import write_text_atomically

INITIAL, FINE_TUNED, WISE = "initial.safetensors", "fine-tuned.safetensors", "wise.json"
OUR_FILES = (CONFIG, METRICS, MODEL, CHECKPOINTS, ATTEMPTS, CURVES, SPLIT, INITIAL, FINE_TUNED, WISE)
# A resumed run may differ in these options: they say where and how fast it runs, not what it computes. train.epochs and
# regularization.early_stopping may grow. The images are compared by their fingerprint, so the folder may have moved.
_MAY_CHANGE = frozenset(
    {
        "run.dir",
        "run.resume",
        "run.device",
        "run.threads",
        "run.hang_timeout",
        "run.audit",
        "data.root",
        "data.num_workers",
        "data.cache",
        "data.on_unreadable",
        "transfer.strategy",  # a name for options, all of which are compared
        "train.grad_accum_steps",
        "train.logs_per_epoch",
        "checkpoint.every",
        "checkpoint.keep_last",
        "checkpoint.keep_best",
        "checkpoint.keep_every",
    }
)


HEADER = "# Written by regraft: every option of this run. --config with this file runs it again.\n"
"""First line of a config.yaml that a run has written."""


def check_resumable(folder: Path, config: str, *, resume: Literal["auto", "never", "must"]) -> str | None:
    """Return a line on what a run of this config (YAML) finds in the folder; nothing is changed.

    Raises:
        UserError: the folder holds another run, or (`must`) none to go on from.

    """
    if not holds_run(folder):
        # attempts/ is what a start leaves that is killed before it has written anything else.
        ours = [name for name in OUR_FILES if name not in (CONFIG, ATTEMPTS) and (folder / name).exists()]
        if ours:
            raise UserError(
                f"run.dir {folder}: holds {', '.join(ours)} but no {CONFIG}, so it is not a run that could be "
                "gone on with or moved aside; choose another folder"
            )
        if resume == "must":
            raise UserError(f"run.resume is must, but {folder} holds no run to go on from")
        return None
    if not (folder / CONFIG).read_bytes().startswith(HEADER.encode()):
        raise UserError(
            f"run.dir {folder}: holds a {CONFIG} that no run has written, which would be lost; choose another folder"
        )
    if resume == "never":
        return None
    _require_saved_is_there(folder)
    begun = has_checkpoint(folder)
    if resume == "must" and not begun:
        raise UserError(f"run.resume is must, but the run in {folder} has not come to its first checkpoint")
    # A start that got nowhere may be followed by one of another config: it has nothing to lose.
    differences = list(_differences(folder / CONFIG, config)) if begun or (folder / MODEL).exists() else []
    if differences:
        listed = "".join(f"\n  {line}" for line in differences)
        raise UserError(
            f"run.dir {folder}: holds a run of another config:{listed}\n"
            "Choose another run.dir, or --run.resume never, which moves that run aside"
        )
    return None if begun else "an earlier start in this folder had not come to a checkpoint: starting anew"


def _require_saved_is_there(folder: Path) -> None:
    """Raise a UserError where figures would be written over whose training state was saved, and is gone."""
    for record in read_attempts(folder):
        stage = folder / record.stage if record.stage in (PRETRAIN, BASELINE) else folder
        if record.step and (stage / METRICS).exists() and not has_checkpoints(stage / CHECKPOINTS):
            raise UserError(
                f"{stage / CHECKPOINTS}: attempt {record.attempt} has saved step {record.step} of this run, but no "
                "checkpoint is there any more. Restore one, or --run.resume never, which moves the run aside"
            )


def has_checkpoints(folder: Path) -> bool:
    """Return whether a checkpoint was ever completed in a folder of checkpoints, even if it was damaged since."""
    return any(folder.glob("step-*-epoch-*")) or any(folder.glob("damaged-*"))


def holds_run(folder: Path) -> bool:
    """Return whether a run was begun here."""
    return (folder / CONFIG).exists()


def has_checkpoint(folder: Path) -> bool:
    """Return whether there is a checkpoint to go on from, of the run or of its source model."""
    return has_checkpoints(folder / CHECKPOINTS) or has_checkpoints(folder / PRETRAIN / CHECKPOINTS)


def archive_run(folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Give an earlier run another name, and return a line that says which; this start's logs stay in their place."""
    aside = _free_name(folder)
    logs = Path(environment.get(LOG_FOLDER, os.devnull))
    try:
        folder.rename(aside)
        if logs.is_relative_to(folder):
            logs.parent.mkdir(parents=True)
            (aside / logs.relative_to(folder)).rename(logs)
    except OSError as error:
        raise UserError(
            f"run.dir {folder}: cannot be moved aside ({error.strerror}); choose another folder"
        ) from None
    return f"the earlier run was moved to {aside}"


def archive_results(folder: Path) -> str | None:
    """Give results whose checkpoints are not there another name, before they are written over.

    Returns a line that says which, or None where there is no model file to lose.
    """
    if not (folder / MODEL).exists():
        return None
    number, results = 1, (MODEL, METRICS, FINE_TUNED, WISE)
    while any((folder / f"earlier-{number}-{name}").exists() for name in results):
        number += 1
    for name in results:
        if (folder / name).exists():
            (folder / name).rename(folder / f"earlier-{number}-{name}")
    return f"{folder}: holds results but no checkpoint to go on from: kept as earlier-{number}-{MODEL}"


def write_config(folder: Path, config: str) -> None:
    """Write the run's config (YAML), making the folder if need be.

    Raises:
        UserError: it cannot be written.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / CONFIG, HEADER + config)
    except OSError as error:
        raise UserError(
            f"run.dir {folder}: cannot be written to ({error.strerror}); choose another folder"
        ) from None


def saved_precision(folder: Path) -> Literal["fp32", "bf16", "fp16"] | None:
    """Return the precision that a run which goes on from here began with; None where there is none."""
    try:
        if not (folder / CONFIG).read_bytes().startswith(HEADER.encode()) or not has_checkpoint(folder):
            return None
        found = dict(_flat(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")))).get(
            "train.precision"
        )
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError, RecursionError):
        return None  # `examine` says what is wrong with it
    return found if found in ("fp32", "bf16", "fp16") else None


def check_visible(folder: Path) -> None:
    """Raise a UserError where this process does not see the run folder that rank 0 has opened."""
    if not (folder / CONFIG).exists():
        raise UserError(
            f"run.dir {folder}: {socket.gethostname()} does not see what rank 0 has written there; expected one folder "
            "that every machine shares"
        )


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.earlier-{number}")).exists():
        number += 1
    return aside


def _differences(earlier: Path, now: str) -> Iterator[str]:
    after = dict(_flat(yaml.safe_load(now)))
    try:
        before = dict(_flat(yaml.safe_load(earlier.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{earlier}: damaged ({' '.join(str(error).split())}). Restore the file, or --run.resume never, which "
            "moves the run aside"
        ) from None
    for key in sorted((before.keys() | after.keys()) - _MAY_CHANGE):
        if key == "train.epochs" and _is_more(before.get(key), after.get(key)):
            continue
        if key == "regularization.early_stopping" and _is_more_patient(before.get(key), after.get(key)):
            continue
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"


def _is_more(before: object, after: object) -> bool:
    """Return whether a run is to be extended."""
    return isinstance(before, int) and isinstance(after, int) and after > before


def _is_more_patient(before: object, after: object) -> bool:
    """Return whether a run that may have ended early is to go on; null is for ever."""
    return isinstance(before, int) and (after is None or _is_more(before, after))


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@contextmanager
def saving_to(path: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that is gone, into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path}: the state of the run could not be saved ({error}). What was saved before is whole: make room, "
            "and the same command goes on from there"
        ) from None
