"""The run folder: its layout, whether its run can be resumed, and how earlier results are archived.

config.yaml         the resolved config; `--config` with this file repeats the run
metrics.jsonl       one row per epoch, and rows within epochs
model.safetensors   weights of the best epoch, with everything needed to predict
checkpoints/        training state, one folder per checkpoint
attempts/           one file per start: host and process, position, and how it ended
environment/        one file per start: code, packages, hardware and settings
curves.png          losses and accuracies over the epochs
blocks.json         what is trained of each block of the model, for the report
report.html         the run on one page; `regraft report` writes it again
evaluation.json     metrics of model.safetensors on each split, at the end of the run
predictions.csv     its prediction for each image of these splits
split.csv           the split, if regraft made one
excluded.csv        the images that data.exclude left out
micro-batch.json    micro-batch size that was found, or halved after an attempt ran out of memory
images.json         hashes of the images, by which a resumed run notices that one has changed
pretrain/, baseline/    the other phases of a run, with the same layout
initial.safetensors     with transfer.wise_ft: the model before its first update
fine-tuned.safetensors  weights of the best epoch, if WiSE-FT put other weights into model.safetensors
wise.json           result of WiSE-FT
earlier-N-...       results without checkpoints, renamed when the run was started anew
audit/              with run.audit: the examples of every update
hangs/              stacks of processes that hung
trackers/           with run.trackers: the runs in experiment trackers, and their local files
.regraft            mark of a folder that was created before a run was started in it (preview, lr-find, compare)
STOP                a person creates this file to stop the run
"""

import os
import socket
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import yaml
from safetensors import SafetensorError

from regraft import yaml_file
from regraft.contract import (
    ATTEMPTS,
    BASELINE,
    BLOCKS,
    CHECKPOINTS,
    CONFIG,
    CURVES,
    EVALUATION,
    EXCLUDED,
    IMAGES,
    LOG_FOLDER,
    METRICS,
    MODEL,
    PREDICTIONS,
    PRETRAIN,
    REPORT,
    SPLIT,
    latest_attempt,
    read_attempts,
)
from regraft.contract import CONFIG_HEADER as HEADER
from trainer.distributed.precision import PRECISIONS, Execution
from trainer.errors import UserError
from trainer.run.atomic import describe_missing, write_text_atomically

INITIAL, FINE_TUNED, WISE = "initial.safetensors", "fine-tuned.safetensors", "wise.json"
_RESULTS = (MODEL, METRICS, FINE_TUNED, WISE, EVALUATION, PREDICTIONS)
_REPORTS = (CURVES, REPORT, BLOCKS)
OUR_FILES = (*_RESULTS, *_REPORTS, CONFIG, CHECKPOINTS, ATTEMPTS, SPLIT, EXCLUDED, IMAGES, INITIAL)
# Options that a resumed run may change: they set where and how fast it runs, not what it computes. train.epochs and
# regularization.early_stopping may grow. Images are compared by name and content, so their folder may have moved.
_MAY_CHANGE = frozenset(
    {
        "run.dir",
        "run.resume",
        "run.device",
        "run.threads",
        "run.hang_timeout",
        "run.audit",
        "run.report",
        "run.trackers",
        "run.tracker_project",
        "data.root",
        "data.train_dir",
        "data.val_dir",
        "data.test_dir",
        "data.csv_root",
        "data.exclude",
        "data.num_workers",
        "data.cache",
        "data.cache_images",
        "data.extensions",
        "data.on_unreadable",
        "data.on_changed",
        "transfer.strategy",  # a name for options, all of which are compared
        "train.cache_features",
        "train.compile",
        "train.grad_accum_steps",
        "train.gradient_checkpointing",
        "train.micro_batch_size",
        "train.logs_per_epoch",
        "checkpoint.every",
        "checkpoint.keep_last",
        "checkpoint.keep_best",
        "checkpoint.keep_every",
    }
)


_MEASURED = ("train.precision", "train.channels_last")
_MAX_DIFFERENCES = 3


