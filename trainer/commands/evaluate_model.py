"""What `regraft evaluate` does with its arguments."""

import argparse
import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

from regraft.contract import CONFIG, CONFIG_HEADER
from trainer.config.parse import parse
from trainer.config.sections.data import DataConfig
from trainer.errors import UserError
from trainer.evaluation.calibration import calibrated_metrics, fit_temperature
from trainer.evaluation.class_mapping import map_classes, parse_mapping
from trainer.evaluation.evaluate_files import FileEvaluator
from trainer.evaluation.labeled_images import LabeledImages, list_images, list_labeled_images, list_run_images
from trainer.evaluation.output import prepare_folder, print_report, write_evaluation
from trainer.evaluation.report import make_report
from trainer.evaluation.unknown import rate_scores
from trainer.model.file import find_model_file
from trainer.model.metadata import update_metadata
from trainer.report.console import make_console
from trainer.text import escape_unprintable, join_truncated

_OUTPUT = "evaluation"


def evaluate_model(arguments: argparse.Namespace, data: DataConfig) -> None:
    """Evaluate a model on labeled images; print the metrics and write them.

    Args:
        arguments: of the command line.
        data: how to read the images.

    Raises:
        UserError: something that the user can fix.

    """
    console = make_console(enabled=True)
    file = find_model_file(arguments.model)
    labeled = _list_images(arguments, data, file)
    unknown_paths = None if arguments.unknown is None else list_images(arguments.unknown, options=data)
    evaluator = FileEvaluator(file, device=arguments.device, batch_size=arguments.batch_size, console=console)
    metadata = evaluator.metadata
    mapping = parse_mapping(arguments.map, labeled.classes, metadata.classes)
    labels = map_classes(labeled.classes, metadata.classes, mapping)
    kept = [(path, label) for path, name in labeled.images if (label := labels[name]) is not None]
    left_out = Counter(name for _, name in labeled.images if labels[name] is None)
    folder: Path = arguments.output or file.parent / _OUTPUT
    prepare_folder(folder, f"--output {escape_unprintable(str(folder))}:")
    if (folder / CONFIG).is_file():
        raise UserError(
            f"--output {escape_unprintable(str(folder))}: is a run folder, whose own evaluation.json would be "
            "replaced; name another folder"
        )
    if arguments.store:
        prepare_folder(file.parent, f"--store: {escape_unprintable(str(file.parent))}")

    source = escape_unprintable(arguments.data) if arguments.data else "the run's dataset"
    console.print(f"{file}: {len(kept)} images of {source}, split {labeled.split}")
    for line in _notes(labels, left_out, metadata.classes):
        console.print(line)
    predicted = evaluator.predict([path for path, _ in kept], [label for _, label in kept])
    report = make_report(predicted.predictions, metadata.classes)
    temperature = metadata.temperature
    if arguments.calibrate:
        temperature = fit_temperature(predicted.predictions)
        console.print(_describe_temperature(temperature))
    calibrated = None if temperature is None else calibrated_metrics(predicted.predictions, temperature)
    print_report(console, report, calibrated=calibrated)
    fields: dict[str, Any] = {
        "model": str(file),
        "data": arguments.data,
        "map": mapping,
        "left_out": dict(left_out),
        "unreadable": list(predicted.errors),
        "temperature": temperature,
        "calibrated": {} if calibrated is None else {labeled.split: dataclasses.asdict(calibrated)},
    }
    changes: dict[str, Any] = {"temperature": temperature} if arguments.calibrate and temperature is not None else {}
    if unknown_paths is not None:
        scores = rate_scores(predicted.predictions.logits, evaluator.logits(unknown_paths))
        fields["unknown"] = [dataclasses.asdict(score) for score in scores]
        changes["unknown"] = scores[0].suggestion
        for score in scores:
            console.print(str(score))
    title = f"{file.parent.name}, {labeled.split}: accuracy {report.evaluation.accuracy:.3f}"
    table = (predicted.paths, predicted.predictions)
    names = write_evaluation(folder, fields, labeled.split, table, report, title=title, warn=console.print)
    console.print(f"{folder}: {', '.join(names)}")
    if changes and arguments.store:
        update_metadata(file, **changes)
        console.print(f"{file}: stored {' and '.join(changes)} in the header")
    elif changes:
        console.print(f"--store writes {' and '.join(changes)} into the header of the model file")


def _list_images(arguments: argparse.Namespace, data: DataConfig, file: Path) -> LabeledImages:
    if arguments.data is not None:
        return list_labeled_images(Path(arguments.data).expanduser(), arguments.split, options=data)
    config = file.parent / CONFIG
    try:
        is_run = config.read_bytes().startswith(CONFIG_HEADER.encode())
    except FileNotFoundError:
        is_run = False
    except OSError as error:
        raise UserError(f"{escape_unprintable(str(config))}: cannot be read ({error.strerror})") from None
    if not is_run:
        raise UserError(f"{file}: is not in a run folder, so the images to evaluate on are not known: give DATA")
    return list_run_images(parse([f"--config={config}"]).data, arguments.split)


def _notes(labels: dict[str, int | None], left_out: Counter[str], classes: tuple[str, ...]) -> list[str]:
    """Return lines about classes that the data or the model alone have."""
    notes = []
    if left_out:
        notes.append(f"left out by --map: {left_out.total()} images of {join_truncated(left_out)}")
    covered = set(labels.values())
    absent = [name for label, name in enumerate(classes) if label not in covered]
    if absent:
        notes.append(
            f"{len(absent)} of {len(classes)} classes of the model have no image: {join_truncated(absent)}. Images may "
            "still be predicted as one of them"
        )
    return notes


def _describe_temperature(temperature: float | None) -> str:
    if temperature is None:
        return "not calibrated: all predictions are correct, so the log loss has no minimum; use more images"
    return f"temperature {temperature:.4f}, fitted to these images: their calibrated figures are optimistic"
