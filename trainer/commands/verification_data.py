"""The real images that an export is verified on: a dataset, or the run's own."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from regraft.contract import CONFIG, ENVIRONMENT, latest_attempt_number, read_file
from trainer.config.parse import parse
from trainer.config.schema import Config
from trainer.data.index import DatasetIndex, Example, Examples
from trainer.data.prepare import list_examples
from trainer.errors import UserError
from trainer.export.model_card import Training
from trainer.text import escape_unprintable, join_truncated

_MAX_RECORD_BYTES = 10 << 20


@dataclass(frozen=True, kw_only=True)
class VerificationData:
    """Images to verify an export on."""

    examples: tuple[Example, ...]
    """Labels are those of the model."""
    name: str
    """Which images they are."""
    training: Training
    """What the run folder says about the training."""


def read_verification_data(root: str | None, run: Path, classes: Sequence[str], *, count: int) -> VerificationData:
    """Return about `count` images, spread over the classes.

    Args:
        root: dataset, in any layout; None takes the test split of the run's own data.
        run: the run folder, or another folder if the model file is in none.
        classes: those of the model.
        count: number of images.

    Raises:
        UserError: there is no dataset, or it has classes that the model lacks.

    """
    config = _read_config(run)
    if root is None and config is None:
        raise UserError(
            f"{escape_unprintable(str(run))} is not a run folder, so there are no images to verify the export on: name "
            "a dataset by --verify-data FOLDER"
        )
    if root is not None:
        try:
            index = list_examples(parse([f"--data.root={root}"]).data)
        except UserError as error:
            raise UserError(f"--verify-data {str(error).removeprefix('data.root ')}") from None
        # A split that is made here has no meaning: all images are new to the export.
        examples = Examples.of((*index.train, *index.val, *index.test)) if index.split_made else index.test
    else:
        assert config is not None  # for mypy
        try:
            index = list_examples(config.data)
        except UserError as error:
            raise UserError(f"{error}. Or name another dataset by --verify-data FOLDER") from None
        examples = index.test
    is_whole = root is not None and index.split_made
    return VerificationData(
        examples=_with_labels_of(classes, index, examples.spread(count)),
        name=f"{escape_unprintable(str(index.root))} ({'all of it' if is_whole else index.reported})",
        training=Training(data=_describe(index) if root is None else "", command=_read_command(run)),
    )


def _read_config(run: Path) -> Config | None:
    return parse([f"--config={run / CONFIG}"]) if (run / CONFIG).is_file() else None


def _with_labels_of(classes: Sequence[str], index: DatasetIndex, examples: Sequence[Example]) -> tuple[Example, ...]:
    """Return the examples with the labels of the model, whose classes may have another order."""
    labels = {name: label for label, name in enumerate(classes)}
    unknown = [name for name in index.classes if name not in labels]
    if unknown:
        raise UserError(
            f"{escape_unprintable(str(index.root))} has classes that the model lacks: {join_truncated(unknown)}. Its "
            f"classes are {join_truncated(classes)}: rename the folders, or name another dataset by --verify-data"
        )
    return tuple(Example(path, labels[index.classes[label]]) for path, label in examples)


def _describe(index: DatasetIndex) -> str:
    counts = f"{len(index.train)} images to train on, {len(index.test)} to report on ({index.reported})"
    val = f", {len(index.val)} to select the best epoch on" if index.val else ""
    return f"{index.root.name}: {len(index.classes)} classes, {counts}{val}"


def _read_command(run: Path) -> str:
    """Return the command line of the run's last start; empty if it is not recorded."""
    record = run / ENVIRONMENT / f"{latest_attempt_number(run):04}.json"
    try:
        words = json.loads(read_file(record, max_bytes=_MAX_RECORD_BYTES))["argv"]
        program = next(number for number, word in enumerate(words) if word.endswith("main.py"))
        options = words[program + 1 :]
        if options and options[-1].startswith("--run.dir="):  # which the launcher adds, as an absolute path
            del options[-1]
        return shlex.join(["regraft", "train", *options])
    # A damaged record, or one of an earlier version; the trainer may also have been called from Python.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, StopIteration):
        return ""
