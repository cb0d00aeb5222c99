"""Write the evaluation of a model into a folder: metrics, the prediction of each image, and pictures."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from regraft.contract import EVALUATION, PREDICTIONS, create_output_folder
from trainer.errors import UserError
from trainer.evaluation.calibration import CalibratedMetrics
from trainer.evaluation.pictures import write_pictures
from trainer.evaluation.predictions import Predictions, write_predictions
from trainer.evaluation.report import SplitReport, to_json
from trainer.evaluation.table import class_table, describe_confusions, metric_table
from trainer.run.atomic import write_text_atomically


def prepare_folder(folder: Path, name: str) -> None:
    """Create the folder, before the long work.

    Args:
        folder: will be written to.
        name: how an error message begins.

    Raises:
        UserError: it cannot be written to.

    """
    try:
        create_output_folder(folder)
        probe = folder / f".{EVALUATION}.probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{name} cannot be written to ({error.strerror})") from None


def print_report(console: Console, report: SplitReport, *, calibrated: CalibratedMetrics | None) -> None:
    """Print a report, and the metrics after calibration."""
    console.print(metric_table(report, calibrated))
    console.print(class_table(report))
    for line in describe_confusions(report):
        console.print(line)


def write_evaluation(
    folder: Path,
    fields: Mapping[str, Any],
    split: str,
    predicted: tuple[Sequence[str], Predictions],
    report: SplitReport,
    *,
    title: str,
    warn: Callable[[str], object],
) -> list[str]:
    """Write all files, `evaluation.json` last; return their names.

    Args:
        folder: a folder of `prepare_folder`.
        fields: content of `evaluation.json`, without the report.
        split: name of the split.
        predicted: paths of its images, and their predictions.
        report: its metrics.
        title: title of the pictures.
        warn: called with a message if a picture cannot be drawn.

    Raises:
        UserError: a file cannot be written.

    """
    try:
        write_predictions(folder / PREDICTIONS, {split: predicted}, report.classes)
        pictures = write_pictures(folder, report, title=title, warn=warn)
        content = {**fields, "splits": {split: report.to_fields()}}
        write_text_atomically(folder / EVALUATION, to_json(content))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to ({error.strerror}); make room, and run it again") from None
    return [EVALUATION, PREDICTIONS, *pictures]