def check_resumable(folder: Path, config: str, *, resume: Literal["auto", "never", "must"]) -> str | None:
    """Check whether a run of this config can start or resume in the folder; return a line to print, or None.

    Args:
        folder: the run folder, or the folder of a phase. Nothing in it is changed.
        config: the resolved config as YAML.
        resume: the option run.resume.

    Raises:
        UserError: the folder holds another run or foreign files, or (`must`) no run to resume.

    """
    if not holds_run(folder):
        # A start that was killed early leaves attempts/ alone.
        results = [name for name in OUR_FILES if name not in (CONFIG, ATTEMPTS) and (folder / name).exists()]
        if results:
            raise UserError(
                f"run.dir {folder}: holds {', '.join(results)} but no {CONFIG}, so it is not a run that could be "
                "resumed or archived; choose another folder"
            )
        if resume == "must":
            raise UserError(f"run.resume is must, but {folder} holds no run to resume")
        return None
    if not (folder / CONFIG).read_bytes().startswith(HEADER.encode()):
        raise UserError(
            f"run.dir {folder}: holds a {CONFIG} that no run has written, and would overwrite it; choose another folder"
        )
    if resume == "never":
        return None
    _check_checkpoints_exist(folder)
    can_resume = has_checkpoint(folder)
    if resume == "must" and not can_resume:
        raise UserError(f"run.resume is must, but the run in {folder} has no checkpoint yet")
    # A start without results may be followed by one with another config.
    differences = list(_differences(folder / CONFIG, config)) if can_resume or (folder / MODEL).exists() else []
    if differences:
        listed = "".join(f"\n  {line}" for line in differences)
        raise UserError(
            f"run.dir {folder}: holds a run of another config:{listed}\n"
            "Choose another run.dir, or --run.resume never, which archives that run"
        )
    return None if can_resume else "an earlier start in this folder has saved no checkpoint: starting anew"


def choose_folder(folder: Path, config: str) -> tuple[Path, str | None]:
    """Return the first of FOLDER, FOLDER-2, FOLDER-3, ... that holds no run, or a run of this config.

    Args:
        folder: the first candidate.
        config: the resolved config as YAML.

    Returns:
        The folder, and a line to print if it is not the first one and holds no run yet.

    """
    number, candidate, reason = 1, folder, ""
    while (other := _other_run(candidate, config)) is not None:
        reason = reason or f"{candidate} holds {other}"
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    message = f"run.dir is not set, and {reason}: this run is in {candidate}" if reason else None
    return candidate, message


def _other_run(folder: Path, config: str) -> str | None:
    """Return in a few words which other run a folder holds; None if this run may use the folder."""
    try:
        if not holds_run(folder):
            check_resumable(folder, config, resume="auto")
            return None
        differences = list(_differences(folder / CONFIG, config, _MAY_CHANGE - {"data.root", "data.exclude"}))
    except UserError:
        return "other files"
    latest = latest_attempt(folder)
    has_results = has_checkpoint(folder) or (folder / MODEL).exists()
    if not differences or not (has_results or (latest is not None and latest.state == "running")):
        return None
    return f"a run with other options ({'; '.join(differences[:_MAX_DIFFERENCES])})"


def _check_checkpoints_exist(folder: Path) -> None:
    """Raise a UserError if a phase has metrics, but its checkpoints are gone: the metrics would be overwritten."""
    for record in read_attempts(folder):
        phase = folder / record.stage if record.stage in (PRETRAIN, BASELINE) else folder
        if record.step and (phase / METRICS).exists() and not has_checkpoints(phase / CHECKPOINTS):
            raise UserError(
                f"{phase / CHECKPOINTS}: attempt {record.attempt} has saved step {record.step} of this run, but its "
                "checkpoints are gone. Restore one, or --run.resume never, which archives the run"
            )


def has_checkpoints(folder: Path) -> bool:
    """Return whether a checkpoint was ever completed in a folder of checkpoints, even if it was damaged since."""
    return any(folder.glob("step-*-epoch-*")) or any(folder.glob("damaged-*"))


def holds_run(folder: Path) -> bool:
    """Return whether a run was started in this folder."""
    return (folder / CONFIG).exists()


def has_checkpoint(folder: Path) -> bool:
    """Return whether the run, or its pretraining phase, has a checkpoint."""
    return has_checkpoints(folder / CHECKPOINTS) or has_checkpoints(folder / PRETRAIN / CHECKPOINTS)


