"""The run folder: what stands in it, whether to go on from it, and that nothing in it is lost.

config.yaml         the resolved config; runs again from there
metrics.jsonl       one row an epoch, and finer ones
model.safetensors   the best epoch's weights, with all that is needed to predict
last.safetensors    the training state at the end of the last epoch
curves.png          the note's plot
split.csv           the split, where one was made
"""

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml

from trainer.checkpoint import Counters, read_counters
from trainer.errors import UserError
from trainer.files import write_text_atomically

CONFIG, METRICS, MODEL, LAST, CURVES, SPLIT = (
    "config.yaml",
    "metrics.jsonl",
    "model.safetensors",
    "last.safetensors",
    "curves.png",
    "split.csv",
)
# A resumed run may differ in these: they say where and how fast it runs, not what it computes.
# The images are compared by their fingerprint, so that they may have moved.
_FREE = frozenset(
    {
        "run.dir",
        "run.resume",
        "run.device",
        "run.threads",
        "data.root",
        "data.workers",
        "data.cache",
        "data.on_unreadable",
        "train.points_per_epoch",
    }
)


MARK = "# Written by regraft: every option of this run. --config with this file runs it again.\n"


def open_folder(folder: Path, config: str, *, resume: Literal["auto", "never", "must"]) -> str | None:
    """Make the run folder ready for a run of this config (YAML), and return a line that says what was found.

    Raises:
        UserError: the folder cannot be used, holds another run, or (`must`) none to go on from.

    """
    try:
        note = _settle(folder, config, resume)
        folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(folder / CONFIG, MARK + config)
    except OSError as error:
        raise UserError(
            f"run.dir {folder}: cannot be written to ({error.strerror}); choose another folder"
        ) from None
    return note


def _settle(folder: Path, config: str, resume: str) -> str | None:
    if not (folder / CONFIG).exists():
        ours = [name for name in (MODEL, LAST, METRICS, CURVES, SPLIT) if (folder / name).exists()]
        if ours:
            raise UserError(
                f"run.dir {folder}: holds {', '.join(ours)} but no {CONFIG}, so it is not a run that could be "
                "gone on with or moved aside; choose another folder"
            )
        if resume == "must":
            raise UserError(f"run.resume is must, but {folder} holds no run to go on from")
        return None
    if not (folder / CONFIG).read_bytes().startswith(MARK.encode()):
        raise UserError(
            f"run.dir {folder}: holds a {CONFIG} that no run has written, which would be lost; choose another folder"
        )
    if resume == "never":
        aside = _free_name(folder)
        folder.rename(aside)
        return f"the earlier run was moved to {aside}"
    begun = (folder / LAST).exists() or (folder / "source" / LAST).exists()
    has_model = (folder / MODEL).exists()
    if (folder / LAST).exists() and not has_model:
        raise UserError(
            f"run.dir {folder}: holds {LAST} but no {MODEL}, which an epoch's end writes before it. Restore that "
            "file, or --run.resume never, which moves the run aside"
        )
    if resume == "must" and not begun:
        raise UserError(f"run.resume is must, but the run in {folder} has not finished an epoch")
    # A start that got nowhere may be followed by one of another config: it has nothing to lose.
    differences = list(_differences(folder / CONFIG, config)) if begun or has_model else []
    if differences:
        listed = "".join(f"\n  {line}" for line in differences)
        raise UserError(
            f"run.dir {folder}: holds a run of another config:{listed}\n"
            "Choose another run.dir, or --run.resume never, which moves that run aside"
        )
    return None if begun else "an earlier start in this folder had not finished an epoch: starting anew"


def check_seen(folder: Path) -> None:
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
    for key in sorted((before.keys() | after.keys()) - _FREE):
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def find_state(folder: Path, *, data: str) -> Counters | None:
    """Return where the run in `folder` stands, or None where it has yet to begin.

    Raises:
        UserError: the state is damaged, or belongs to other training images.

    """
    if not (folder / LAST).exists():
        return None
    counters = read_counters(folder / LAST)
    if counters.data != data:
        raise UserError(
            f"{folder} holds a run on other training images (their names, classes or split have changed since): "
            "choose another run.dir, or --run.resume never, which moves that run aside"
        )
    return counters