def archive_run(folder: Path, environment: Mapping[str, str] = os.environ) -> str:
    """Rename the folder of an earlier run, and return a line with the new name. This start's logs keep their path."""
    archive = _archive_path(folder)
    logs = Path(environment.get(LOG_FOLDER, os.devnull))
    try:
        folder.rename(archive)
        if logs.is_relative_to(folder):
            logs.parent.mkdir(parents=True)
            (archive / logs.relative_to(folder)).rename(logs)
    except OSError as error:
        raise UserError(f"run.dir {folder}: cannot be archived ({error.strerror}); choose another folder") from None
    return f"the earlier run was archived as {archive}"


def archive_results(folder: Path) -> str | None:
    """Rename results without checkpoints before they are overwritten; return a line with the new name.

    Return None if there is no model file to archive.
    """
    if not (folder / MODEL).exists():
        return None
    number = 1
    while any((folder / f"earlier-{number}-{name}").exists() for name in _RESULTS):
        number += 1
    for name in _RESULTS:
        if (folder / name).exists():
            (folder / name).rename(folder / f"earlier-{number}-{name}")
    return f"{folder}: holds results but no checkpoint to resume from: archived as earlier-{number}-{MODEL}"


def remove_evaluation(folder: Path) -> None:
    """Remove the evaluation of the model file, before another model file is written."""
    for name in (EVALUATION, PREDICTIONS):
        (folder / name).unlink(missing_ok=True)


def write_config(folder: Path, config: str) -> None:
    """Write the run's config (YAML); create the folder if it does not exist.

    Raises:
        UserError: it cannot be written.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / CONFIG, HEADER + config)
    except OSError as error:
        raise UserError(f"run.dir {folder}: cannot be written to ({error.strerror}); choose another folder") from None


def saved_execution(folder: Path) -> Execution | None:
    """Return the precision and memory layout that the folder's run began with; None if there is no run to resume."""
    try:
        if not (folder / CONFIG).read_bytes().startswith(HEADER.encode()) or not has_checkpoint(folder):
            return None
        options = dict(yaml_file.flatten(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))))
    except (OSError, yaml.YAMLError, UnicodeDecodeError, AttributeError, RecursionError):
        return None  # `check_resumable` reports what is wrong with the file
    precision, channels_last = options.get("train.precision"), options.get("train.channels_last")
    if precision in PRECISIONS and isinstance(channels_last, bool):
        return Execution(precision, channels_last)
    return None


def check_visible(folder: Path) -> None:
    """Raise a UserError if this process does not see the run folder that rank 0 has opened."""
    if not (folder / CONFIG).exists():
        raise UserError(
            f"run.dir {folder}: {socket.gethostname()} does not see what rank 0 has written there; expected one folder "
            "that every machine shares"
        )


def _archive_path(folder: Path) -> Path:
    number = 1
    while (archive := folder.with_name(f"{folder.name}.earlier-{number}")).exists():
        number += 1
    return archive


def _differences(saved: Path, config: str, may_change: Set[str] = _MAY_CHANGE) -> Iterator[str]:
    """Yield a line for each option that differs between a saved config and this run's, and may not change."""
    after = dict(yaml_file.flatten(yaml.safe_load(config)))
    try:
        before = dict(yaml_file.flatten(yaml.safe_load(saved.read_text(encoding="utf-8"))))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{saved}: damaged ({' '.join(str(error).split())}). Restore the file, or --run.resume never, which "
            "archives the run"
        ) from None
    for key in sorted((before.keys() | after.keys()) - may_change):
        if key == "train.epochs" and _is_greater(before.get(key), after.get(key)):
            continue
        if key == "regularization.early_stopping" and _is_more_patient(before.get(key), after.get(key)):
            continue
        if key in _MEASURED and after.get(key) == "auto":
            continue  # the run keeps what was measured when it began
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"


def _is_greater(before: object, after: object) -> bool:
    return isinstance(before, int) and isinstance(after, int) and after > before


def _is_more_patient(before: object, after: object) -> bool:
    """Return whether early stopping is turned off, or waits longer than before."""
    return isinstance(before, int) and (after is None or _is_greater(before, after))


@contextmanager
def saving_to(path: Path) -> Iterator[None]:
    """Raise a UserError if the block fails to write: the disk is full, or the folder is gone."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(
            describe_missing(path, error)
            or f"{path}: the state of the run could not be saved ({error}). What was saved before is whole: make room, "
            "and the same command resumes from there"
        ) from None
